"""What quantization cost, what training won, and how much of that a file keeps: differences on the same rows."""

from collections.abc import Mapping

from qlora_trainer.numerics.bootstrap import Resampling, difference_interval, gain_kept_interval
from qlora_trainer.records import Evaluation, Gap, Interval
from qlora_trainer.stages.report.inputs import BASE, QUANTIZED, TRAINED

SMALLEST_GAP = 1e-4
"""Nats per token; a ratio to less than this says more about rounding than about training."""


NOT_QUANTIZED = "the base was not quantized, which has cost nothing"


def compute_gap(evaluations: Mapping[str, Evaluation], resampling: Resampling, *, start: str = QUANTIZED) -> Gap:
    """Costs and gains between the 16-bit base, the quantized base and the trained model.

    Args:
        evaluations: by stage name; holds at least the stages that the gap is taken between.
        resampling: how the paired intervals are drawn.
        start: the stage that training started from: the 16-bit base itself where nothing was quantized.

    Raises:
        ValueError: a stage is missing, or two stages were measured on different rows.
    """
    missing = [name for name in dict.fromkeys((BASE, start, TRAINED)) if name not in evaluations]
    if missing:
        raise ValueError(f"the gap is taken between measured stages; evaluate {', '.join(missing)} first")
    base, quantized, trained = (evaluations[name] for name in (BASE, start, TRAINED))
    cost, cost_interval = difference(quantized, base, resampling=resampling)
    learned, learned_interval = difference(quantized, trained, resampling=resampling)
    why_null = NOT_QUANTIZED if start == BASE else _why_not_divisible(cost, cost_interval)
    return Gap(
        quantization_nats=cost,
        quantization_interval=cost_interval,
        learned_nats=learned,
        learned_interval=learned_interval,
        recovered=learned / cost if why_null is None else None,
        why_null=why_null,
    )


def difference(first: Evaluation, second: Evaluation, *, resampling: Resampling) -> tuple[float, Interval]:
    """Nats per label token of ``first`` above ``second``, with its paired interval.

    Raises:
        ValueError: the two were measured on different rows.
    """
    _refuse_different_rows(first, second)
    interval = difference_interval(first.row_nats, second.row_nats, first.row_labels, resampling=resampling)
    return (sum(first.row_nats) - sum(second.row_nats)) / sum(first.row_labels), interval


def gain_kept(
    file: Evaluation, *, quantized: Evaluation, trained: Evaluation, resampling: Resampling
) -> tuple[float, Interval] | None:
    """Share of the learned nats that ``file`` keeps, ``(quantized - file) / (quantized - trained)``, with its interval.

    None where training won too little to divide by: the interval of ``quantized - trained`` reaches down to zero.

    Raises:
        ValueError: two of the three were measured on different rows.
    """
    _refuse_different_rows(file, quantized)
    _refuse_different_rows(trained, quantized)
    interval = gain_kept_interval(quantized.row_nats, file.row_nats, trained.row_nats, resampling=resampling)
    if interval is None:
        return None
    base = sum(quantized.row_nats)
    return (base - sum(file.row_nats)) / (base - sum(trained.row_nats)), interval


def why_no_gain(gap: Gap) -> str:
    """Why no share of the learned nats can be given, where ``gain_kept`` is None."""
    low, high = gap.learned_interval
    if high < 0:
        return f"training raised the loss by {-gap.learned_nats:.4f} nats per token: there is no gain to keep"
    return (
        f"the gain of training, {gap.learned_nats:.4f} nats per token, cannot be told from zero "
        f"on these rows (interval {low:.4f} to {high:.4f})"
    )


def _why_not_divisible(cost: float, interval: Interval) -> str | None:
    low, high = interval
    if low <= 0 <= high:
        return (
            f"the cost of quantization, {cost:.4f} nats per token, cannot be told from zero "
            f"on these rows (interval {low:.4f} to {high:.4f})"
        )
    if cost < SMALLEST_GAP:
        return f"the cost of quantization, {cost:.6f} nats per token, is below {SMALLEST_GAP:.4f}: nothing to divide by"
    return None


def _refuse_different_rows(first: Evaluation, second: Evaluation) -> None:
    if first.row_labels != second.row_labels:
        raise ValueError(
            f"{first.stage} was measured on {len(first.row_labels)} rows with {sum(first.row_labels)} label tokens, "
            f"{second.stage} on {len(second.row_labels)} rows with {sum(second.row_labels)}: "
            "figures are compared on the same rows only; evaluate both again"
        )
