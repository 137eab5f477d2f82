"""The report in a few sentences that a reader needs no glossary for."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_trainer.pages.wording import percent, significant
from qlora_trainer.recipe import Ladder
from qlora_trainer.records import Choice, ExportFigures, Gap, StageFigures
from qlora_trainer.stages.report.bars import shortfall
from qlora_trainer.stages.report.inputs import BASE, QUANTIZED, TRAINED, stage_of


@dataclass(frozen=True)
class Asked:
    """What the recipe asks for, as far as the sentence tells it.

    Attributes:
        base_bits: bits of a weight of the frozen base; 16 where nothing was quantized.
        ladder: what is asked of quantized files.
    """

    base_bits: int
    ladder: Ladder


def in_words(
    gap: Gap,
    *,
    stages: tuple[StageFigures, ...],
    exports: tuple[ExportFigures, ...],
    choice: Choice | None,
    asked: Asked,
) -> str:
    """What storing cost, what training won, what the recommended file keeps, and what must not be used.

    Args:
        gap: costs and gains in nats per token.
        stages: every measured stage, for exact match where it was measured.
        exports: every file, for those that are below their bar or not verified.
        choice: the recommended file.
        asked: what the recipe asks for.
    """
    by_name = {stage.name: stage for stage in stages}
    parts = (
        f"{_storing(gap, asked.base_bits)}; {_training(gap)}{_keeping(gap, exports, choice, asked.base_bits)}.",
        _exact(by_name, choice),
        _below_bar(exports, asked.ladder),
        _unverified(exports),
    )
    return " ".join(part for part in parts if part)


def _storing(gap: Gap, bits: int) -> str:
    low, high = gap.quantization_interval
    if bits >= 16:
        return "The base was not quantized"
    if low <= 0 <= high:
        return f"Storing the model in {bits} bits cost nothing that these test rows can show"
    if gap.quantization_nats < 0:
        gained = significant(-gap.quantization_nats)
        return f"Storing the model in {bits} bits happened to lower the loss by {gained} nats per token"
    return f"Storing the model in {bits} bits cost {significant(gap.quantization_nats)} nats per token"


def _training(gap: Gap) -> str:
    low, high = gap.learned_interval
    if high < 0:
        return f"training made the model worse on your task, by {significant(-gap.learned_nats)} nats per token"
    if low <= 0:
        return "training won nothing that these test rows can show"
    unit = " nats per token" if gap.quantization_interval[0] <= 0 <= gap.quantization_interval[1] else ""
    return f"training on your task won {significant(gap.learned_nats, 3)}{unit}"


def _keeping(gap: Gap, exports: tuple[ExportFigures, ...], choice: Choice | None, base_bits: int) -> str:
    if gap.learned_interval[0] <= 0 or not exports:
        return ""
    chosen = next((export for export in exports if choice is not None and export.format == choice.format), None)
    if chosen is None or chosen.gain_kept is None:
        return ", but no verified file is sure to keep as much of that as the recipe asks"
    return f", and {_name(chosen, base_bits)} keeps {percent(chosen.gain_kept)} of that"


def _name(export: ExportFigures, base_bits: int) -> str:
    if export.format == "peft_adapter":
        return f"the adapter beside its {'quantized' if base_bits < 16 else '16-bit'} base"
    return f"the {export.bits}-bit file ({export.format})"


def _exact(stages: Mapping[str, StageFigures], choice: Choice | None) -> str:
    """Exact matches before and after training, and of the recommended file."""
    before = _exact_match(stages, QUANTIZED, BASE)
    after = _exact_match(stages, TRAINED)
    if before is None or after is None:
        return ""
    text = f"Exactly right answers: {percent(before)} before training, {percent(after)} after"
    kept = None if choice is None else _exact_match(stages, stage_of(choice.format))
    return f"{text}." if kept is None else f"{text}, {percent(kept)} from the recommended file."


def _exact_match(stages: Mapping[str, StageFigures], *names: str) -> float | None:
    """The first of the named stages that has the metric."""
    found = (stages[name].metrics.get("exact_match") for name in names if name in stages)
    return next((value for value in found if value is not None), None)


def _below_bar(exports: tuple[ExportFigures, ...], ladder: Ladder) -> str:
    """One sentence for each verified file that is not as good as the recipe asks."""
    below = (export for export in exports if export.status == "below_bar")
    return " ".join(f"{export.format} is below the recipe's bar: {shortfall(export, ladder)}." for export in below)


def _unverified(exports: tuple[ExportFigures, ...]) -> str:
    names = [export.format for export in exports if not export.verified]
    if not names:
        return ""
    return (
        f"Do not use {' and '.join(names)}: loaded again by its runtime, "
        "what was written did not prove equal to what was meant to be written."
    )
