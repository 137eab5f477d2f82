"""What the trackers are told of a run besides the metrics of its training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from qlora_trainer.pipeline.ground import Ground
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import Evaluation, ExportFigures, RunReport, TrainedAdapter
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.runtime.tracked_run import Artifact, Table, TrackingPlan, Value
from qlora_trainer.runtime.tracking import Tracker, require_trackers
from qlora_trainer.stages import dataset

OF_STAGE = ("nats_per_token", "low", "high", "kl_to_trained", "bytes", "tokens_per_second")
OF_EXPORT = ("gain_kept", "low", "high", "kl_to_trained", "bytes", "status")
OF_ATTEMPT = ("rung", "method", "merged_into", "nats_per_token", "gain_kept", "kl_to_trained", "is_shipped")


def tracking_plan(recipe: Recipe) -> TrackingPlan:
    """Who hears of a run of this recipe."""
    return TrackingPlan(
        **recipe.tracking.model_dump(exclude={"upload"}),
        config=recipe.model_dump(mode="json"),
    )


class Telling:
    """The tracker of one run, opened by the first stage that has something to tell.

    Raises:
        MissingPackageError: the recipe asks for a tracker that is not installed.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, ground: Ground) -> None:
        self.recipe, self.folder, self.ground = recipe, folder, ground
        self.plan = tracking_plan(recipe)
        require_trackers(tensorboard=recipe.tracking.tensorboard, trackio=recipe.tracking.trackio)

    @cached_property
    def tracker(self) -> Tracker:
        """Opened when it is first asked for: a run that repeats nothing tells nothing."""
        return Tracker(self.folder.root, self.plan)

    def end(self, *, in_a_hurry: bool = False) -> None:
        """Closes the tracker where one was opened."""
        if "tracker" in vars(self):
            self.tracker.finish(in_a_hurry=in_a_hurry)

    def report(self, made: RunReport, trained: TrainedAdapter, evaluations: Sequence[Evaluation]) -> None:
        """The report: figures, outputs and files as tables, the page, and what was used and made as artifacts."""
        self.tracker.summary(dict(_summary(made)))
        self.tracker.table("gap", _gap(made))
        self.tracker.table("exports", _exports(made))
        self.tracker.table("ladder", _ladder(made))
        self.tracker.table("samples", samples(evaluations))
        self.tracker.page("report", self.folder.report_html)
        sources = [self._base(), self._data()]
        identity = {source.name: source.identity for source in sources}
        made_here = [self._adapter(trained, identity), *(self._export(each, identity) for each in made.exports)]
        for artifact in (*sources, *made_here):
            self.tracker.artifact(artifact)

    def _base(self) -> Artifact:
        source = self.recipe.base_model
        name = source.name or Path(f"{source.path}").resolve().name
        at = f"/tree/{source.revision}" if source.revision else ""
        return Artifact(
            name=_artifact_name(f"base-{name}"),
            kind="model",
            identity={"name": name, "revision": source.revision, "content_sha256": self.ground.content_key},
            reference=None if source.name is None else f"https://huggingface.co/{source.name}{at}",
            is_input=True,
        )

    def _data(self) -> Artifact:
        rows = self.ground.rows
        # Where encoded rows are kept says nothing of them.
        given = self.recipe.data.model_dump(mode="json", exclude_unset=True, exclude={"cache_folder"})
        return Artifact(
            name=_artifact_name(f"data-{self.recipe.run.name}"),
            kind="dataset",
            identity={"recipe": given, "train_rows": len(rows.train), "tokens_sha256": dataset.token_fingerprint(rows)},
            is_input=True,
        )

    def _adapter(self, trained: TrainedAdapter, sources: Mapping[str, object]) -> Artifact:
        figures = {key: value for key, value in asdict(trained).items() if isinstance(value, int | float)}
        return Artifact(
            name=_artifact_name(f"{self.recipe.run.name}-adapter"),
            kind="model",
            identity={"figures": figures, "made_from": sources},
            folder=trained.folder if "adapter" in self.recipe.tracking.upload else None,
        )

    def _export(self, made: ExportFigures, sources: Mapping[str, object]) -> Artifact:
        return Artifact(
            name=_artifact_name(f"{self.recipe.run.name}-{made.format}"),
            kind="model",
            identity={
                "sha256": made.sha256,
                "bytes": made.bytes,
                "status": made.status,
                "runtime": made.runtime,
                "gain_kept": made.gain_kept,
                "kl_to_trained": made.kl_to_trained,
                "made_from": sources,
            },
            folder=Path(made.path) if "exports" in self.recipe.tracking.upload else None,
        )


def samples(evaluations: Sequence[Evaluation]) -> Table:
    """Prompts with what was wanted and what each stage answered, side by side."""
    answering = [each for each in evaluations if each.samples]
    columns = ("prompt", "reference", *(each.stage for each in answering))
    questions: dict[tuple[str, str], dict[str, str]] = {}
    for each in answering:
        for sample in each.samples:
            questions.setdefault((sample.prompt, sample.reference), {})[each.stage] = sample.output
    rows = [[*question, *(told.get(stage) for stage in columns[2:])] for question, told in questions.items()]
    return Table(columns, rows)


def _summary(made: RunReport) -> Iterator[tuple[str, Value]]:
    """Figures by which runs are compared and sweeps can choose."""
    for stage in made.stages:
        yield f"test/{stage.name}/nats_per_token", stage.nats_per_token
        yield from ((f"test/{stage.name}/{name}", value) for name, value in stage.metrics.items())
    yield "test/quantization_nats", made.gap.quantization_nats
    yield "test/learned_nats", made.gap.learned_nats
    for export in made.exports:
        yield f"exports/{export.format}/gain_kept", export.gain_kept
        yield f"exports/{export.format}/kl_to_trained", export.kl_to_trained
        yield f"exports/{export.format}/bytes", export.bytes
    yield "run/seconds", made.seconds
    yield "run/status", made.status


def _gap(made: RunReport) -> Table:
    rows = [
        (each.name, each.nats_per_token, *each.interval, each.kl_to_trained, each.bytes, each.tokens_per_second)
        for each in made.stages
    ]
    return Table(("stage", *OF_STAGE), rows, bars=("stage", "nats_per_token"))


def _exports(made: RunReport) -> Table:
    rows = [
        (each.format, each.gain_kept, *(each.interval or (None, None)), each.kl_to_trained, each.bytes, each.status)
        for each in made.exports
    ]
    return Table(("format", *OF_EXPORT), rows, bars=("format", "bytes"))


def _ladder(made: RunReport) -> Table:
    rows = [
        (file.format, *(getattr(attempt, name) for name in OF_ATTEMPT))
        for file in made.exports
        for attempt in file.attempts
    ]
    return Table(("format", *OF_ATTEMPT), rows)


def _artifact_name(text: str) -> str:
    """``text`` with only what trackers take in names of artifacts."""
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in text)[:120]
