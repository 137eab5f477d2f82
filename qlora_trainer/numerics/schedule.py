"""The learning rate as a pure function of the step, so that a resumed run repeats it without any state."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_scale(step: int, *, warmup_steps: int, total_steps: int, schedule: Schedule) -> float:
    """Factor in (0, 1] by which the peak learning rate is multiplied for one optimizer step.

    Steps are counted from 0: the first optimizer step is step 0 and the last is ``total_steps - 1``.
    With w = ``warmup_steps`` and n = ``total_steps``:

    - warm-up, steps 0 to w - 1: ``(step + 1) / (w + 1)``, a straight line that would be 0 just before the first
      step and reaches 1 at step w. Without warm-up step 0 is at the peak.
    - from step w on, with p = ``(step - w) / (n - w)``: ``1 - p`` (linear), ``(1 + cos(pi p)) / 2``
      (cosine), ``1`` (constant). Zero would come at step n, which is not taken.

    So no step is spent at rate zero. transformers' schedules count one later: theirs give the same factor at
    ``step + 1`` with w + 1 warm-up steps of n + 1.

    A warm-up of n steps or more never ends, and the peak is not reached.

    Args:
        step: the optimizer step that is about to be taken.
        warmup_steps: w, at least 0.
        total_steps: n, at least 1.
        schedule: how the rate falls after the warm-up.

    Returns:
        The factor, above 0.

    Raises:
        ValueError: the step is not one of 0 to ``total_steps - 1``, or the warm-up is negative.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step must be one of 0 to {total_steps - 1} (total_steps - 1), got {step}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be 0 or more, got {warmup_steps}")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    match schedule:
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return 1 - progress
        case "constant":
            return 1.0
