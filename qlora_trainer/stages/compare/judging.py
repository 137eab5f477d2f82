"""Rows out of measurements: what a method adds to the loss, which rows are on the front, which one to take."""

from collections.abc import Sequence
from dataclasses import replace

from qlora_trainer.numerics.bootstrap import Resampling, difference_interval
from qlora_trainer.recipe import Compare, CompareMethod
from qlora_trainer.records import ComparisonRow, Evaluation, Fidelity, Recommendation, Score
from qlora_trainer.stages.compare.methods import FACTS, REFERENCE

MIB = 2**20


def reference_row(evaluation: Evaluation, *, seconds: float) -> ComparisonRow:
    """The row of the 16-bit model."""
    zero = Score(0.0, (0.0, 0.0))
    row = ComparisonRow(REFERENCE, "the model as it is", 16, 16, added_nats=zero, kl=0.0, top1_agreement=1.0)
    return _measured(row, evaluation, seconds=seconds)


def method_row(
    method: CompareMethod,
    evaluation: Evaluation,
    fidelity: Fidelity,
    reference: Evaluation,
    *,
    resampling: Resampling,
    seconds: float,
    layers_16bit: tuple[str, ...],
    note: str,
) -> ComparisonRow:
    """The row of a method that was measured.

    Args:
        method: its name.
        evaluation: of its model.
        fidelity: of its model to the 16-bit one.
        reference: of the 16-bit model, on the same rows.
        resampling: of the paired interval.
        seconds: that quantizing took.
        layers_16bit: layers left in 16 bit.
        note: what the method found.
    """
    added = evaluation.nats_per_token.value - reference.nats_per_token.value
    interval = difference_interval(evaluation.row_nats, reference.row_nats, reference.row_labels, resampling=resampling)
    row = replace(
        empty_row(method),
        added_nats=Score(added, interval),
        kl=fidelity.kl_to_trained,
        top1_agreement=fidelity.top1_agreement,
        is_simulated=FACTS[method].stored_by == "grid",
        layers_16bit=layers_16bit,
        note=note,
    )
    return _measured(row, evaluation, seconds=seconds)


def failed_row(method: CompareMethod, error: BaseException) -> ComparisonRow:
    """The row of a method that could not be measured, with the reason in its first lines."""
    reason = str(error).strip() or type(error).__name__
    is_memory = (
        isinstance(error, MemoryError) or "out of memory" in reason.lower() or "can't allocate" in reason.lower()
    )
    return replace(empty_row(method), failed=f"out of memory: {reason}" if is_memory else reason)


def empty_row(method: CompareMethod) -> ComparisonRow:
    """A row without figures."""
    facts = FACTS[method]
    return ComparisonRow(method, facts.what, facts.weight_bits, facts.activation_bits, facts.kv_bits)


def with_front(rows: Sequence[ComparisonRow]) -> tuple[ComparisonRow, ...]:
    """The rows, with those marked that no other beats in bytes or loss without losing in the other (Pareto front)."""
    points = [(row.bytes, row.nats_per_token.value) for row in rows if row.bytes is not None and row.nats_per_token]

    def is_on_front(row: ComparisonRow) -> bool:
        if row.bytes is None or row.nats_per_token is None:
            return False
        own = (row.bytes, row.nats_per_token.value)
        return not any(size <= own[0] and nats <= own[1] and (size, nats) != own for size, nats in points)

    return tuple(replace(row, is_on_front=is_on_front(row)) for row in rows)


