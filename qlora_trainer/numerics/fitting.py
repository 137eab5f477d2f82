"""The largest micro-batch and the longest window that fit into so many bytes, by prediction alone. No torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from qlora_trainer.numerics.footprint import training_memory
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.numerics.training_load import POLICIES, Checkpointing, TrainingLoad

FAR = 2**24
"""Where the search ends: nobody trains on rows of so many tokens, or on so many rows at a time."""


@dataclass(frozen=True)
class PolicyRoom:
    """What fits under one checkpointing policy.

    Attributes:
        checkpointing: the policy.
        needed_bytes: predicted peak of the micro-batch that was asked for.
        largest_micro_batch: rows that fill the window, at most; 0 where not even one fits.
        longest_window: tokens of a row, at most, with as many rows as were asked for; 0 where none fit.
    """

    checkpointing: Checkpointing
    needed_bytes: int
    largest_micro_batch: int
    longest_window: int


def rooms(shape: ModelShape, load: TrainingLoad, free_bytes: int, *, rows: int, window: int) -> tuple[PolicyRoom, ...]:
    """What fits under each policy, from the fastest to the smallest.

    Args:
        shape: the model.
        load: what is asked of it.
        free_bytes: what there is.
        rows: of the micro-batch that is asked for.
        window: tokens of the longest row.
    """

    def room(policy: Checkpointing) -> PolicyRoom:
        under = replace(load, checkpointing=policy)

        def fits(many: int, tokens: int) -> bool:
            return training_memory(shape, full_rows(under, many, tokens)).total <= free_bytes

        return PolicyRoom(
            checkpointing=policy,
            needed_bytes=training_memory(shape, under).total,
            largest_micro_batch=largest(lambda many: fits(many, window)),
            longest_window=largest(lambda tokens: fits(rows, tokens)),
        )

    return tuple(room(policy) for policy in POLICIES)


def full_rows(load: TrainingLoad, rows: int, window: int) -> TrainingLoad:
    """The load with a micro-batch of rows that fill the window, every token of them a label."""
    return replace(load, tokens=rows * window, row_tokens=window, label_tokens=rows * window)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number below ``FAR`` for which ``fits`` holds, given that it holds for every smaller one; else 0."""
    low, high = 0, 1
    while high < FAR and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
