"""Measures each stage's model on the same test rows, once.

The trained model's distributions (the teacher) are kept on disk, so that a file can be compared with the trained
model long after that model has left memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from qlora_trainer.pipeline.ground import Ground
from qlora_trainer.pipeline.ledger import Ledger
from qlora_trainer.recipe import ExportFormat, Recipe
from qlora_trainer.records import Evaluation, ExportedModel, Fidelity
from qlora_trainer.runtime.run_folder import RunFolder, fingerprint
from qlora_trainer.stages import evaluate, export
from qlora_trainer.stages.evaluate import Decoding, EncodedRow, Subject, Teacher, TestBench
from qlora_trainer.stages.export import ExportInputs, HeldOut, Standing, WrittenExport

VERIFICATION_TOKENS = 512
"""Label tokens on which a runtime is compared with the weights that were written; a wrong scale shows at the first."""

OpenModel = Callable[[], nn.Module]
Rows = Sequence[EncodedRow]


@dataclass(frozen=True)
class Measured:
    """A model's evaluation and its nearness to the trained model."""

    evaluation: Evaluation
    fidelity: Fidelity


@dataclass(frozen=True)
class MeasuredExport:
    """An exported file, the verdict on it, and what it is worth."""

    exported: ExportedModel
    evaluation: Evaluation
    fidelity: Fidelity


@dataclass(frozen=True)
class ValidationReferences:
    """What attempts are measured against on the validation rows.

    Attributes:
        quantized: the quantized base.
        trained: base and unmerged adapter.
        teacher: its distributions.
    """

    quantized: HeldOut
    trained: HeldOut
    teacher: Teacher


