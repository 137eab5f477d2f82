"""The whole way in one call, for Python."""

from qlora_trainer.pipeline.journey import run
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import RunReport
from qlora_trainer.runtime.progress import Observer


def run_whole(recipe: Recipe, *, observer: Observer | None = None, trust_remote_code: bool = False) -> RunReport:
    """Carries a recipe from the base model to the report; the command ``run`` in one call.

    What was finished before with the same settings is read back, not repeated.

    Args:
        recipe: what to do.
        observer: told of everything that happens.
        trust_remote_code: allow Python code that comes with the model; never part of a recipe.

    Raises:
        TrainerError: see ``errors``; whatever was finished stays.
    """
    report = run(recipe, until="report", observer=observer, trust_remote_code=trust_remote_code)
    if report is None:
        raise AssertionError("a run up to its report gives the report")
    return report
