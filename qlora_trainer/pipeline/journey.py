"""One run of a recipe, stage after stage."""

from functools import cached_property
from pathlib import Path
from typing import Literal

from qlora_trainer.pipeline.adapted import AdaptedModel
from qlora_trainer.pipeline.ground import Ground, prepare
from qlora_trainer.pipeline.ledger import Ledger
from qlora_trainer.pipeline.measuring import Measured, MeasuredExport, Measuring
from qlora_trainer.preflight import predict_peak_bytes
from qlora_trainer.recipe import SHAPING_SECTIONS, Recipe
from qlora_trainer.records import Evaluation, MergedModel, QuantizedModel, RunReport, TrainedAdapter
from qlora_trainer.runtime.device import seed_everything, set_threads
from qlora_trainer.runtime.progress import Observer, Silent
from qlora_trainer.runtime.run_folder import RunFolder, fingerprint
from qlora_trainer.runtime.run_log import logged_to
from qlora_trainer.runtime.tracking import Tracker
from qlora_trainer.stages import dataset, evaluate, export, merge, quantize, report, train
from qlora_trainer.stages.evaluate import Subject, Teacher
from qlora_trainer.stages.merge import MergeSource
from qlora_trainer.stages.train import TrainingInputs

Until = Literal["quantize", "train", "evaluate", "merge", "export", "report"]


def run(
    recipe: Recipe, *, until: Until = "report", observer: Observer | None = None, trust_remote_code: bool = False
) -> RunReport | None:
    """Carries a recipe from the base model to the report, or to the end of the stage named by ``until``.

    Args:
        recipe: what to do.
        until: the last stage to carry out.
        observer: told of everything that happens.
        trust_remote_code: allow Python code that comes with the model; never part of a recipe.

    Returns:
        The report, or None where ``until`` ends before it.

    Raises:
        TrainerError: see ``errors``; whatever was finished stays and is not repeated.
    """
    set_threads(recipe.run.threads)
    seed_everything(recipe.run.seed)
    ground = prepare(recipe, trust_remote_code=trust_remote_code)
    root = Path(recipe.run.folder) / recipe.run.name
    with (
        RunFolder.open(root, recipe.model_dump(mode="json"), shaping=SHAPING_SECTIONS) as folder,
        logged_to(folder.log),
    ):
        journey = Journey(recipe, ground, folder, observer or Silent(), trust_remote_code=trust_remote_code)
        try:
            return journey.travel(until)
        finally:
            journey.end_tracking()


