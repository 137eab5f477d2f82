"""Measures each stage's model on the same test rows, once.

The trained model's distributions (the teacher) are kept on disk, so that a file can be compared with the trained
model long after that model has left memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from qlora_trainer.pipeline.ground import Ground
from qlora_trainer.pipeline.ledger import Ledger
from qlora_trainer.recipe import ExportFormat, Recipe
from qlora_trainer.records import Evaluation, ExportedModel, Fidelity
from qlora_trainer.runtime.run_folder import RunFolder, fingerprint
from qlora_trainer.stages import evaluate, export
from qlora_trainer.stages.evaluate import Decoding, Subject, Teacher, TestBench

VERIFICATION_TOKENS = 512
"""Label tokens on which a runtime is compared with the weights that were written; a wrong scale shows at the first."""

OpenModel = Callable[[], nn.Module]


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

    def teacher(self, key: str, open_model: OpenModel) -> Teacher:
        """The trained model's distributions, read back or taken now; ``key`` as for ``stage``."""
        place = self.folder.evaluations / f"trained-{fingerprint(key, self.ground.bench_key)[:16]}"
        if not place.exists():
            self._teach(open_model(), self.recipe.evaluation.kl_tokens).write(place)
        return Teacher.read(place)

    def export(self, name: ExportFormat, key: str, *, inputs: export.ExportInputs, teacher: Teacher) -> MeasuredExport:
        """One file: written, read back, opened in its runtime, judged and measured."""

        def carry_out() -> MeasuredExport:
            written = export.write(name, self.folder.exports / name, inputs)
            reference = export.reference_model(written, inputs)
            expected = teacher if reference is None else self._teach(reference, VERIFICATION_TOKENS)
            del reference
            model = export.open_in_runtime(written, inputs)
            nearness = self._fidelity(model, expected)
            exported = export.judge(written, difference=nearness.kl_to_trained, tokens=nearness.tokens)
            subject = Subject(f"export:{name}", exported.runtime, exported.bytes)
            evaluation = evaluate.evaluate(model, subject, self.bench)
            return MeasuredExport(exported, evaluation, self._fidelity(model, teacher))

        return self.ledger.once(
            f"export {name}",
            fingerprint(key, name, self.ground.bench_key),
            MeasuredExport,
            make=carry_out,
            describe=lambda record: (
                f"{'verified' if record.exported.verified else 'NOT VERIFIED'}, {in_words(record.evaluation)}, "
                f"{record.exported.bytes / 2**20:.1f} MiB"
            ),
        )

    def _teach(self, model: nn.Module, tokens: int) -> Teacher:
        return evaluate.teach(
            model,
            self.bench.rows,
            tokens=tokens,
            batch_size=self.recipe.evaluation.batch_size,
            pad_id=self.ground.rows.pad_id,
        )

    def _fidelity(self, model: nn.Module, teacher: Teacher) -> Fidelity:
        return evaluate.fidelity(
            model,
            teacher,
            self.bench.rows,
            batch_size=self.recipe.evaluation.batch_size,
            pad_id=self.ground.rows.pad_id,
        )


def in_words(evaluation: Evaluation) -> str:
    """An evaluation's main figures in a line."""
    parts = [f"{evaluation.nats_per_token.value:.4f} nats/token"]
    parts += [f"{name} {score.value:.3g}" for name, score in evaluation.metrics.items()]
    return ", ".join(parts)
