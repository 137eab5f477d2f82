"""Two answers word by word: what the second says otherwise than the first."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

WORD = re.compile(r"\w+|\s+|[^\w\s]")
LARGEST = 2_000
"""Words of a text from which differences are not looked for: the search takes the product of both lengths."""

How = Literal["same", "added", "missing"]


@dataclass(frozen=True)
class Part:
    """A run of words, and whether both texts hold it, only the answer (added), or only the other one (missing)."""

    text: str
    how: How


@dataclass(frozen=True)
class Compared:
    """What one stage answered.

    Attributes:
        stage: name of the stage.
        against: what it is compared with, in words; empty where with nothing.
        parts: the answer, with what the other text has instead of it.
        is_equal: whether both texts are the same but for blank space around them.
    """

    stage: str
    against: str
    parts: tuple[Part, ...]
    is_equal: bool


def compare_answers(stage: str, answer: str, *, other: str | None, against: str) -> Compared:
    """An answer with every word marked that the other text does not hold, and every word that it lacks.

    Args:
        stage: whose answer it is.
        answer: its text.
        other: what to compare with; None compares with nothing.
        against: that text's name.
    """
    text = answer.strip()
    if other is None:
        return Compared(stage, "", _whole(text), is_equal=False)
    if text == other.strip():
        return Compared(stage, against, _whole(text), is_equal=True)
    return Compared(stage, against, differing(text, other.strip()), is_equal=False)


def differing(text: str, other: str) -> tuple[Part, ...]:
    """The words of ``text`` and, where they stood, those that only ``other`` holds.

    >>> [(part.text, part.how) for part in differing('to Ana now', 'to Bo now')]
    [('to ', 'same'), ('Bo', 'missing'), ('Ana', 'added'), (' now', 'same')]
    """
    words, others = WORD.findall(text), WORD.findall(other)
    if max(len(words), len(others)) > LARGEST:
        return (Part(text, "added"),)
    parts: list[Part] = []
    matcher = SequenceMatcher(None, others, words, autojunk=False)
    for tag, first, last, start, end in matcher.get_opcodes():
        if tag == "equal":
            parts.append(Part("".join(words[start:end]), "same"))
            continue
        parts += _runs(others[first:last], "missing")
        parts += _runs(words[start:end], "added")
    return tuple(parts)


def _runs(words: list[str], how: How) -> tuple[Part, ...]:
    return (Part("".join(words), how),) if words else ()


def _whole(text: str) -> tuple[Part, ...]:
    return (Part(text, "same"),) if text else ()
