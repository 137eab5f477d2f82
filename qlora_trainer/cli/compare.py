"""The verb ``compare``: quantization methods side by side, one recommended."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_trainer.cli.screen import duration, make_console, printable, size, write
from qlora_trainer.records import Comparison, ComparisonRow, Score

SHORT_HELP = "Quantization methods side by side; one recommended."

HELP = """Quantization methods side by side on your model and task, and one recommended on figures.

Takes the trained model (made first where it is not there; compare.model: base takes the base as it is), quantizes it by
every method of compare.methods, and measures each on the same test rows: loss and task metrics with intervals, KL to 16
bit, bytes, peak memory, tokens per second, seconds. Writes compare.json and compare.md into the run folder. The
recommendation follows compare.prefer (quality, size, latency) within the recipe's bounds. A method that fails is
listed with the reason, and the comparison goes on; finished rows are read back the next time.

\b
Examples:
  qlora-trainer compare recipes/quickstart.yaml
  qlora-trainer compare recipes/quickstart.yaml --set compare.prefer=quality --set compare.most_added_nats=0.01"""

_NOTHING = "-"


def carry_out(path: Path, overrides: Sequence[str], *, trust_remote_code: bool) -> None:
    """Loads the recipe, compares, shows the table."""
    from qlora_trainer.cli.watching import watching  # noqa: PLC0415
    from qlora_trainer.recipe_file import load  # noqa: PLC0415

    began = time.monotonic()
    recipe = load(path, overrides)
    console = make_console()
    folder = Path(recipe.run.folder) / recipe.run.name
    write(console, f"{path} -> {folder}")
    from qlora_trainer import pipeline  # noqa: PLC0415

    with watching(console) as observer:
        found = pipeline.compare(recipe, observer=observer, trust_remote_code=trust_remote_code)
    show_comparison(console, found)
    write(console, f"\nTable: {folder / 'compare.md'}")
    write(console, f"Took {duration(time.monotonic() - began)}")


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
    write(console, f"Recommended: {found.recommendation.method}: {found.recommendation.why}.")


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
