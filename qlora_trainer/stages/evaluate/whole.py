"""One model's whole measurement, the same for every stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.data.scoring import bleu_rows, score_rows
from qlora_trainer.numerics.bootstrap import Resampling, ratio_interval, statistic_interval
from qlora_trainer.recipe import EvaluationPlan, Metric
from qlora_trainer.records import Evaluation, Sample, Score
from qlora_trainer.runners.transformers import load
from qlora_trainer.runtime.device import peak_allocated_bytes, reset_peak_allocated
from qlora_trainer.runtime.memory import PeakMemory
from qlora_trainer.stages.evaluate.generation import Answers, Decoding, answer
from qlora_trainer.stages.evaluate.loss import RowLosses, row_losses


@dataclass(frozen=True)
class TestBench:
    """What every stage is measured on.

    Attributes:
        rows: test rows; they choose nothing.
        plan: the recipe's evaluation section.
        decoding: how prompts are answered.
        seed: of the bootstrap; equal for all stages, so that intervals can be paired.
    """

    __test__ = False  # not a test class, whatever its name suggests to pytest

    rows: Sequence[EncodedRow]
    plan: EvaluationPlan
    decoding: Decoding
    seed: int


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        stage: name of the stage, as in report.json.
        runtime: what runs the model.
        bytes: size of its weights on disk.
    """

    stage: str
    runtime: str
    bytes: int


def open_model(folder: Path, compute_dtype: str, *, trust_remote_code: bool) -> nn.Module:
    """The model in a folder as transformers loads it.

    Args:
        folder: Hugging Face layout.
        compute_dtype: ``float32`` or ``bfloat16``: type of weights and matrix products.
        trust_remote_code: allow code that comes with the model.
    """
    return load(folder, dtype=getattr(torch, compute_dtype), trust_remote_code=trust_remote_code)


def evaluate(model: nn.Module, subject: Subject, bench: TestBench) -> Evaluation:
    """Loss of every test row, task metrics and samples by greedy generation; leaves the model in eval mode."""
    device = next(model.parameters()).device
    reset_peak_allocated(device)
    with PeakMemory() as memory:
        losses = row_losses(model, bench.rows, batch_size=bench.plan.batch_size, pad_id=bench.decoding.pad_id)
        asked = bench.rows[: _rows_to_generate(bench.plan)]
        answers = answer(model, asked, bench.decoding) if asked else None
    resampling = Resampling(resamples=bench.plan.bootstrap_resamples, confidence=bench.plan.confidence, seed=bench.seed)
    return Evaluation(
        stage=subject.stage,
        runtime=subject.runtime,
        nats_per_token=_loss_score(losses, resampling),
        metrics=_metrics(answers, asked, bench.plan, resampling) if answers else {},
        row_nats=losses.nats,
        row_labels=losses.labels,
        bytes=subject.bytes,
        tokens_per_second=losses.tokens / losses.seconds,
        generated_tokens_per_second=answers.tokens_per_second if answers else None,
        peak_bytes=peak_allocated_bytes(device) or memory.peak_bytes(),
        samples=_samples(answers, asked, bench.plan.samples) if answers else (),
    )


def _rows_to_generate(plan: EvaluationPlan) -> int:
    return plan.generation_rows if plan.metrics else plan.samples


def _loss_score(losses: RowLosses, resampling: Resampling) -> Score:
    interval = ratio_interval(losses.nats, losses.labels, resampling=resampling)
    return Score(value=losses.nats_per_token, interval=interval)


def _metrics(
    answers: Answers, rows: Sequence[EncodedRow], plan: EvaluationPlan, resampling: Resampling
) -> dict[str, Score]:
    references = [row.completion for row in rows]
    return {metric: _score(metric, answers.texts, references, resampling) for metric in plan.metrics}


def _score(metric: Metric, outputs: Sequence[str], references: Sequence[str], resampling: Resampling) -> Score:
    if metric == "bleu":
        bleu = bleu_rows(outputs, references)
        interval = statistic_interval(bleu.statistics, bleu.combine, resampling=resampling)
        return Score(value=bleu.value, interval=interval)
    scores = score_rows(metric, outputs, references)
    if sum(scores.denominators) == 0:
        return Score(value=0.0, interval=(0.0, 0.0))
    interval = ratio_interval(scores.numerators, scores.denominators, resampling=resampling)
    return Score(value=scores.value, interval=interval)


def _samples(answers: Answers, rows: Sequence[EncodedRow], count: int) -> tuple[Sample, ...]:
    pairs = list(zip(rows, answers.texts, strict=True))[:count]
    return tuple(Sample(prompt=row.prompt, reference=row.completion, output=text) for row, text in pairs)
