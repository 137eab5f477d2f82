"""Why a training ends before its time, and what may help, in words."""

from collections.abc import Sequence
from pathlib import Path

from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.recipe import Training
from qlora_trainer.stages.train.recovery import MicroBatchTooLargeError
from qlora_trainer.stages.train.watchdog import UnsoundStepError

SHOWN_ROWS = 4


def name_rows(rows: Sequence[EncodedRow], indexes: Sequence[int]) -> str:
    """The first few rows by file and line, else by index, each with the beginning of its prompt."""
    shown = ", ".join(_name_row(rows[index], index) for index in indexes[:SHOWN_ROWS])
    more = f" and {len(indexes) - SHOWN_ROWS} more" if len(indexes) > SHOWN_ROWS else ""
    return f"rows {shown}{more}"


def does_not_fit(
    too_large: MicroBatchTooLargeError,
    rows: Sequence[EncodedRow],
    settings: Training,
    *,
    micro_batch_size: int,
    checkpoints: Path,
) -> str:
    """A micro-batch that cannot be made smaller, with what would need less memory."""
    longest = max(len(rows[index].token_ids) for index in too_large.row_indexes)
    mends = ["lower data.window"]
    if settings.checkpointing != "full":
        mends.append("set training.checkpointing: full")
    if micro_batch_size > 1:
        mends.append(f"lower training.micro_batch_size (now {micro_batch_size})")
    return (
        f"training {name_rows(rows, too_large.row_indexes)} of up to {longest} tokens do not fit into memory "
        f"({too_large.reason.splitlines()[0]}). The last checkpoint is whole ({checkpoints}). "
        f"To mend it: {', or '.join(mends)}; then give the run a new name."
    )


def unsound_step(error: UnsoundStepError, *, learning_rate: float, may_be_skipped: bool) -> str:
    """What may help against a step whose gradients cannot be used."""
    mend = (
        "Look at lora.target_modules and at what the label masks train (`qlora-trainer check`)"
        if error.fault == "zero_gradients"
        else f"Look at those rows, or lower training.learning_rate (now {learning_rate})"
    )
    leave = f" To leave such steps out, set watchdog.{error.fault}: skip and run again." if may_be_skipped else ""
    return f"{mend} and give the run a new name.{leave}"


def _name_row(row: EncodedRow, index: int) -> str:
    return f"{row.place or index} ({row.prompt[:40]!r})"