class Measuring:
    """The bench of one run."""

    def __init__(self, recipe: Recipe, ground: Ground, *, folder: RunFolder, ledger: Ledger) -> None:
        self.recipe, self.ground, self.folder, self.ledger = recipe, ground, folder, ledger
        rows, plan = ground.rows, recipe.evaluation
        self.bench = TestBench(
            rows=rows.test,
            plan=plan,
            decoding=Decoding(
                tokenizer=rows.tokenizer,
                stop_ids=rows.stop_ids,
                pad_id=rows.pad_id,
                batch_size=plan.batch_size,
                max_new_tokens=plan.max_new_tokens,
            ),
            seed=recipe.run.seed,
        )

    def validation_nats(self, model: nn.Module) -> float:
        """Loss on the validation rows, which may choose; the test rows never do."""
        rows = self.ground.rows
        return evaluate.held_out_nats(
            model, rows.validation, batch_size=self.recipe.evaluation.batch_size, pad_id=rows.pad_id
        )

    def longest_batches(self, model: nn.Module) -> None:
        """Takes the largest batches through the model that validation and generation will have, as far as memory goes.

        Prompts are drawn out to what they will be when the last token of an answer is generated.
        """
        rows, plan = self.ground.rows, self.recipe.evaluation
        longest = sorted(rows.validation, key=lambda row: len(row.token_ids))[-plan.batch_size :]
        evaluate.held_out_nats(model, longest, batch_size=plan.batch_size, pad_id=rows.pad_id)
        if plan.metrics:
            answered = (rows.pad_id,) * plan.max_new_tokens
            drawn_out = [replace(row, prompt_ids=row.prompt_ids + answered) for row in longest]
            evaluate.answer(model, drawn_out, replace(self.bench.decoding, max_new_tokens=1))

    def stage(self, subject: Subject, key: str, open_model: OpenModel) -> Evaluation:
        """A model on the test rows.

        Args:
            subject: what is measured.
            key: of everything that the model depends on.
            open_model: loads the model; not called where the record is there.
        """
        return self.ledger.once(
            f"evaluate {subject.stage}",
            fingerprint(key, self.ground.bench_key),
            Evaluation,
            make=lambda: evaluate.evaluate(open_model(), subject, self.bench),
            describe=in_words,
        )

    def compared(self, subject: Subject, key: str, open_model: OpenModel, teacher: Teacher) -> Measured:
        """A model on the test rows, and its nearness to the trained model; arguments as for ``stage``."""

        def carry_out() -> Measured:
            model = open_model()
            return Measured(evaluate.evaluate(model, subject, self.bench), self._fidelity(model, teacher))

        return self.ledger.once(
            f"evaluate {subject.stage}",
            fingerprint(key, self.ground.bench_key),
            Measured,
            make=carry_out,
            describe=lambda record: in_words(record.evaluation),
        )

    def evaluation(self, model: nn.Module, subject: Subject) -> Evaluation:
        """A model in memory on the test rows; nothing is kept."""
        return evaluate.evaluate(model, subject, self.bench)

    def nearness(self, model: nn.Module, teacher: Teacher) -> Fidelity:
        """How near a model in memory is to a teacher on the test rows."""
        return self._fidelity(model, teacher)

    def teacher(self, key: str, open_model: OpenModel) -> Teacher:
        """The trained model's distributions, read back or taken now; ``key`` as for ``stage``."""
        place = self.folder.evaluations / f"trained-{fingerprint(key, self.ground.bench_key)[:16]}"
        if not place.exists():
            self._teach(open_model(), self.recipe.evaluation.kl_tokens).write(place)
        return Teacher.read(place)

    def kept_export(self, name: ExportFormat, key: str, make: Callable[[], MeasuredExport]) -> MeasuredExport:
        """A file's record, read back where it was made from the same key."""
        return self.ledger.once(
            f"export {name}",
            key,
            MeasuredExport,
            make=make,
            describe=lambda record: (
                f"{'verified' if record.exported.verified else 'NOT VERIFIED'}, {in_words(record.evaluation)}, "
                f"{record.exported.bytes / 2**20:.1f} MiB"
            ),
        )

    def export(self, written: WrittenExport, inputs: ExportInputs, *, teacher: Teacher, rung: int) -> MeasuredExport:
        """A written file: opened in its runtime, judged, and measured on the test rows."""
        reference = export.reference_model(written, inputs)
        is_adapter = written.merged_into is None
        expected = self._teach(reference, VERIFICATION_TOKENS) if reference is not None else None
        del reference
        opened = export.open_in_runtime(written, inputs)
        nearness = self._fidelity(opened.model, teacher)
        if is_adapter:
            compared: Fidelity | None = nearness
        else:
            compared = None if expected is None else self._fidelity(opened.model, expected)
        exported = export.judge(
            written,
            opened,
            inputs.data,
            difference=None if compared is None else compared.kl_to_trained,
            tokens=0 if compared is None else compared.tokens,
            rung=rung,
        )
        subject = Subject(f"export:{written.format}", exported.runtime, exported.bytes)
        return MeasuredExport(exported, evaluate.evaluate(opened.model, subject, self.bench), nearness)

    # Validation rows, which may choose.

    def held_out(self, stage: str, key: str, open_model: OpenModel) -> HeldOut:
        """A model's loss on each validation row, kept."""
        return self.ledger.once(
            f"validate {stage}",
            fingerprint(key, self.ground.bench_key),
            HeldOut,
            make=lambda: self._held_out(open_model()),
            describe=lambda record: f"{record.nats_per_token:.4f} nats/token",
        )

    def validation_teacher(self, key: str, open_model: OpenModel) -> Teacher:
        """The trained model's distributions on validation rows; arguments as for ``stage``."""
        place = self.folder.evaluations / f"trained-validation-{fingerprint(key, self.ground.bench_key)[:16]}"
        if not place.exists():
            self._teach(open_model(), self.recipe.evaluation.kl_tokens, self.ground.rows.validation).write(place)
        return Teacher.read(place)

    def standing(
        self, model: nn.Module, references: ValidationReferences, bar: float | None
    ) -> tuple[Standing, Fidelity]:
        """Where an attempt stands: what it keeps on the validation rows, and how near it is to the trained model."""
        fidelity = self._fidelity(model, references.teacher, self.ground.rows.validation)
        plan = self.recipe.evaluation
        found = export.standing(
            self._held_out(model),
            fidelity,
            quantized=references.quantized,
            trained=references.trained,
            bar=bar,
            ladder=self.recipe.ladder,
            resampling=export.resampling_of(plan.bootstrap_resamples, plan.confidence, self.recipe.run.seed),
        )
        return found, fidelity

    def _held_out(self, model: nn.Module) -> HeldOut:
        rows, plan = self.ground.rows, self.recipe.evaluation
        losses = evaluate.row_losses(model, rows.validation, batch_size=plan.batch_size, pad_id=rows.pad_id)
        return HeldOut(losses.nats, losses.labels)

    def _teach(self, model: nn.Module, tokens: int, rows: Rows | None = None) -> Teacher:
        return evaluate.teach(
            model,
            self.bench.rows if rows is None else rows,
            tokens=tokens,
            batch_size=self.recipe.evaluation.batch_size,
            pad_id=self.ground.rows.pad_id,
        )

    def _fidelity(self, model: nn.Module, teacher: Teacher, rows: Rows | None = None) -> Fidelity:
        return evaluate.fidelity(
            model,
            teacher,
            self.bench.rows if rows is None else rows,
            batch_size=self.recipe.evaluation.batch_size,
            pad_id=self.ground.rows.pad_id,
        )


def in_words(evaluation: Evaluation) -> str:
    """An evaluation's main figures in a line."""
    parts = [f"{evaluation.nats_per_token.value:.4f} nats/token"]
    parts += [f"{name} {score.value:.3g}" for name, score in evaluation.metrics.items()]
    return ", ".join(parts)
