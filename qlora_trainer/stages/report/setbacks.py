"""What went wrong while training and did not end it, so that whoever reads the figures knows."""

from collections.abc import Sequence

from qlora_trainer.records import TrainedAdapter

SHOWN = 3


def setbacks(trained: TrainedAdapter) -> tuple[str, ...]:
    """One sentence for each kind of setback: steps skipped, warnings of the watchdog, damaged checkpoints."""
    kinds = (
        ("Training skipped {count} of {steps} steps, which changed nothing", trained.skipped_steps),
        ("The watchdog warned while training ({count})", trained.incidents),
        (
            "Training went on from an earlier checkpoint, because {count} newer could not be read",
            trained.damaged_checkpoints,
        ),
    )
    return tuple(
        f"{text.format(count=len(found), steps=trained.steps)}: {_first(found)}." for text, found in kinds if found
    )


def _first(found: Sequence[tuple[int, str]]) -> str:
    shown = "; ".join(f"step {step}: {what}" for step, what in found[:SHOWN])
    return shown + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
