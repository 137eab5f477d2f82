"""``compare``: every method of the recipe on the same 16-bit model and rows, each kept as soon as it is measured.

A method that fails is a row with its reason, and the comparison goes on; it is tried again the next time.
"""

import gc
import logging
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from qlora_trainer.errors import BaseModelError, Interrupted, RunFolderError, TrainerError
from qlora_trainer.pipeline.journey import Journey, setting_out
from qlora_trainer.pipeline.measuring import in_words
from qlora_trainer.pipeline.rounding import BlockwiseMethod, ModelRounding
from qlora_trainer.recipe import CompareMethod, Recipe
from qlora_trainer.records import Comparison, ComparisonRow, Evaluation, Fidelity, LayerOutliers, LinearLayers
from qlora_trainer.runtime.device import choose_device
from qlora_trainer.runtime.progress import Observer
from qlora_trainer.runtime.run_folder import fingerprint
from qlora_trainer.stages import compare as stage
from qlora_trainer.stages import export
from qlora_trainer.stages.evaluate import Subject, Teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredMethod:
    """What is kept of a method: everything that its row follows from."""

    evaluation: Evaluation
    fidelity: Fidelity
    seconds: float
    layers_16bit: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class OutlierReport:
    """What is kept of the outliers."""

    layers: tuple[LayerOutliers, ...]
    systematic: tuple[int, ...]


def compare(
    recipe: Recipe, *, observer: Observer | None = None, trust_remote_code: bool = False, command: str = ""
) -> Comparison:
    """Measures every method of ``recipe.compare`` and recommends one; writes compare.json, compare.md and compare.html.

    Args:
        recipe: the model, the task, the methods.
        observer: told of everything that happens.
        trust_remote_code: allow Python code that comes with the model; never part of a recipe.
        command: how it was asked for, to be shown; empty = by the run folder's recipe.

    Raises:
        TrainerError: the 16-bit model cannot be made or measured; what was finished stays.
    """
    with setting_out(recipe, observer=observer, trust_remote_code=trust_remote_code) as journey:
        by_folder = f"qlora-trainer compare {shlex.quote(str(journey.folder.recipe_yaml))}"
        return Comparing(journey, command or by_folder).whole()