class Journey:
    """The stages of one run. Each method gives its stage's record, made now or read back."""

    def __init__(
        self, recipe: Recipe, ground: Ground, folder: RunFolder, observer: Observer, *, trust_remote_code: bool
    ) -> None:
        self.recipe, self.ground, self.folder, self.observer = recipe, ground, folder, observer
        self.trust_remote_code = trust_remote_code
        self.ledger = Ledger(folder, observer)
        self.measuring = Measuring(recipe, ground, folder=folder, ledger=self.ledger)

    def travel(self, until: Until) -> RunReport | None:
        """All stages in order, up to and including ``until``."""
        if until == "quantize":
            self.quantize()
            return None
        base = self.measure_base()
        quantized = self.quantize()
        adapted = AdaptedModel(self.recipe, self.ground, quantized, trust_remote_code=self.trust_remote_code)
        start = self.measure_quantized(quantized, adapted)
        trained = self.train(quantized, adapted)
        if until == "train":
            return None
        unmerged = self.measure_trained(quantized, trained, adapted)
        if until == "evaluate":
            return None
        teacher = self.teacher(quantized, trained, adapted)
        adapted.forget()
        source = self.merge_source(quantized, trained)
        merged = self.merge(source, quantized)
        whole = self.measure_merged(merged, quantized, teacher)
        if until == "merge":
            return None
        exports = self.export(source, merged, quantized, trained, teacher)
        if until == "export":
            return None
        return self.report(trained, quantized, (base, start, unmerged), whole, exports)

    # Keys: each names everything that a result depends on.

    def training_key(self, quantized: QuantizedModel) -> str:
        """Fingerprint of all that the trained adapter depends on."""
        recipe = self.recipe
        return fingerprint(
            quantized.key,
            dataset.token_fingerprint(self.ground.rows),
            recipe.lora.model_dump(mode="json"),
            recipe.training.model_dump(mode="json"),
            recipe.run.seed,
        )

    def merge_key(self, quantized: QuantizedModel) -> str:
        """Fingerprint of all that the merged model depends on."""
        return fingerprint(self.training_key(quantized), self.recipe.merge.model_dump(mode="json"))

    # Stages.

    def quantize(self) -> QuantizedModel:
        """The quantized base; the cache that all runs share is its record."""
        return self.ledger.timed(
            "quantize",
            lambda: quantize.quantize(
                self.ground.base,
                self.recipe.quantization,
                lora=self.recipe.lora,
                layers=self.ground.layers,
                content_key=self.ground.content_key,
            ),
            describe=lambda record: (
                f"{len(record.layers)} layers at {record.bits_per_parameter:.3f} bits per parameter",
                record.reused,
            ),
        )

    def train(self, quantized: QuantizedModel, adapted: AdaptedModel) -> TrainedAdapter:
        """The trained adapter, from the newest checkpoint where the run was interrupted."""
        key = self.training_key(quantized)

        def carry_out() -> TrainedAdapter:
            trained = train.train(adapted.fresh(), self.recipe, self._training_inputs(key, quantized))
            adapted.became_trained(trained.folder)
            return trained

        return self.ledger.once(
            "train",
            key,
            TrainedAdapter,
            make=carry_out,
            describe=lambda record: (
                f"{record.steps} steps, validation {record.final_nats_per_token:.4f} nats/token, "
                f"{record.label_tokens_per_second:,.0f} label tokens/s"
            ),
        )

    def merge_source(self, quantized: QuantizedModel, trained: TrainedAdapter) -> MergeSource:
        """Where merged weights come from; reads the adapter's file, no base."""
        return merge.merge_source(
            self.recipe, base=self.ground.base, quantized=quantized, layers=self.ground.layers, adapter=trained.folder
        )

    def merge(self, source: MergeSource, quantized: QuantizedModel) -> MergedModel:
        """The merged 16-bit folder."""
        data_type = self.recipe.merge.data_type

        def carry_out() -> MergedModel:
            needed = self.ground.base.parameters * (4 if data_type == "float32" else 2)
            self.folder.require_free_disk(needed, "the merged model")
            return merge.merge(source, self.folder.merged, data_type=data_type)

        return self.ledger.once(
            "merge",
            self.merge_key(quantized),
            MergedModel,
            make=carry_out,
            describe=lambda record: f"into the {record.into} base, {record.bytes / 2**20:.1f} MiB",
        )

    def export(
        self,
        source: MergeSource,
        merged: MergedModel,
        quantized: QuantizedModel,
        trained: TrainedAdapter,
        teacher: Teacher,
    ) -> tuple[MeasuredExport, ...]:
        """Every file that the recipe asks for."""
        inputs = export.ExportInputs(
            base=self.ground.base.folder,
            adapter_base=quantized.folder,
            adapter=trained.folder,
            merged=merged.folder,
            weights=source.weights,
            layers=self.ground.layers,
            compute_dtype=self.recipe.quantization.compute_dtype,
            data_type=self.recipe.merge.data_type,
            trust_remote_code=self.trust_remote_code,
        )
        key = self.merge_key(quantized)
        names = self.recipe.export.formats
        return tuple(self.measuring.export(name, key, inputs=inputs, teacher=teacher) for name in names)

    def report(
        self,
        trained: TrainedAdapter,
        quantized: QuantizedModel,
        before: tuple[Evaluation, ...],
        merged: Measured,
        exports: tuple[MeasuredExport, ...],
    ) -> RunReport:
        """report.json, report.md and report.html; also tells the tracker."""
        rows = self.ground.rows
        measured: tuple[Measured | MeasuredExport, ...] = (merged, *exports)
        measurements = report.Measurements(
            evaluations=(*before, *(each.evaluation for each in measured)),
            fidelity={each.evaluation.stage: each.fidelity for each in measured},
            exports=tuple(each.exported for each in exports),
            trained=trained,
            quantized=quantized,
        )
        made = report.make(
            self.recipe,
            measurements,
            folder=self.folder,
            seconds=self.ledger.seconds,
            rows=report.RowsInBrief(
                notes=rows.notes,
                audit=dataset.audit_lines(rows.audit),
                example=tuple(dataset.render_example(rows.tokenizer, rows.train[0])),
            ),
        )
        if self.ledger.did_work:
            self._track(made, trained)
        return made

    # Measurements.

    def measure_base(self) -> Evaluation:
        """The 16-bit base on the test rows."""
        base, dtype = self.ground.base, self.recipe.quantization.compute_dtype
        return self.measuring.stage(
            Subject("base_16bit", export.RUNTIME, base.bytes),
            self.ground.content_key,
            lambda: evaluate.open_model(base.folder, dtype, trust_remote_code=self.trust_remote_code),
        )

    def measure_quantized(self, quantized: QuantizedModel, adapted: AdaptedModel) -> Evaluation:
        """The function that training starts from: the quantized base, with first factors where the recipe has them."""
        subject = Subject("quantized_base", export.RUNTIME, quantized.bytes)
        return self.measuring.stage(subject, quantized.key, adapted.fresh)

    def measure_trained(self, quantized: QuantizedModel, trained: TrainedAdapter, adapted: AdaptedModel) -> Evaluation:
        """Base and adapter, unmerged: the function that was trained."""
        size = quantized.bytes + sum(path.stat().st_size for path in trained.folder.glob("*.safetensors"))
        subject = Subject("adapter_unmerged", export.RUNTIME, size)
        return self.measuring.stage(subject, self.training_key(quantized), lambda: adapted.trained(trained.folder))

    def teacher(self, quantized: QuantizedModel, trained: TrainedAdapter, adapted: AdaptedModel) -> Teacher:
        """What every file is compared with."""
        return self.measuring.teacher(self.training_key(quantized), lambda: adapted.trained(trained.folder))

    def measure_merged(self, merged: MergedModel, quantized: QuantizedModel, teacher: Teacher) -> Measured:
        """The merged 16-bit model on the test rows."""
        dtype = self.recipe.quantization.compute_dtype
        return self.measuring.compared(
            Subject("merged_16bit", export.RUNTIME, merged.bytes),
            self.merge_key(quantized),
            lambda: evaluate.open_model(merged.folder, dtype, trust_remote_code=self.trust_remote_code),
            teacher,
        )

    # Tracking.

    @cached_property
    def tracker(self) -> Tracker:
        """Opened by the first stage that has something to tell."""
        settings = self.recipe.tracking
        return Tracker(
            self.folder.root,
            wandb_mode=settings.wandb,
            project=settings.project,
            tags=settings.tags,
            config=self.recipe.model_dump(mode="json"),
        )

    def end_tracking(self) -> None:
        """Closes the tracker where one was opened."""
        if "tracker" in vars(self):
            self.tracker.finish()

    def _track(self, made: RunReport, trained: TrainedAdapter) -> None:
        columns = ("stage", "nats_per_token", "low", "high", "kl_to_trained", "bytes", "tokens_per_second")
        stages = made.stages
        self.tracker.table(
            "gap",
            columns,
            [
                (each.name, each.nats_per_token, *each.interval, each.kl_to_trained, each.bytes, each.tokens_per_second)
                for each in stages
            ],
        )
        self.tracker.artifact("adapter", trained.folder, "adapter")

    def _training_inputs(self, key: str, quantized: QuantizedModel) -> TrainingInputs:
        rows = self.ground.rows
        original = self.recipe.base_model.name or str(self.ground.base.folder)
        # PiSSA takes the principal part out of the base before quantizing: the adapter belongs on what was left.
        base_name = str(quantized.folder) if self.recipe.lora.init == "pissa" else original
        return TrainingInputs(
            rows=rows.train,
            pad_id=rows.pad_id,
            checkpoints=self.folder.checkpoints,
            adapter=self.folder.adapter,
            base_name=base_name,
            recipe_key=key,
            predicted_peak_bytes=predict_peak_bytes(self.recipe, self.ground.base, rows),
            validate=self.measuring.validation_nats,
            tracker=self.tracker,
            observer=self.observer,
        )
