"""The rows of a task as training and evaluation read them, and how they are shown to people."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby

from qlora_trainer.data.audit import MaskAudit
from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class TaskRows:
    """Everything that training and evaluation read.

    Attributes:
        train: rows that are trained on in an epoch; with weights, rows of small sources stand in it more than once.
        validation: rows for periodic validation.
        test: rows that choose nothing; every reported figure comes from them.
        audit: what the label masks train.
        stop_ids: ids that generation stops at.
        pad_id: id right of a row's end in a batch.
        notes: sentences that the reader should see: what was dropped, cut or found twice.
        tokenizer: the base model's.
        sources: sentences about what each of several sources gives to an epoch.
        fingerprint: of all rows; absent = computed from them when it is asked for.
    """

    train: Sequence[EncodedRow]
    validation: Sequence[EncodedRow]
    test: Sequence[EncodedRow]
    audit: MaskAudit
    stop_ids: tuple[int, ...]
    pad_id: int
    notes: tuple[str, ...]
    tokenizer: TextTokenizer = field(repr=False)
    sources: tuple[str, ...] = ()
    fingerprint: str | None = None


def token_fingerprint(rows: TaskRows) -> str:
    """SHA-256 of all token ids, labels and prompts, split by split: equal where training sees the same."""
    return rows.fingerprint or fingerprint_of((rows.train, rows.validation, rows.test))


def fingerprint_of(sides: Iterable[Sequence[EncodedRow]]) -> str:
    """``token_fingerprint`` of training, validation and test rows."""
    digest = sha256()
    for side in sides:
        digest.update(array("q", [len(side)]))
        for row in side:
            digest.update(array("q", [len(row.token_ids), len(row.prompt_ids)]))
            digest.update(array("q", row.token_ids + row.labels + row.prompt_ids))
    return digest.hexdigest()


def audit_lines(rows: TaskRows) -> tuple[str, ...]:
    """What the label masks train, in a few lines for people; ``TaskRows.notes`` has what needs attention."""
    audit, tokenizer = rows.audit, rows.tokenizer
    lost = [
        (audit.dropped_overlong, "dropped as longer than data.window"),
        (audit.truncated, "cut to fit data.window"),
        (audit.split, "split into pieces"),
        (audit.rows_without_labels, "dropped as without a trained token"),
    ]
    losses = ", ".join(f"{count:,} {what}" for count, what in lost if count) or "none dropped, none cut"
    last = "none" if audit.stop_token_id is None else _named(tokenizer, audit.stop_token_id)
    stops = ", ".join(_named(tokenizer, stop) for stop in rows.stop_ids)
    return (
        f"{audit.rows:,} rows: {losses}. Used are {len(rows.train):,} for training, {len(rows.validation):,} for "
        f"validation, {len(rows.test):,} for the test",
        f"a row has {audit.median_row} tokens in the middle and {audit.longest_row} at most",
        f"{audit.label_tokens:,} of {audit.tokens:,} tokens are trained ({100 * audit.label_share:.1f} %)",
        f"{100 * audit.stop_token_trained_share:.1f} % of the rows train a token that generation stops at ({stops}); "
        f"the last trained token is mostly {last}",
        *rows.sources,
    )


def _named(tokenizer: TextTokenizer, token: int) -> str:
    return f"{token} {tokenizer.decode([token], skip_special=False)!r}"


def render_example(tokenizer: TextTokenizer, row: EncodedRow) -> list[tuple[str, bool]]:
    """The row's text in pieces, each with whether it is trained; the pieces joined are the whole text."""
    pieces: list[tuple[str, bool]] = []
    end, shown = 0, ""
    for is_trained, tokens in groupby(row.labels, key=lambda label: label != IGNORE_INDEX):
        end += len(list(tokens))
        # Decoded from the beginning each time: a tokenizer may drop the blank before the first token of a text.
        text = tokenizer.decode(row.token_ids[:end], skip_special=False)
        pieces.append((text[len(shown) :], is_trained))
        shown = text
    return pieces