class Comparing:
    """The comparison of one run.

    Args:
        journey: gives the 16-bit model, the bench and the ledger.
        command: repeats the comparison, to be shown.
    """

    def __init__(self, journey: Journey, command: str = "") -> None:
        self.command = command
        self.journey, self.recipe, self.measuring = journey, journey.recipe, journey.measuring
        self.bench_key = journey.ground.bench_key
        self.folder, self.model_key = self._sixteen_bit()
        self.workplace = journey.folder.root / ".compare"
        self.rounding = ModelRounding(
            self.recipe, journey.ground.rows, self.folder, trust_remote_code=journey.trust_remote_code
        )

    def whole(self) -> Comparison:
        """All rows, the recommendation, and the files."""
        self.workplace.mkdir(parents=True, exist_ok=True)
        inputs = self.inputs()
        began = time.monotonic()
        reference = self._reference(inputs)
        rows = [stage.reference_row(reference, seconds=0.0)]
        logger.info("16 bit measured in %.1f s", time.monotonic() - began)
        teacher = self.measuring.teacher(self.model_key, lambda: stage.open_16bit(inputs).model)
        rows += [self._row(method, inputs, reference, teacher) for method in self.recipe.compare.methods]
        outliers = self._outliers(inputs)
        shutil.rmtree(self.workplace, ignore_errors=True)
        made = Comparison(
            recipe=self.recipe.run.name,
            model=self.recipe.compare.model,
            test_rows=len(reference.row_nats),
            confidence=self.recipe.evaluation.confidence,
            rows=stage.with_front(rows),
            outliers=outliers.layers,
            systematic=outliers.systematic,
            recommendation=stage.recommend(rows, self.recipe.compare),
            settings=self.recipe.compare.model_dump(mode="json"),
            recipe_text=self.journey.folder.recipe_text,
            environment=self.journey.folder.environment,
            command=self.command,
        )
        stage.write(made, self.journey.folder.root)
        return made

    def inputs(self) -> stage.CompareInputs:
        """What the stage works on."""
        return stage.CompareInputs(
            folder=self.folder,
            layers=self.journey.ground.layers,
            settings=self.recipe.compare,
            compute_dtype=self.recipe.quantization.compute_dtype,
            calibration=self._calibration,
            round_blockwise=self._round_blockwise,
            workplace=self.workplace,
            beginnings=self._beginnings(),
            stop_ids=self.journey.ground.rows.stop_ids,
            pad_id=self.journey.ground.rows.pad_id,
            factors=stage.FactorPlan(self.recipe.lora.rank, self.recipe.lora.scale),
            seed=self.recipe.run.seed,
            trust_remote_code=self.journey.trust_remote_code,
        )

    def _sixteen_bit(self) -> tuple[Path, str]:
        """The folder of the model that is quantized, made first where the recipe trains it; and its content's key."""
        journey = self.journey
        if self.recipe.compare.model == "base":
            return journey.ground.base.folder, journey.ground.content_key
        journey.travel("merge")
        return journey.folder.merged, fingerprint(journey.merge_key(journey.quantize()), self.bench_key)

    def _reference(self, inputs: stage.CompareInputs) -> Evaluation:
        def carry_out() -> Evaluation:
            opened = stage.open_16bit(inputs)
            subject = Subject(stage.REFERENCE, export.BASE_RUNTIME, opened.bytes)
            try:
                return self.measuring.evaluation(opened.model, subject)
            except ValueError as error:
                raise BaseModelError(f"{self.folder}: the 16-bit model cannot be measured: {error}") from error

        return self.journey.ledger.once(
            f"compare {stage.REFERENCE}",
            fingerprint(self.model_key, self.bench_key, self.recipe.quantization.compute_dtype),
            Evaluation,
            make=carry_out,
            describe=in_words,
        )

    def _row(
        self, method: CompareMethod, inputs: stage.CompareInputs, reference: Evaluation, teacher: Teacher
    ) -> ComparisonRow:
        plan = self.recipe.evaluation
        try:
            measured = self._measured(method, inputs, teacher)
        except (Interrupted, RunFolderError):
            raise
        # What a method, torch or a library refuses on this model, out of memory included.
        except (TrainerError, ValueError, RuntimeError, MemoryError) as error:
            logger.warning("compare %s: failed: %s", method, error)
            self.journey.observer.note(f"{method} failed: {error}")
            return stage.failed_row(method, error)
        finally:
            gc.collect()
        return stage.method_row(
            method,
            measured.evaluation,
            measured.fidelity,
            reference,
            resampling=export.resampling_of(plan.bootstrap_resamples, plan.confidence, self.recipe.run.seed),
            seconds=measured.seconds,
            layers_16bit=measured.layers_16bit,
            note=measured.note,
        )

    def _measured(self, method: CompareMethod, inputs: stage.CompareInputs, teacher: Teacher) -> MeasuredMethod:
        def carry_out() -> MeasuredMethod:
            began = time.monotonic()
            made = stage.quantized(method, inputs)
            seconds = time.monotonic() - began
            evaluation = self.measuring.evaluation(made.model, Subject(method, export.BASE_RUNTIME, made.bytes))
            fidelity = self.measuring.nearness(made.model, teacher)
            return MeasuredMethod(evaluation, fidelity, seconds, made.layers_16bit, made.note)

        return self.journey.ledger.once(
            f"compare {method}",
            fingerprint(self._learning_key(), method, self.bench_key, *self._qat_key(method)),
            MeasuredMethod,
            make=carry_out,
            describe=lambda record: f"{in_words(record.evaluation)}, {record.evaluation.bytes / 2**20:.2f} MiB",
        )

    def _outliers(self, inputs: stage.CompareInputs) -> OutlierReport:
        try:
            return self.journey.ledger.once(
                "compare outliers",
                fingerprint(self._learning_key()),
                OutlierReport,
                make=lambda: OutlierReport(*stage.outlier_report(inputs)),
                describe=lambda record: f"{sum(bool(each.dimensions) for each in record.layers)} layers with outliers",
            )
        except (Interrupted, RunFolderError):
            raise
        except (TrainerError, ValueError) as error:
            self.journey.observer.note(f"outliers: {error}")
            return OutlierReport((), ())

    def _beginnings(self) -> list[list[int]]:
        """Where the model begins to write its own data: bos, and a token; tokens spread evenly over the vocabulary."""
        tokenizer, wanted = self.journey.ground.rows.tokenizer, self.recipe.compare.qat_rows
        ordinary = [token for token in range(tokenizer.vocabulary_size) if tokenizer.decode([token], skip_special=True)]
        first = [ordinary[place * len(ordinary) // wanted] for place in range(min(wanted, len(ordinary)))]
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return [[*bos, token] for token in first]

    def _learning_key(self) -> str:
        """Of everything that a method's weights depend on but its name."""
        settings, recipe = self.recipe.compare, self.recipe
        shaping = (settings.group_size, settings.allow_16bit_layers, settings.distillation_steps)
        learning = (recipe.calibration.model_dump(mode="json"), recipe.rounding.model_dump(mode="json"))
        return fingerprint(self.model_key, shaping, learning, recipe.quantization.compute_dtype, recipe.run.seed)

    def _qat_key(self, method: CompareMethod) -> tuple[float, ...]:
        settings, lora = self.recipe.compare, self.recipe.lora
        if not method.startswith("llm_qat"):
            return ()
        learning = (settings.qat_rows, settings.qat_tokens, settings.qat_steps, settings.qat_learning_rate)
        return (*learning, lora.rank, lora.scale)

    def _calibration(self) -> list[export.CalibrationBatch]:
        return export.calibration_batches(self.rounding.data, self.recipe.calibration, choose_device())

    def _round_blockwise(
        self, method: CompareMethod, spec: export.GridSpec, layers: LinearLayers
    ) -> Iterator[tuple[str, Tensor]]:
        """The export ladder's rounding, toward the 16-bit model itself: there is no delta."""
        workplace = self.workplace / method
        rounded = self.rounding.rounded(cast("BlockwiseMethod", method), spec, layers, workplace)
        yield from rounded.dequantized_in(self.rounding.weights(layers))
