"""Shows what ``compare`` found."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_trainer.cli.screen import printable, size, write
from qlora_trainer.records import Comparison, ComparisonRow, Score

_NOTHING = "-"


def show_comparison(console: Console, found: Comparison) -> None:
    """Prints the table, what failed, and the recommendation."""
    metrics = list(dict.fromkeys(name for row in found.rows for name in row.metrics or {}))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in ("bits", "nats/token", "above 16 bit", *metrics, "KL", "size", "decode tok/s", "seconds"):
        table.add_column(name, justify="right")
    for row in found.rows:
        if row.failed is None:
            cells = _cells(row, metrics)
            table.add_row(*(Text(printable(cell)) for cell in cells), style="bold" if row.is_on_front else "")
    console.print(table)
    for row in found.rows:
        if row.failed is not None:
            write(console, f"{row.method}: not measured: {row.failed}", style="yellow")
    write(console, "bold or *: no other method is both smaller and better. In brackets: dequantized before use.")
    standing = "Recommended" if found.recommendation.is_within_bounds else "Of least loss"
    write(console, f"{standing}: {found.recommendation.method}: {found.recommendation.why}.")


def _cells(row: ComparisonRow, metrics: Sequence[str]) -> list[str]:
    scores = row.metrics or {}
    speed = _NOTHING if row.decode_tokens_per_second is None else f"{row.decode_tokens_per_second:,.0f}"
    return [
        f"{row.method}{' *' if row.is_on_front else ''}",
        row.bits,
        _score(row.nats_per_token, "{:.4f}"),
        _score(row.added_nats, "{:+.4f}"),
        *(_score(scores.get(name), "{:.3g}") for name in metrics),
        _NOTHING if row.kl is None else f"{row.kl:.5f}",
        _NOTHING if row.bytes is None else size(row.bytes),
        f"({speed})" if row.is_simulated else speed,
        _NOTHING if row.seconds is None else f"{row.seconds:.1f}",
    ]


def _score(score: Score | None, pattern: str) -> str:
    if score is None:
        return _NOTHING
    low, high = (pattern.format(end) for end in score.interval)
    return f"{pattern.format(score.value)} [{low}, {high}]"
