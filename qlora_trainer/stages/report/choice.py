"""Which exported file to recommend, and why in one sentence."""

from qlora_trainer.records import Choice, ExportFigures
from qlora_trainer.stages.report.wording import percent, share_of_gain, significant, size

BAR = 0.98
"""Share of the learned nats that the lower end of a file's interval must reach."""


def choose(exports: tuple[ExportFigures, ...]) -> Choice | None:
    """The smallest verified file that surely keeps the gain; None where no verified file does.

    Adapters and 16-bit files are recommended only where no quantized file qualifies. Where training won too
    little to divide by, the file nearest to the trained model is recommended instead.
    """
    verified = [export for export in exports if export.verified]
    quantized = [export for export in verified if is_quantized(export)]
    others = [export for export in verified if not is_quantized(export)]
    return _choose_among(quantized, verified) or _choose_among(others, verified)


def is_quantized(export: ExportFigures) -> bool:
    """Whether the file holds a whole model in fewer than 16 bits; an adapter is no whole model."""
    return export.bits < 16 and export.format != "peft_adapter"


def _choose_among(candidates: list[ExportFigures], verified: list[ExportFigures]) -> Choice | None:
    qualified = [export for export in candidates if export.interval is not None and export.interval[0] >= BAR]
    if qualified:
        smallest = min(qualified, key=lambda export: export.bytes)
        return Choice(smallest.format, _why_smallest(smallest, verified))
    if candidates and all(export.gain_kept is None for export in candidates):
        nearest = min(candidates, key=lambda export: export.kl_to_trained)
        return Choice(nearest.format, _why_nearest(nearest))
    return None


def _why_smallest(export: ExportFigures, verified: list[ExportFigures]) -> str:
    if is_quantized(export):
        return (
            f"The smallest verified file that keeps at least {percent(BAR, 0)} of what training won at the lower end "
            f"of its interval too: it keeps {_kept(export)} in {size(export.bytes)}."
        )
    rejected = [other for other in verified if is_quantized(other) and other.gain_kept is not None]
    if not rejected:
        return f"No verified quantized file was written; this one keeps {_kept(export)} in {size(export.bytes)}."
    best = max(rejected, key=lambda other: (other.interval or (0.0, 0.0))[0])
    return (
        f"No verified quantized file keeps {percent(BAR, 0)} of what training won at the lower end of its interval "
        f"(the best, {best.format}, keeps {_kept(best)}); this one keeps {_kept(export)} in {size(export.bytes)}."
    )


def _why_nearest(export: ExportFigures) -> str:
    return (
        "Training won too little to measure what a file keeps of it; this verified file is nearest to the trained "
        f"model: KL {significant(export.kl_to_trained)} nats, {size(export.bytes)}."
    )


def _kept(export: ExportFigures) -> str:
    return share_of_gain(export.gain_kept, export.interval)
