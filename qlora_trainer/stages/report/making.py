"""How each file was made: what was tried, what it gave on the validation rows, and what survived of the delta."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from qlora_trainer.pages.tables import DASH, Cell, Column, Table
from qlora_trainer.pages.wording import (
    count_of,
    duration,
    interval,
    nats,
    percent,
    signed_nats,
    significant,
    size,
)
from qlora_trainer.records import Attempt, ExportFigures, MergedModel
from qlora_trainer.stages.report.bars import bar_in_words
from qlora_trainer.stages.report.tables import WORST_LAYERS, gain_cell

SMALLEST_LOSS = 0.005
"""A layer that lost less of its delta is not named: the meter itself moves by about as much."""


@dataclass(frozen=True)
class Making:
    """How one file came to be.

    Attributes:
        format: name of the format.
        asked: what the recipe asks of it; empty where it sets no bar.
        attempts: everything that was tried, measured on the validation rows; no rows where there was no choice.
        remarks: why the climb ended, and layers that were treated otherwise than the rest; one sentence each.
    """

    format: str
    asked: str
    attempts: Table
    remarks: tuple[str, ...]


def makings(exports: Iterable[ExportFigures]) -> tuple[Making, ...]:
    """The making of each file that there is something to tell of."""
    made = (
        Making(export.format, _asked(export), attempts_table(export.attempts), tuple(_remarks(export)))
        for export in exports
    )
    return tuple(making for making in made if making.attempts.rows or making.remarks)


def attempts_table(attempts: tuple[Attempt, ...]) -> Table:
    """Every attempt in the order in which it was made."""
    titles = ("Loss, nats per token", "Gain kept", "KL to trained, nats", "Top-1 agreement", "Size", "Time")
    columns = (
        Column("Rung"),
        *(Column(title, is_number=False) for title in ("Method", "Merged into")),
        *map(Column, titles),
        *(Column(title, is_number=False) for title in ("Meets the bar", "Shipped")),
    )
    return Table(columns, tuple(_attempt_row(attempt) for attempt in attempts))


def survived_table(exports: Iterable[ExportFigures]) -> Table:
    """The dead-zone meter of each file in brief, with the layers that lost most."""
    titles = ("Layers", "Least", "Median", "Most")
    columns = (
        Column("Format", is_number=False),
        Column("Merged into", is_number=False),
        *map(Column, titles),
        Column("Layers that lost most", is_number=False),
    )
    return Table(columns, tuple(_survived_row(export) for export in exports if export.survived))


def merge_base_in_words(merged: MergedModel | None) -> str:
    """Which base the merged 16-bit file holds, and by how much it was the better one on the validation rows."""
    if merged is None:
        return ""
    others = {base: loss for base, loss in merged.validation_nats.items() if base != merged.into}
    if merged.into not in merged.validation_nats or not others:
        return f"The merged 16-bit file is the {merged.into} base with the adapter in it; no other base was tried."
    own = merged.validation_nats[merged.into]
    other = min(others, key=lambda base: others[base])
    return (
        f"The merged 16-bit file is the {merged.into} base with the adapter in it: {nats(own)} nats per token on the "
        f"validation rows, {nats(abs(others[other] - own))} {'less' if own <= others[other] else 'more'} than with the "
        f"{other} base ({nats(others[other])})."
    )


def _asked(export: ExportFigures) -> str:
    if export.bar is None:
        return ""
    if export.gain_kept is None:
        return (
            "Training won too little to divide by, so nearness to the trained model is asked for: KL, and the loss "
            "above the trained model's at the upper end of its interval (ladder.max_kl, ladder.max_loss_difference)."
        )
    return f"Asked for: {bar_in_words(export.bar)} of what training won, at the lower end of the interval."


def _remarks(export: ExportFigures) -> Iterable[str]:
    if export.why_ended is not None:
        yield f"Why it ended there: {export.why_ended.rstrip('.')}."
    if export.layers_raised:
        yield f"With more bits than the rest: {', '.join(export.layers_raised)}."
    if export.layers_16bit:
        yield f"Left in 16 bit, as the format cannot hold them: {', '.join(export.layers_16bit)}."


def _attempt_row(attempt: Attempt) -> tuple[Cell, ...]:
    met = Cell("✓ yes", tone="good") if attempt.meets_bar else Cell("✗ no", tone="warn")
    gain = gain_cell(attempt.gain_kept, attempt.interval)
    if attempt.gain_kept is None:
        gain = Cell(DASH, f"loss {interval(attempt.interval, signed_nats)} above trained")
    return (
        Cell(str(attempt.rung)),
        Cell(attempt.method),
        Cell(attempt.merged_into),
        Cell(nats(attempt.nats_per_token)),
        gain,
        Cell(significant(attempt.kl_to_trained)),
        Cell(percent(attempt.top1_agreement, 2)),
        Cell(size(attempt.bytes)),
        Cell(duration(attempt.seconds)),
        met,
        _shipped(attempt),
    )


def _shipped(attempt: Attempt) -> Cell:
    if not attempt.is_shipped:
        return Cell(DASH)
    return Cell("✓ shipped", tone="good") if attempt.meets_bar else Cell("shipped", "below the bar", tone="warn")


def _survived_row(export: ExportFigures) -> tuple[Cell, ...]:
    shares = export.survived
    lossy = [layer for layer, share in shares.items() if share < 1 - SMALLEST_LOSS]
    worst = sorted(lossy, key=lambda layer: shares[layer])[:WORST_LAYERS]
    return (
        Cell(export.format),
        Cell(export.merged_into or DASH),
        Cell(count_of(len(shares))),
        *(Cell(percent(share)) for share in (min(shares.values()), median(shares.values()), max(shares.values()))),
        Cell(", ".join(f"{layer} {percent(shares[layer])}" for layer in worst) or DASH),
    )
