"""The verb ``compare``: quantization methods side by side, one recommended."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_trainer.cli.voices import Voice

SHORT_HELP = "Quantization methods side by side; one recommended."

HELP = """Quantization methods side by side on your model and task, and one recommended on figures.

Takes the trained model (made first where it is not there; compare.model: base takes the base as it is), quantizes it by
every method of compare.methods, and measures each on the same test rows: loss and task metrics with intervals, KL to 16
bit, bytes, peak memory, tokens per second, seconds. Writes compare.html (one page, to be opened in a browser),
compare.md and compare.json into the run folder. The recommendation follows compare.prefer (quality, size, latency)
within the recipe's bounds. A method that fails is listed with the reason, and the comparison goes on; finished rows are
read back the next time.

\b
Examples:
  qlora-trainer compare recipes/quickstart.yaml
  qlora-trainer compare recipes/quickstart.yaml --set compare.prefer=quality --set compare.most_added_nats=0.01"""


def carry_out(path: Path, overrides: Sequence[str], *, command: str, trust_remote_code: bool, voice: "Voice") -> None:
    """Loads the recipe, compares, tells what was found.

    Args:
        path: of the recipe.
        overrides: settings that are changed.
        command: the whole command line, for the page.
        trust_remote_code: run code that comes with the model.
        voice: how to tell it.
    """
    from qlora_trainer.cli.voices import Compared  # noqa: PLC0415
    from qlora_trainer.recipe_file import load  # noqa: PLC0415
    from qlora_trainer.runtime.memory import PeakMemory  # noqa: PLC0415
    from qlora_trainer.runtime.progress import watched_by, working  # noqa: PLC0415

    began = time.monotonic()
    recipe = load(path, overrides)
    folder = Path(recipe.run.folder) / recipe.run.name
    voice.began(path, folder)
    with PeakMemory() as memory, voice.watching() as observer:
        # Here, after the recipe was found good: torch and its libraries take seconds.
        with watched_by(observer), working("loading libraries"):
            from qlora_trainer import pipeline  # noqa: PLC0415

        found = pipeline.compare(recipe, observer=observer, trust_remote_code=trust_remote_code, command=command)
    seconds, peak_bytes = time.monotonic() - began, memory.peak_bytes()
    voice.compared(Compared(found, folder, seconds=seconds, peak_bytes=peak_bytes))
