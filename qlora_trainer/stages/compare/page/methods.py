"""Every method beside every other: drawn by size and loss, as a table, and what failed or was left in 16 bit."""

from collections.abc import Callable

from qlora_trainer.pages.blocks import Block, Bullets, Chart, Grid, Section, Text
from qlora_trainer.pages.tables import DASH, Cell, Column, Table
from qlora_trainer.pages.wording import (
    METRIC_TITLES,
    duration,
    interval,
    metric,
    nats,
    percent,
    perplexity,
    signed_nats,
    significant,
    size,
)
from qlora_trainer.records import Comparison, ComparisonRow, Score
from qlora_trainer.stages.compare.methods import REFERENCE
from qlora_trainer.stages.compare.page.front import front_chart
from qlora_trainer.stages.compare.page.reading import (
    Bounds,
    layers_in_words,
    measured,
    metrics_of,
    reference,
    standing_of_the_chosen,
)

CAPTION = (
    "● on the front: no other method is both smaller and better; ○ the others; ▲ the 16-bit model. "
    "Vertical lines are intervals. The loss axis is even near zero and logarithmic beyond."
)


def methods(comparison: Comparison) -> Section:
    """The front, and the table."""
    bounds = Bounds.of(comparison)
    is_bound = bounds.added_nats is not None or bounds.bytes is not None
    allowed = " Dashed: what the recipe allows." if is_bound else ""
    told = (
        f"The {comparison.model} model on {comparison.test_rows:,} test rows, the same for all. Below a figure its "
        f"interval of {comparison.interval_words}, above 16 bit paired by row. In brackets: integers were "
        "dequantized before they were multiplied, so that speed and memory are not the method's own."
    )
    blocks: tuple[Block, ...] = (
        Chart(front_chart(comparison), f"◆ {standing_of_the_chosen(comparison)}; {CAPTION}{allowed}"),
        Text(told, is_soft=True),
        Grid(methods_table(comparison), "methods"),
    )
    return Section("methods", "Methods side by side", blocks)


def failed(comparison: Comparison) -> Section:
    """Methods without figures, and why."""
    lines = tuple(f"{row.method}: {row.failed}" for row in comparison.rows if row.failed is not None)
    told = Text("The next time these are tried again; all others are read back.", is_soft=True)
    return Section("failed", "Not measured", (Bullets(lines), told) if lines else ())


def explained(comparison: Comparison) -> Section:
    """What each method is, what it found, and which layers it left in 16 bit."""
    columns = tuple(
        Column(title, is_number=False) for title in ("Method", "What it does", "What it found", "Left in 16 bit")
    )
    rows = tuple(
        (Cell(row.method), Cell(row.what), Cell(row.note or DASH), Cell(layers_in_words(row.layers_16bit) or "none"))
        for row in comparison.rows
        if row.method != REFERENCE and row.failed is None
    )
    told = Text("Beside the layers that the recipe leaves out of every quantization, such as embeddings.", is_soft=True)
    blocks = (Grid(Table(columns, rows), "explained"), told) if rows else ()
    return Section(
        "explained", "What the methods do, and the layers they leave in 16 bit", blocks, short="What they do"
    )


def methods_table(comparison: Comparison) -> Table:
    """Every measured method, in the order of the recipe; the recommended one stands out."""
    metrics, rows = metrics_of(comparison), measured(comparison)
    quality = tuple(METRIC_TITLES.get(name, name) for name in metrics) or ("Perplexity",)
    titles = ("Loss, nats per token", "Above 16 bit", *quality, "KL to 16 bit, nats", "Size", "Peak memory")
    titles += ("Prefill tokens/s", "Decode tokens/s", "Quantizing")
    columns = (Column("Method", is_number=False), Column("Bits", is_number=False), *map(Column, titles))
    advice = comparison.recommendation
    marked = frozenset(
        number for number, row in enumerate(rows) if row.method == advice.method and advice.is_within_bounds
    )
    return Table(columns, tuple(_row(row, metrics, comparison) for row in rows), marked)


def _row(row: ComparisonRow, metrics: tuple[str, ...], comparison: Comparison) -> tuple[Cell, ...]:
    scores, base = row.metrics or {}, reference(comparison)
    task = [_metric(name, scores.get(name)) for name in metrics] or [_perplexity(row)]
    advice = comparison.recommendation
    is_chosen = row.method == advice.method and advice.is_within_bounds
    share = "" if row is base or not row.bytes or not base.bytes else percent(row.bytes / base.bytes, 0)
    return (
        Cell(row.method, _standing(row, comparison), tone="good" if is_chosen else "plain"),
        Cell(row.bits),
        _score(row.nats_per_token, nats),
        Cell(DASH) if row is base else _score(row.added_nats, signed_nats),
        *task,
        Cell(DASH if row is base or row.kl is None else significant(row.kl)),
        Cell(DASH if row.bytes is None else size(row.bytes), share),
        Cell(_own(row, DASH if row.peak_bytes is None else size(row.peak_bytes))),
        _speed(row, row.prefill_tokens_per_second),
        _speed(row, row.decode_tokens_per_second),
        Cell(duration(row.seconds) if row.seconds else DASH),
    )


def _standing(row: ComparisonRow, comparison: Comparison) -> str:
    """What is to be said of a row besides its figures."""
    bounds = Bounds.of(comparison)
    added = 0.0 if row.added_nats is None else row.added_nats.interval[1]
    parts = {
        standing_of_the_chosen(comparison): row.method == comparison.recommendation.method,
        "on the front": row.is_on_front,
        "adds too much": bounds.added_nats is not None and added > bounds.added_nats,
        "too large": bounds.bytes is not None and (row.bytes or 0) > bounds.bytes,
    }
    return ", ".join(part for part, is_so in parts.items() if is_so)


def _score(score: Score | None, show: Callable[[float], str]) -> Cell:
    return Cell(DASH) if score is None else Cell(show(score.value), interval(score.interval, show))


def _metric(name: str, score: Score | None) -> Cell:
    if score is None:
        return Cell(DASH)
    low, high = (metric(name, end).removesuffix(" %") for end in score.interval)
    return Cell(metric(name, score.value), f"{low} to {high}")


def _perplexity(row: ComparisonRow) -> Cell:
    return _score(row.nats_per_token, lambda loss: perplexity(loss, digits=4))


def _speed(row: ComparisonRow, value: float | None) -> Cell:
    return Cell(DASH) if value is None else Cell(_own(row, significant(value, 3)))


def _own(row: ComparisonRow, figure: str) -> str:
    """A figure of speed or memory, in brackets where it is not the method's own."""
    return f"({figure})" if row.is_simulated and figure != DASH else figure
