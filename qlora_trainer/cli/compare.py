"""The verb ``compare``: quantization methods side by side, one recommended."""

import time
from collections.abc import Sequence
from pathlib import Path

from qlora_trainer.cli.screen import duration, make_console, write

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


def carry_out(path: Path, overrides: Sequence[str], *, trust_remote_code: bool) -> None:
    """Loads the recipe, compares, shows the table."""
    from qlora_trainer.cli.comparison import show_comparison  # noqa: PLC0415
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
