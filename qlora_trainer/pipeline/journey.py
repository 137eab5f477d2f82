"""One run of a recipe, stage after stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from qlora_trainer.errors import Interrupted
from qlora_trainer.export_formats import merge_bases
from qlora_trainer.pipeline.adapted import AdaptedModel
from qlora_trainer.pipeline.climbing import Climbing
from qlora_trainer.pipeline.fitting import fitting_of
from qlora_trainer.pipeline.ground import Ground, prepare
from qlora_trainer.pipeline.ledger import Ledger
from qlora_trainer.pipeline.measuring import Measured, MeasuredExport, Measuring, ValidationReferences
from qlora_trainer.pipeline.quantizing import quantized_base
from qlora_trainer.pipeline.task_file import read_rows
from qlora_trainer.pipeline.telling import Telling
from qlora_trainer.preflight import predict_peak_bytes
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import Evaluation, MergedModel, QuantizedModel, RunReport, TrainedAdapter
from qlora_trainer.runtime.device import seed_everything, set_threads
from qlora_trainer.runtime.interruption import terminable
from qlora_trainer.runtime.progress import Observer, Silent, watched_by, working
from qlora_trainer.runtime.run_folder import RunFolder, fingerprint
from qlora_trainer.runtime.run_log import logged_to
from qlora_trainer.stages import dataset, evaluate, export, merge, quantize, report, train
from qlora_trainer.stages.evaluate import Subject, Teacher
from qlora_trainer.stages.export import ExportInputs, HeldOut
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
        TrainerError: see ``errors``; whatever was finished stays and is not repeated. SIGTERM is such an error too.
    """
    with setting_out(recipe, observer=observer, trust_remote_code=trust_remote_code) as journey:
        return journey.travel(until)


@contextmanager
def setting_out(
    recipe: Recipe, *, observer: Observer | None = None, trust_remote_code: bool = False
) -> Iterator["Journey"]:
    """A journey whose folder is claimed, and whose observer, log and trackers are told, for as long as the block lasts.

    Raises:
        TrainerError: the recipe's base or rows cannot be used, or the folder belongs to another recipe.
    """
    set_threads(recipe.run.threads)
    seed_everything(recipe.run.seed)
    told = observer or Silent()
    with watched_by(told), working("reading the base and the rows"):
        ground = prepare(recipe, trust_remote_code=trust_remote_code)
    root = Path(recipe.run.folder) / recipe.run.name
    with (
        terminable(),
        watched_by(told),
        RunFolder.open(root, recipe.model_dump(mode="json"), shaping=recipe.shaping) as folder,
        logged_to(folder.log),
    ):
        journey = Journey(recipe, ground, folder, told, trust_remote_code=trust_remote_code)
        try:
            yield journey
        except (Interrupted, KeyboardInterrupt):
            journey.telling.end(in_a_hurry=True)
            raise
        finally:
            journey.telling.end()


