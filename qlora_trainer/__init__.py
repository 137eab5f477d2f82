"""QLoRA training from one recipe to verified int4 and int8 files.

The command line is ``qlora-trainer``. The same from Python, here on the recipe that comes with the repository:

    from qlora_trainer import check, load_recipe, run, talk

    recipe = load_recipe("recipes/quickstart.yaml", ["training.max_steps=100"])
    found = check(recipe)
    print(*found.problems)
    report = run(recipe)
    print(report.sentence)
    for export in report.exports:
        print(export.format, export.verified, export.gain_kept)
    model = talk(recipe)
    print(model.say("Book a table for two at seven"))

Names are imported when they are first asked for: ``load_recipe`` and ``check`` need no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_trainer.errors import TrainerError
    from qlora_trainer.pipeline import Sampling, Voice, talk
    from qlora_trainer.pipeline import run_whole as run
    from qlora_trainer.preflight import Preflight, check
    from qlora_trainer.recipe import (
        BaseModelSource,
        Calibration,
        Compare,
        Data,
        EvaluationPlan,
        Export,
        Ladder,
        Lora,
        Merge,
        Quantization,
        Recipe,
        Rounding,
        Run,
        Tracking,
        Training,
        Watchdog,
    )
    from qlora_trainer.recipe_file import dump as dump_recipe
    from qlora_trainer.recipe_file import load as load_recipe
    from qlora_trainer.records import RunReport

__version__ = "0.1.0"

__all__ = [
    "BaseModelSource",
    "Calibration",
    "Compare",
    "Data",
    "EvaluationPlan",
    "Export",
    "Ladder",
    "Lora",
    "Merge",
    "Preflight",
    "Quantization",
    "Recipe",
    "Rounding",
    "Run",
    "RunReport",
    "Sampling",
    "Tracking",
    "TrainerError",
    "Training",
    "Voice",
    "Watchdog",
    "check",
    "dump_recipe",
    "load_recipe",
    "run",
    "talk",
]

_PLACES = {
    "TrainerError": "errors",
    "Preflight": "preflight",
    "check": "preflight",
    "RunReport": "records",
    **dict.fromkeys(("Sampling", "Voice", "run", "talk"), "pipeline"),
    **dict.fromkeys(("dump_recipe", "load_recipe"), "recipe_file"),
}
"""Where a name comes from; sections of a recipe, which is the rest, from ``recipe``."""
_INNER = {"run": "run_whole", "dump_recipe": "dump", "load_recipe": "load"}
"""Names that are shorter inside."""


def __getattr__(name: str) -> object:
    """A public name, imported now; see PEP 562."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_PLACES.get(name, 'recipe')}")
    return vars(module)[_INNER.get(name, name)]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted((*globals(), *__all__))
