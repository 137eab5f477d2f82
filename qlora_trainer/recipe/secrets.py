"""Texts that look like a password: they are refused in a recipe, which is copied into the run, its report and trackers.

Known by the forms that their issuers have published; a secret of another form is not found.
"""

import re
from collections.abc import Iterator

SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\bwandb_v\d_\w{20,}|\blocal-[0-9a-f]{40}\b"  # Weights & Biases
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{20,}"  # GitHub
    r"|\bsk-(?:ant-|proj-)?\w{20,}"  # OpenAI, Anthropic
    r"|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{35}"  # Amazon, Google
    r"|://[^/\s:@]+:[^/\s@]+@"  # a password in an address
)
WANDB_KEY = re.compile(r"[0-9a-f]{40}")
"""wandb's older form, which is also that of a git commit."""
COMMITS = ("revision",)


def secrets_in(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where in nested plain values a text looks like a secret; never the text itself."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from secrets_in(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from secrets_in(inner, (*path, index))
    elif isinstance(value, str) and _is_secret(value, path):
        yield path


def _is_secret(text: str, path: tuple[str | int, ...]) -> bool:
    is_commit = bool(path) and path[-1] in COMMITS
    return SECRET.search(text) is not None or (WANDB_KEY.fullmatch(text.strip()) is not None and not is_commit)


WHAT_TO_DO = (
    "looks like a key or a password, and a recipe is copied into the run's folder, report and trackers. Remove it (and "
    "renew it, if the file was shared); logins belong to `wandb login`, `hf auth login` or WANDB_API_KEY and HF_TOKEN"
)