class Journey:
    """The stages of one run. Each method gives its stage's record, made now or read back."""

    def __init__(
        self, recipe: Recipe, ground: Ground, folder: RunFolder, observer: Observer, *, trust_remote_code: bool
    ) -> None:
        self.recipe, self.ground, self.folder, self.observer = recipe, ground, folder, observer
        self.trust_remote_code = trust_remote_code
        self.ledger = Ledger(folder, observer)
        self.telling = Telling(recipe, folder, ground)
        self.measuring = Measuring(recipe, ground, folder=folder, ledger=self.ledger)

    def travel(self, until: Until) -> RunReport | None:
        """All stages in order, up to and including ``until``."""
        if until == "quantize":
            self.quantize()
            return None
        base = self.measure_base()
        quantized = self.quantize()
        adapted = AdaptedModel(self.recipe, self.ground, quantized, trust_remote_code=self.trust_remote_code)
        before = (base, *self.measure_quantized(quantized, adapted))
        start_rows = self.measuring.held_out(before[-1].stage, quantized.key, adapted.fresh)
        trained = self.train(quantized, adapted)
        if until == "train":
            return None
        unmerged = self.measure_trained(quantized, trained, adapted)
        if until == "evaluate":
            return None
        teacher = self.teacher(quantized, trained, adapted)
        references = self.references(quantized, trained, adapted, start_rows)
        adapted.forget()
        source = self.merge_source(quantized, trained)
        merged = self.merge(source, quantized)
        whole = self.measure_merged(merged, quantized, teacher)
        if until == "merge":
            return None
        exports = self.export(source, merged, quantized, trained, teacher, references)
        if until == "export":
            return None
        return self.report(trained, quantized, merged, (*before, unmerged), whole, exports)

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
            lambda: quantized_base(
                self.recipe,
                self.ground.base,
                layers=self.ground.layers,
                content_key=self.ground.content_key,
                rows=lambda: self.ground.rows,
                trust_remote_code=self.trust_remote_code,
            ),
            describe=lambda record: (
                f"{len(record.layers)} layers at {record.bits_per_parameter:.3f} bits per parameter"
                if record.layers
                else "nothing is quantized: quantization.data_type is none",
                record.reused,
            ),
        )

    def train(self, quantized: QuantizedModel, adapted: AdaptedModel) -> TrainedAdapter:
        """The trained adapter, from the newest checkpoint where the run was interrupted."""
        key = self.training_key(quantized)

        def carry_out() -> TrainedAdapter:
            trained = train.train(adapted.fresh(), self.recipe, self.training_inputs(key, quantized))
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
            self.recipe,
            base=self.ground.base,
            quantized=quantized,
            weight_format=quantize.weight_format_of(self.recipe.quantization),
            layers=self.ground.layers,
            adapter=trained.folder,
        )

    def merge(self, source: MergeSource, quantized: QuantizedModel) -> MergedModel:
        """The merged 16-bit folder, into the base that does better on the validation rows."""
        data_type = self.recipe.merge.data_type
        dtype = self.recipe.quantization.compute_dtype

        def nats_of(folder: Path) -> float:
            return self.measuring.validation_nats(
                evaluate.open_model(folder, dtype, trust_remote_code=self.trust_remote_code)
            )

        def carry_out() -> MergedModel:
            bases = merge_bases(self.recipe)
            needed = self.ground.base.parameters * (4 if data_type == "float32" else 2) * len(bases)
            self.folder.require_free_disk(needed, "the merged model")
            return merge.merge_measured(source, self.folder.merged, bases=bases, data_type=data_type, nats_of=nats_of)

        return self.ledger.once(
            "merge",
            fingerprint(self.merge_key(quantized), self.ground.bench_key),
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
        references: ValidationReferences,
    ) -> tuple[MeasuredExport, ...]:
        """Every file that the recipe asks for."""
        climbing = Climbing(
            self.recipe,
            self.measuring,
            folder=self.folder,
            ledger=self.ledger,
            inputs=self.export_inputs(source, merged, quantized, trained),
            bases=merge_bases(self.recipe),
            key=fingerprint(self.merge_key(quantized), merged.into),
            references=references,
        )
        made = tuple(climbing.file(name, teacher) for name in self.recipe.export.formats)
        climbing.tidy()
        return made

    def export_inputs(
        self, source: MergeSource, merged: MergedModel, quantized: QuantizedModel, trained: TrainedAdapter
    ) -> ExportInputs:
        """What files are made from."""
        recipe, rows = self.recipe, self.ground.rows
        return ExportInputs(
            base=self.ground.base.folder,
            adapter_base=quantized.folder,
            adapter=trained.folder,
            merged=merged.folder,
            merged_into="original" if merged.into == "original" else "dequantized",
            weights=lambda into, wanted=None, on_merged=None: source.with_base(into).weights(on_merged, wanted),
            base_weights=lambda into: source.with_base(into).base_weights(),
            factors=export.AdapterFactors(
                lora_a={module: each.lora_a for module, each in source.factors.items()},
                lora_b={module: each.lora_b for module, each in source.factors.items()},
                scale=source.scale,
                has_magnitudes=recipe.lora.use_dora,
            ),
            layers=self.ground.layers,
            data=export.TaskData(
                rows=rows.train,
                pad_id=rows.pad_id,
                stop_ids=rows.stop_ids,
                tokenizer=rows.tokenizer,
                seed=recipe.run.seed,
                learning_rate=recipe.training.learning_rate,
                steps=trained.steps,
                batch_size=recipe.training.batch_size,
            ),
            calibration=recipe.calibration,
            rounding=recipe.rounding,
            compute_dtype=recipe.quantization.compute_dtype,
            data_type=recipe.merge.data_type,
            window=recipe.data.window + recipe.evaluation.max_new_tokens,
            threads=recipe.run.threads,
            allow_16bit_layers=recipe.export.allow_16bit_layers,
            trust_remote_code=self.trust_remote_code,
        )

    def report(
        self,
        trained: TrainedAdapter,
        quantized: QuantizedModel,
        merged: MergedModel,
        before: tuple[Evaluation, ...],
        whole: Measured,
        exports: tuple[MeasuredExport, ...],
    ) -> RunReport:
        """report.json, report.md and report.html; also tells the tracker."""
        rows = self.ground.rows
        measured: tuple[Measured | MeasuredExport, ...] = (whole, *exports)
        measurements = report.Measurements(
            evaluations=(*before, *(each.evaluation for each in measured)),
            fidelity={each.evaluation.stage: each.fidelity for each in measured},
            exports=tuple(each.exported for each in exports),
            trained=trained,
            quantized=quantized,
            merged=merged,
        )
        made = report.make(
            self.recipe,
            measurements,
            folder=self.folder,
            seconds=self.ledger.seconds,
            rows=report.RowsInBrief(
                notes=rows.notes,
                audit=dataset.audit_lines(rows),
                example=tuple(dataset.render_example(rows.tokenizer, rows.train[0])),
            ),
            tasks=read_rows(self.folder.tasks_json),
        )
        base = report.base_facts(self.recipe, self.ground.base.folder)
        report.write_cards(self.recipe, made, base, adapter=trained.folder)
        if self.ledger.did_work:
            self.telling.report(made, trained, measurements.evaluations)
        return made

    # Measurements.

    def measure_base(self) -> Evaluation:
        """The 16-bit base on the test rows."""
        base, dtype = self.ground.base, self.recipe.quantization.compute_dtype
        return self.measuring.stage(
            Subject("base_16bit", export.BASE_RUNTIME, base.bytes),
            self.ground.content_key,
            lambda: evaluate.open_model(base.folder, dtype, trust_remote_code=self.trust_remote_code),
        )

    def measure_quantized(self, quantized: QuantizedModel, adapted: AdaptedModel) -> tuple[Evaluation, ...]:
        """The function that training starts from: the quantized base, with first factors where the recipe has them.

        Nothing where the recipe quantizes none: training starts from the 16-bit base, which was measured.
        """
        if self.recipe.quantization.data_type == "none":
            return ()
        subject = Subject("quantized_base", export.BASE_RUNTIME, quantized.bytes)
        return (self.measuring.stage(subject, quantized.key, adapted.fresh),)

    def measure_trained(self, quantized: QuantizedModel, trained: TrainedAdapter, adapted: AdaptedModel) -> Evaluation:
        """Base and adapter, unmerged: the function that was trained."""
        size = quantized.bytes + sum(path.stat().st_size for path in trained.folder.glob("*.safetensors"))
        subject = Subject("adapter_unmerged", export.BASE_RUNTIME, size)
        return self.measuring.stage(subject, self.training_key(quantized), lambda: adapted.trained(trained.folder))

    def teacher(self, quantized: QuantizedModel, trained: TrainedAdapter, adapted: AdaptedModel) -> Teacher:
        """What every file is compared with."""
        return self.measuring.teacher(self.training_key(quantized), lambda: adapted.trained(trained.folder))

    def references(
        self, quantized: QuantizedModel, trained: TrainedAdapter, adapted: AdaptedModel, start: HeldOut
    ) -> ValidationReferences:
        """What attempts at a file are measured against on the validation rows."""
        key = self.training_key(quantized)
        return ValidationReferences(
            quantized=start,
            trained=self.measuring.held_out("adapter_unmerged", key, lambda: adapted.trained(trained.folder)),
            teacher=self.measuring.validation_teacher(key, lambda: adapted.trained(trained.folder)),
        )

    def measure_merged(self, merged: MergedModel, quantized: QuantizedModel, teacher: Teacher) -> Measured:
        """The merged 16-bit model on the test rows."""
        dtype = self.recipe.quantization.compute_dtype
        return self.measuring.compared(
            Subject("merged_16bit", export.BASE_RUNTIME, merged.bytes),
            self.merge_key(quantized),
            lambda: evaluate.open_model(merged.folder, dtype, trust_remote_code=self.trust_remote_code),
            teacher,
        )

    def training_inputs(self, key: str, quantized: QuantizedModel) -> TrainingInputs:
        """What training works on."""
        rows = self.ground.rows
        original = self.recipe.base_model.name or f"{self.recipe.base_model.path}"
        # PiSSA takes the principal part out of the base before quantizing: the adapter belongs on what was left. GPTQ's
        # integers follow from calibration rows, and no library makes them again from the name of the original.
        is_own = self.recipe.lora.init == "pissa" or self.recipe.quantization.data_type == "gptq_int4"
        base_name = str(quantized.folder) if is_own else original
        return TrainingInputs(
            rows=rows.train,
            pad_id=rows.pad_id,
            checkpoints=self.folder.checkpoints,
            adapter=self.folder.adapter,
            base_name=base_name,
            recipe_key=key,
            predicted_peak_bytes=predict_peak_bytes(self.recipe, self.ground.base, rows),
            validate=self.measuring.validation_nats,
            tracker=self.telling.tracker,
            observer=self.observer,
            fitting=fitting_of(self.recipe, self.ground, self.measuring),
        )
