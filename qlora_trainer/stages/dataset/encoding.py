"""Files of rows -> encoded rows in a folder, a stretch of rows at a time.

Files are read twice: once to check every row and to choose which side it belongs to, once to encode what is used. So no
more than a stretch of rows is ever in memory, beside 33 bytes for each.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from qlora_trainer.data.audit import MaskAudit, MaskTally, audit_notes, require_sound
from qlora_trainer.data.encode import (
    RENDERING,
    EncodedRow,
    cut_chats,
    encode_cut_chats,
    encode_documents,
    encode_text,
)
from qlora_trainer.data.examples import Example
from qlora_trainer.data.problems import Problems
from qlora_trainer.data.scoring import require_references
from qlora_trainer.data.splits import SIDES, RowKeys, Side, SplitPlan, Splits, split
from qlora_trainer.data.store import RowWriter
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.data.window import REFUSING, fit_row
from qlora_trainer.errors import DataError, RecipeError
from qlora_trainer.recipe import Data, Recipe
from qlora_trainer.stages.dataset.files import TaskFiles, survey

ROWS_AT_ONCE = 2048
CHARACTERS_AT_ONCE = 4 * 1024**2


@dataclass(frozen=True)
class Encoded:
    """What was written.

    Attributes:
        audit: of all rows.
        notes: sentences that the reader should see.
        source_rows: training rows that each training source gave, in order.
    """

    audit: MaskAudit
    notes: tuple[str, ...]
    source_rows: tuple[int, ...]


def encode_files(folder: Path, files: TaskFiles, recipe: Recipe, tokenizer: TextTokenizer) -> Encoded:
    """Splits, encodes and audits the rows of all files and writes each side into ``folder``.

    Raises:
        DataError: a file or its rows cannot be used; holds the problems of all files.
        RecipeError: the base model's tokenizer lacks what the recipe asks for.
    """
    data = recipe.data
    require_rendering(data, tokenizer)
    splits, blank_notes = _choose(files, recipe)
    encoder = _Encoder(recipe, tokenizer)
    with ExitStack() as stack:
        writers = {side: stack.enter_context(RowWriter(folder, side)) for side in SIDES}
        source_rows = [_encode_source(source, encoder, writers) for source in _used_examples(files, data, splits)]
    encoder.refuse_problems()
    audit = encoder.tally.audit()
    require_sound(audit, tokenizer, window=data.window, accept_untrained_stop=data.accept_untrained_stop)
    _refuse_empty({side: writer.count for side, writer in writers.items()})
    return Encoded(
        audit=audit,
        notes=(*files.notes(), *blank_notes, *splits.notes, *encoder.notes(), *audit_notes(audit)),
        source_rows=tuple(source_rows[: len(files.sides["train"])]),
    )


def require_rendering(data: Data, tokenizer: TextTokenizer) -> None:
    """Refuses what the tokenizer cannot do.

    Raises:
        RecipeError: there is no chat template, or no stop token.
    """
    if data.row_formats == {"text"}:
        return
    if data.render == "chat" and not tokenizer.has_chat_template:
        raise RecipeError(
            "data.render: chat needs a chat template, and the base model has none. Set data.render: text with a "
            "data.text_template, name a Jinja file as data.chat_template, or name a base model that was tuned for chat."
        )
    if data.render == "text":
        stop_id(data, tokenizer)


def stop_id(data: Data, tokenizer: TextTokenizer) -> int:
    """Id of the token that ends a completion of ``render: text``.

    Raises:
        RecipeError: there is no such token, or generation does not stop at it.
    """
    text = tokenizer.eos_text if data.stop_token is None else data.stop_token
    found = tokenizer.token_id(text)
    if found is not None and found in tokenizer.stop_ids:
        return found
    stops = ", ".join(repr(tokenizer.decode([stop], skip_special=False)) for stop in tokenizer.stop_ids)
    problem = "is no token of the base model" if found is None else "is no token that generation stops at"
    source = "data.stop_token" if data.stop_token is not None else "data.stop_token is absent, and the eos token"
    raise RecipeError(f"{source} {text!r} {problem}. Set data.stop_token to one of: {stops}.")


def _choose(files: TaskFiles, recipe: Recipe) -> tuple[Splits, list[str]]:
    """Which side every row belongs to, and sentences about the files; the first pass over them."""
    data = recipe.data
    keys = {side: RowKeys(recipe.run.seed) for side in files.sides}
    blank_lines: dict[Path, int] = {}
    for side, example in survey(files, data, blank_lines):
        keys[side].add(example)
    plan = SplitPlan(
        validation_rows=data.validation_rows,
        test_rows=data.test_rows,
        train_rows=data.train_rows,
        seed=recipe.run.seed,
    )
    splits = split(keys["train"], validation=keys.get("validation"), test=keys.get("test"), plan=plan)
    return splits, [f"{path}: {count} blank lines skipped" for path, count in blank_lines.items() if count]


def _used_examples(files: TaskFiles, data: Data, splits: Splits) -> Iterator[Iterator[tuple[Side, Example]]]:
    """For each source of each side, its rows that are used, with the side that they belong to."""
    for name, sources in files.sides.items():
        numbers = count()
        for source in sources:
            yield (
                (side, example)
                for examples in source.readings(data)
                for example, number in zip(examples, numbers, strict=False)
                if (side := splits.side(name, number)) is not None
            )


def _encode_source(
    examples: Iterator[tuple[Side, Example]], encoder: "_Encoder", writers: Mapping[Side, RowWriter]
) -> int:
    """Encodes one source and gives the number of training rows that came of it."""
    before = writers["train"].count
    for stretch in _stretches(examples):
        encoder.write(stretch, writers)
    return writers["train"].count - before


def _stretches(examples: Iterable[tuple[Side, Example]]) -> Iterator[list[tuple[Side, Example]]]:
    """The examples in lists that are neither long nor large."""
    held: list[tuple[Side, Example]] = []
    characters = 0
    for side, example in examples:
        held.append((side, example))
        characters += len(example.content)
        if len(held) >= ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield held
            held, characters = [], 0
    if held:
        yield held


class _Encoder:
    """Encodes stretches of examples and gathers what is to be told of them."""

    def __init__(self, recipe: Recipe, tokenizer: TextTokenizer) -> None:
        self.data, self.tokenizer = recipe.data, tokenizer
        self.tally = MaskTally(bos_id=tokenizer.bos_id, stop_ids=tokenizer.stop_ids)
        self._unrendered, self._overlong = Problems(), Problems()
        self._seen: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._control = re.compile("|".join(map(re.escape, tokenizer.control_texts)) or "(?!)")
        self._reads_references = "slot_f1" in recipe.evaluation.metrics
        self._references: list[tuple[str, str]] = []

    def write(self, stretch: Sequence[tuple[Side, Example]], writers: Mapping[Side, RowWriter]) -> None:
        """Encodes the examples and writes what the window leaves of them, in order."""
        rows = self._encoded([example for _, example in stretch])
        for (side, example), row in zip(stretch, rows, strict=True):
            self._look_at(side, example)
            if row is not None:
                fitted = fit_row(
                    row,
                    window=self.data.window,
                    overlong=self.data.overlong,
                    bos_id=self.tokenizer.bos_id,
                    place=example.place,
                    problems=self._overlong,
                )
                for piece in self.tally.add(row, fitted, place=example.place):
                    writers[side].add(piece)

    def refuse_problems(self) -> None:
        """Refuses rows that cannot be rendered, do not fit where they must, or cannot be scored, or all say nothing."""
        self._unrendered.refuse(RENDERING)
        if self._reads_references:
            places, references = zip(*self._references, strict=True)
            require_references(["slot_f1"], references, places=places)
        self._overlong.refuse(REFUSING)
        if self._seen["empty"] and self._seen["empty"] == self._seen["rows"]:
            raise DataError(
                f"all {self._seen['rows']} rows have an empty completion, the first at {self._first['empty']}: the "
                "model would learn to say nothing. Is data.completion_column the right one?"
            )

    def notes(self) -> list[str]:
        """Sentences about the examples, each with its first place."""
        template = self.tokenizer.chat_template
        sentences = {
            "empty": "rows have an empty completion",
            "control": "rows hold the text of a control token, which becomes that token: whoever wrote the text can "
            "end a turn with it",
            "parsed": "rows hold arguments of tool calls as a JSON text; the chat template gets them as objects, as it "
            "does from servers",
            "untrained": "rows have assistant turns that say they are not to be trained",
            "rewritten": "rows have trained turns that the chat template renders otherwise once later ones follow, "
            "such as without their reasoning; they are trained as they stand there. data.train_turns: last trains none "
            "of them",
        }
        notes = [
            f"{self._seen[kind]} {text}, the first at {self._first[kind]}"
            for kind, text in sentences.items()
            if self._seen[kind]
        ]
        if self.data.render == "chat" and template is not None and template.writes_date:
            notes.append("the chat template can write today's date (strftime_now): rows keep the day of their encoding")
        return notes

    def _encoded(self, examples: Sequence[Example]) -> list[EncodedRow | None]:
        """A row for each example, in order; None where the chat template refuses it."""
        texts = [number for number, example in enumerate(examples) if example.is_text]
        others = [number for number, example in enumerate(examples) if not example.is_text]
        rows: list[EncodedRow | None] = [None] * len(examples)
        for numbers, made in (
            (texts, encode_documents([examples[number] for number in texts], self.tokenizer)),
            (others, self._conversations([examples[number] for number in others])),
        ):
            for number, row in zip(numbers, made, strict=True):
                rows[number] = row
        return rows

    def _conversations(self, examples: Sequence[Example]) -> Sequence[EncodedRow | None]:
        if not examples:
            return []
        data, tokenizer = self.data, self.tokenizer
        if data.render == "text":
            return encode_text(examples, tokenizer, template=data.text_template, stop_id=stop_id(data, tokenizer))
        chats = cut_chats(examples, tokenizer, data.train_turns, self._unrendered)
        pairs = [(example, chat) for example, chat in zip(examples, chats, strict=True) if chat is not None]
        for example, chat in pairs:
            self._count("rewritten", example, is_so=bool(chat.rewritten))
        made = iter(encode_cut_chats(pairs, tokenizer))
        return [None if chat is None else next(made) for chat in chats]

    def _look_at(self, side: Side, example: Example) -> None:
        self._seen["rows"] += 1
        is_empty = not example.completion.strip() and not example.messages[-1].get("tool_calls")
        self._count("empty", example, is_so=is_empty)
        self._count("control", example, is_so=self._control.search(example.content) is not None)
        self._count("parsed", example, is_so=example.has_parsed_arguments)
        self._count("untrained", example, is_so=bool(example.untrained))
        if self._reads_references and side == "test":
            self._references.append((example.place, example.completion))

    def _count(self, kind: str, example: Example, *, is_so: bool) -> None:
        if is_so:
            self._seen[kind] += 1
            self._first.setdefault(kind, example.place)


def _refuse_empty(counts: Mapping[Side, int]) -> None:
    names = {"train": "training", "validation": "validation", "test": "test"}
    empty = [names[side] for side, count in counts.items() if not count]
    if empty:
        raise DataError(
            f"no {' and no '.join(empty)} row fits into data.window with a trainable token. Raise data.window, or set "
            "data.overlong: truncate_prompt (with format: text, data.overlong: split)."
        )
