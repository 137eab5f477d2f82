"""What training needs to choose a micro-batch by itself: what is open, what it would take, and what else must fit."""

from qlora_trainer.pipeline.ground import Ground
from qlora_trainer.pipeline.measuring import Measuring
from qlora_trainer.preflight import cuts, predict_peak_bytes
from qlora_trainer.recipe import Recipe
from qlora_trainer.stages.train import Fitting


def fitting_of(recipe: Recipe, ground: Ground, measuring: Measuring) -> Fitting | None:
    """None where the recipe leaves nothing open."""
    if not recipe.training.is_to_be_chosen:
        return None
    return Fitting(
        cuts=cuts(recipe),
        predict=lambda cut: predict_peak_bytes(recipe, ground.base, ground.rows, cut),
        evaluate=measuring.longest_batches,
    )
