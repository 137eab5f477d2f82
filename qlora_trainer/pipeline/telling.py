"""What the trackers are told of a run besides the metrics of its training."""

from functools import cached_property

from qlora_trainer.recipe import Recipe
from qlora_trainer.records import RunReport, TrainedAdapter
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.runtime.tracking import Tracker

OF_STAGE = ("nats_per_token", "low", "high", "kl_to_trained", "bytes", "tokens_per_second")
OF_ATTEMPT = ("rung", "method", "merged_into", "nats_per_token", "gain_kept", "kl_to_trained", "is_shipped")


class Telling:
    """The tracker of one run, opened by the first stage that has something to tell."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder

    @cached_property
    def tracker(self) -> Tracker:
        """Opened when it is first asked for: a run that repeats nothing tells nothing."""
        settings = self.recipe.tracking
        return Tracker(
            self.folder.root,
            wandb_mode=settings.wandb,
            project=settings.project,
            tags=settings.tags,
            config=self.recipe.model_dump(mode="json"),
        )

    def end(self, *, in_a_hurry: bool = False) -> None:
        """Closes the tracker where one was opened."""
        if "tracker" in vars(self):
            self.tracker.finish(in_a_hurry=in_a_hurry)

    def report(self, made: RunReport, trained: TrainedAdapter) -> None:
        """The figures of stages and files as tables, and the adapter as an artifact."""
        stages = [
            (each.name, each.nats_per_token, *each.interval, each.kl_to_trained, each.bytes, each.tokens_per_second)
            for each in made.stages
        ]
        attempts = [
            (file.format, *(getattr(attempt, name) for name in OF_ATTEMPT))
            for file in made.exports
            for attempt in file.attempts
        ]
        self.tracker.table("gap", ("stage", *OF_STAGE), stages)
        self.tracker.table("ladder", ("format", *OF_ATTEMPT), attempts)
        self.tracker.artifact("adapter", trained.folder, "adapter")
