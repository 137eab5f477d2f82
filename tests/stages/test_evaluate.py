import math
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.numerics.loss import IGNORE_INDEX
from qlora_trainer.recipe import EvaluationPlan
from qlora_trainer.runners import transformers as runner
from qlora_trainer.stages import evaluate
from qlora_trainer.stages.evaluate import Decoding, Subject, Teacher, TestBench
from tests.models import EOS_ID, PAD_ID
from tests.stages.workbench import random_rows

ROWS = random_rows(9)


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> nn.Module:
    return runner.load(llama_folder, dtype=torch.float32)


def bench_of(folder: Path, **plan: object) -> TestBench:
    decoding = Decoding(TextTokenizer.load(folder), (EOS_ID,), PAD_ID, batch_size=4, max_new_tokens=5)
    return TestBench(ROWS, EvaluationPlan.model_validate({"batch_size": 4, **plan}), decoding, seed=0)


def slow_nats(model: nn.Module) -> list[float]:
    """Row by row, token by token, without padding."""
    nats = []
    for row in ROWS:
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
        places = [place for place in range(1, len(row.labels)) if row.labels[place] != IGNORE_INDEX]
        nats.append(-sum(float(log_probs[place - 1, row.labels[place]]) for place in places))
    return nats


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_batches_and_padding_change_no_loss(model: nn.Module, batch_size: int) -> None:
    expected = sum(slow_nats(model)) / sum(row.label_count for row in ROWS)
    found = evaluate.held_out_nats(model, ROWS, batch_size=batch_size, pad_id=PAD_ID)
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_has_the_loss_of_every_row_in_order(model: nn.Module, llama_folder: Path) -> None:
    found = evaluate.evaluate(model, Subject("base_16bit", "transformers", 7), bench_of(llama_folder))
    assert found.row_nats == pytest.approx(slow_nats(model), rel=1e-5)
    assert found.row_labels == tuple(row.label_count for row in ROWS)
    low, high = found.nats_per_token.interval
    assert low < found.nats_per_token.value < high
    assert found.bytes == 7
    assert found.peak_bytes > 0


def test_metrics_are_taken_on_the_first_rows_and_samples_are_kept(model: nn.Module, llama_folder: Path) -> None:
    bench = bench_of(llama_folder, metrics=("exact_match", "token_f1"), generation_rows=4, samples=2)
    found = evaluate.evaluate(model, Subject("base_16bit", "transformers", 1), bench)
    assert set(found.metrics) == {"exact_match", "token_f1"}
    assert found.metrics["exact_match"].value == 0.0
    assert len(found.samples) == 2
    assert found.generated_tokens_per_second is not None
    assert found.generated_tokens_per_second > 0


def test_a_model_is_no_distance_from_itself_and_some_from_another(
    model: nn.Module, llama_folder: Path, tmp_path: Path
) -> None:
    teacher = evaluate.teach(model, ROWS, tokens=20, batch_size=4, pad_id=PAD_ID)
    teacher.write(tmp_path / "teacher")
    again = Teacher.read(tmp_path / "teacher")
    assert again.rows == teacher.rows
    same = evaluate.fidelity(model, again, ROWS, batch_size=3, pad_id=PAD_ID)
    assert same.kl_to_trained == pytest.approx(0, abs=1e-6)
    assert same.top1_agreement == 1.0
    assert 20 <= same.tokens == len(teacher.log_probs)
    half = runner.load(llama_folder, dtype=torch.bfloat16)
    near = evaluate.fidelity(half, again, ROWS, batch_size=4, pad_id=PAD_ID)
    # bfloat16 has 8 bits of precision: relative errors of 2^-9 a product, through two layers of these large weights.
    assert 1e-7 < near.kl_to_trained < 1e-2


def test_kl_is_the_mean_over_tokens_of_the_textbook_formula(model: nn.Module, llama_folder: Path) -> None:
    teacher = evaluate.teach(model, ROWS, tokens=5, batch_size=4, pad_id=PAD_ID)
    flat = Teacher(torch.full_like(teacher.log_probs, -math.log(teacher.log_probs.shape[1])), teacher.rows)
    found = evaluate.fidelity(model, flat, ROWS, batch_size=4, pad_id=PAD_ID)
    # KL(uniform || model) = -log V - mean of the model's log probabilities.
    expected = float((flat.log_probs.exp() * (flat.log_probs - teacher.log_probs)).sum(-1).mean())
    assert found.kl_to_trained == pytest.approx(expected, rel=1e-4)
