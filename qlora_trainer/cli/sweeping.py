"""One trial of a wandb sweep: the recipe with the trial's settings, in a run folder of its own."""

import os
from collections.abc import Sequence
from pathlib import Path

from qlora_trainer.cli.verbs import VERBS, Verb
from qlora_trainer.errors import RecipeError

SWEEP_SHORT_HELP = "Carry out one trial of a W&B sweep."

SWEEP_HELP = """One trial of a W&B sweep; `wandb agent` calls it, with the trial's settings as JSON.

Every setting of the trial is a --set: training.learning_rate, lora.rank and so on. The trial gets a run folder of its
own (run.name and the trial's id), its id at W&B, and the sweep's group; tracking.wandb becomes online where it is off.

\b
Example, recipes/sweeps/quickstart.yaml:
  wandb sweep recipes/sweeps/quickstart.yaml     prints the sweep's id
  wandb agent OWNER/PROJECT/ID                   calls this verb for one trial after the other"""


def verb_until(name: str) -> Verb:
    """The verb that ends after the stage ``name``.

    Raises:
        RecipeError: there is no such stage.
    """
    for verb in VERBS:
        if name == verb.name and name != "run":
            return verb
    stages = ", ".join(verb.name for verb in VERBS if verb.name != "run")
    raise RecipeError(f"--until {name}: there is no such stage. Choose one of {stages}")


def overrides_of(path: Path, trial: str, overrides: Sequence[str]) -> list[str]:
    """All overrides of the trial: what is given, the trial's settings, and its names.

    Raises:
        RecipeError: the recipe or the trial is wrong, or this is not a trial of a sweep.
    """
    from qlora_trainer.recipe_file import load, trial_overrides  # noqa: PLC0415

    run_id, sweep_id = os.environ.get("WANDB_RUN_ID"), os.environ.get("WANDB_SWEEP_ID")
    if not run_id or not sweep_id:
        raise RecipeError(
            "`sweep` is called by `wandb agent`, which sets WANDB_RUN_ID and WANDB_SWEEP_ID; neither "
            "is set. Start `wandb agent`, or use `run` with --set"
        )
    wanted = [*overrides, *trial_overrides(trial)]
    recipe = load(path, wanted)
    names = [f"run.name={recipe.run.name}-{run_id}", f"tracking.run_id={run_id!r}"]
    names += [] if recipe.tracking.group else [f"tracking.group=sweep-{sweep_id}"]
    names += ["tracking.wandb=online"] if recipe.tracking.wandb == "off" else []
    replaced = tuple(f"{name.partition('=')[0]}=" for name in names)
    return [*(text for text in wanted if not text.startswith(replaced)), *names]
