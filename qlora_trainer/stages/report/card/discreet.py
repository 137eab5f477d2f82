"""Text that may leave the machine: local paths are cut to their last part, tokens are taken out."""

import re
from collections.abc import Iterable
from pathlib import Path

TOKEN = re.compile(r"\b(?:hf_\w{8,}|sk-[\w-]{16,}|gh[oprsu]_\w{16,}|wandb_v\d_\w{8,})")
"""What tokens of Hugging Face, OpenAI, GitHub and Weights & Biases begin with."""
# At least two parts, and nothing before it that makes it a share of a word (nats/token) or of an address (https://...).
ABSOLUTE_PATH = re.compile(r"(?<![\w:/.~<])(?:~|file://)?/(?:[^\s/'\"`|<>()\[\],;]+/)+([^\s/'\"`|<>()\[\],;]*)")
HIDDEN_TOKEN = "(token removed)"


def discreet(text: str, places: Iterable[Path] = ()) -> str:
    """The text without absolute paths and tokens.

    Args:
        text: anything.
        places: paths that are known, and may hold blanks that a search would stop at; each is cut to its name.

    >>> discreet("read from /home/ana/data/rows.jsonl in nats/token")
    'read from rows.jsonl in nats/token'
    """
    for place in sorted(places, key=lambda path: -len(str(path))):
        if place.is_absolute() and place.name:
            text = text.replace(str(place), place.name)
    return TOKEN.sub(HIDDEN_TOKEN, ABSOLUTE_PATH.sub(r"\1", text))