def recommend(rows: Sequence[ComparisonRow], settings: Compare) -> Recommendation:
    """The row that the recipe's preference chooses among those that meet its bounds, with the reason in a sentence.

    Preferring latency, rows whose integers were dequantized first do not count: their speed is not the method's.
    """
    measured = [row for row in rows if row.failed is None]
    reasons = {row.method: _why_not(row, settings) for row in measured}
    fitting = [row for row in measured if not reasons[row.method]]
    if not fitting:
        nearest = min(measured, key=lambda row: row.nats_per_token.value if row.nats_per_token else float("inf"))
        missed = "; ".join(f"{name} {why}" for name, why in reasons.items())
        return Recommendation(
            nearest.method,
            f"no method meets the recipe's bounds ({missed}), so the one of least loss is kept",
            is_within_bounds=False,
        )
    if settings.prefer == "latency":
        chosen = max(fitting, key=lambda row: row.decode_tokens_per_second or 0.0)
    elif settings.prefer == "quality":
        chosen = min(fitting, key=lambda row: (_nats(row), row.bytes or 0))
    else:
        chosen = min(fitting, key=lambda row: (row.bytes or 0, _nats(row)))
    return Recommendation(chosen.method, _sentence(chosen, measured, fitting, reasons, settings))


def _why_not(row: ComparisonRow, settings: Compare) -> str:
    """What a row misses, in words; empty where it meets every bound."""
    if row.method != REFERENCE and row.added_nats is not None and row.added_nats.interval[1] > settings.most_added_nats:
        return f"adds up to {row.added_nats.interval[1]:.4f} nats"
    if settings.most_mib is not None and (row.bytes or 0) > settings.most_mib * MIB:
        return f"takes {(row.bytes or 0) / MIB:.2f} MiB"
    speed = None if row.is_simulated else row.decode_tokens_per_second
    if settings.least_tokens_per_second is not None and (speed or 0.0) < settings.least_tokens_per_second:
        return "has no speed of its own here" if speed is None else f"gives {speed:.0f} tokens/s"
    if settings.prefer == "latency" and speed is None:
        return "has no speed of its own here"
    return ""


def _sentence(
    chosen: ComparisonRow,
    measured: Sequence[ComparisonRow],
    fitting: Sequence[ComparisonRow],
    reasons: dict[str, str],
    settings: Compare,
) -> str:
    what = {
        "size": "the smallest",
        "quality": "the one of least loss",
        "latency": "the fastest",
    }[settings.prefer]
    reference = next(row for row in measured if row.method == REFERENCE)
    share = f"{100 * (chosen.bytes or 0) / (reference.bytes or 1):.0f} % of the 16-bit size"
    added = chosen.added_nats or Score(0.0, (0.0, 0.0))
    figures = (
        f"{(chosen.bytes or 0) / MIB:.2f} MiB ({share}), {added.value:+.4f} nats "
        f"[{added.interval[0]:+.4f}, {added.interval[1]:+.4f}]"
    )
    if settings.prefer == "latency" and chosen.decode_tokens_per_second is not None:
        figures += f", {chosen.decode_tokens_per_second:.0f} tokens/s"
    smaller = [row for row in measured if reasons[row.method] and (row.bytes or 0) < (chosen.bytes or 0)]
    passed_over = ""
    if smaller and settings.prefer == "size":
        best = min(smaller, key=_nats)
        passed_over = f"; of {len(smaller)} smaller ones the best, {best.method}, {reasons[best.method]}"
    count = f"{len(fitting)} of {len(measured)} models that meet the bounds"
    return f"{what} of {count} (at most {settings.most_added_nats:g} nats added): {figures}{passed_over}"


def _nats(row: ComparisonRow) -> float:
    return row.nats_per_token.value if row.nats_per_token is not None else float("inf")


def _measured(row: ComparisonRow, evaluation: Evaluation, *, seconds: float) -> ComparisonRow:
    return replace(
        row,
        nats_per_token=evaluation.nats_per_token,
        metrics=dict(evaluation.metrics),
        bytes=evaluation.bytes,
        peak_bytes=evaluation.peak_bytes,
        prefill_tokens_per_second=evaluation.tokens_per_second,
        decode_tokens_per_second=evaluation.generated_tokens_per_second,
        seconds=seconds,
    )
