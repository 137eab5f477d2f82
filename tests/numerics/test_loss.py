import inspect
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qlora_trainer.numerics.loss import IGNORE_INDEX, kl_to, label_positions, nats_by_row, nats_by_token, summed_nats

# Three right-padded rows of seven tokens; prompts of different lengths, the last row has no label.
LABELS = torch.tensor(
    [
        [-100, -100, 3, 4, -100, -100, -100],
        [-100, -100, -100, 5, 6, 7, -100],
        [-100, -100, -100, -100, -100, -100, -100],
    ]
)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ignore_index_is_the_one_that_torch_ignores_by_default() -> None:
    assert inspect.signature(functional.cross_entropy).parameters["ignore_index"].default == IGNORE_INDEX


def test_position_t_predicts_the_label_at_t_plus_one() -> None:
    positions, labels = label_positions(LABELS)
    assert positions.tolist() == [1, 2, 3, 4]
    assert labels.tolist() == [[3, 4, -100, -100], [-100, 5, 6, 7], [-100] * 4]


def test_positions_skip_gaps_that_no_row_predicts_in() -> None:
    positions, labels = label_positions(torch.tensor([[-100, 1, -100, -100, 2]]))
    assert positions.tolist() == [0, 3]
    assert labels.tolist() == [[1, 2]]


def test_a_label_on_the_first_token_is_dropped() -> None:
    positions, labels = label_positions(torch.tensor([[9, -100, 2]]))
    assert positions.tolist() == [1]
    assert labels.tolist() == [[2]]


@pytest.mark.parametrize("labels", [LABELS[2:], LABELS[:0], LABELS[:, :0], LABELS[:, :1]])
def test_without_a_label_nothing_is_kept_and_the_sum_is_zero(labels: Tensor) -> None:
    positions, kept = label_positions(labels)
    assert positions.shape == (0,)
    assert kept.shape == (len(labels), 0)
    assert summed_nats(random_logits(len(labels), 0, 11), kept).item() == 0.0


def test_kept_positions_give_the_loss_of_the_whole_sequence() -> None:
    logits = random_logits(3, 7, 11)
    positions, kept = label_positions(LABELS)
    whole = functional.cross_entropy(logits[:, :-1].reshape(-1, 11), LABELS[:, 1:].reshape(-1), reduction="sum")
    # Five terms near 3 nats, added in another order.
    assert summed_nats(logits[:, positions], kept).item() == pytest.approx(whole.item(), rel=5 * 2**-24)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    labels = torch.tensor([[1, IGNORE_INDEX], [2, 3]])
    assert nats_by_row(torch.zeros(2, 2, 8), labels).tolist() == pytest.approx([math.log(8), 2 * math.log(8)])


def test_nats_equal_minus_the_log_softmax_at_the_label() -> None:
    logits, labels = random_logits(2, 3, 5), torch.tensor([[0, 4, IGNORE_INDEX], [2, IGNORE_INDEX, 1]])
    probabilities = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    found = nats_by_token(logits, labels)
    for row, position in (labels != IGNORE_INDEX).nonzero().tolist():
        wanted = -math.log(probabilities[row, position, labels[row, position]].item())
        assert found[row, position].item() == pytest.approx(wanted, rel=1e-6)
    assert (found == 0).tolist() == (labels == IGNORE_INDEX).tolist()


def test_rows_add_up_to_the_sum() -> None:
    logits = random_logits(3, 7, 11)
    assert nats_by_row(logits, LABELS).sum() == pytest.approx(summed_nats(logits, LABELS).item(), rel=5 * 2**-24)


def test_halves_of_a_batch_add_up_to_the_batch_and_its_gradient() -> None:
    logits = random_logits(2, 7, 11).requires_grad_()
    (whole,) = torch.autograd.grad(summed_nats(logits, LABELS[:2]), logits)
    (parts,) = torch.autograd.grad(sum(summed_nats(logits[i : i + 1], LABELS[i : i + 1]) for i in range(2)), logits)
    assert torch.equal(whole, parts)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = random_logits(3, 7, 11).bfloat16()
    nats = summed_nats(logits, LABELS)
    assert nats.dtype == torch.float32
    assert torch.equal(nats, summed_nats(logits.float(), LABELS))


def test_mismatched_logits_and_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 6, 11\) do not fit labels of shape \(3, 7\)"):
        summed_nats(random_logits(3, 6, 11), LABELS)
    with pytest.raises(ValueError, match=r"\(rows, tokens\), got \(7,\)"):
        label_positions(LABELS[0])


def test_kl_of_a_distribution_to_itself_is_zero() -> None:
    logits = 3 * random_logits(200, 4096)
    found = kl_to(torch.log_softmax(logits, dim=-1), logits + 5.0)
    # Largest of 20 seeds: 4.3e-7. Below zero it is rounding.
    assert found.abs().max().item() < 1e-6


def test_kl_equals_its_closed_form_for_two_outcomes() -> None:
    teacher = torch.tensor([[0.25, 0.75]]).log()
    student = torch.tensor([[0.5, 0.5]]).log() + 2.0
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_to(teacher, student).tolist() == pytest.approx([wanted], rel=1e-6)


def test_kl_weighs_by_the_teacher_and_equals_torch() -> None:
    teacher, student = torch.log_softmax(random_logits(2, 3, 50), -1), random_logits(2, 3, 50, seed=1)
    torchs = functional.kl_div(torch.log_softmax(student, -1), teacher, reduction="none", log_target=True).sum(-1)
    assert kl_to(teacher, student).shape == (2, 3)
    # 50 terms below 1 in size.
    torch.testing.assert_close(kl_to(teacher, student), torchs, rtol=0, atol=50 * 2**-24)


def test_the_gradient_of_kl_is_the_difference_of_probabilities() -> None:
    teacher, student = torch.log_softmax(random_logits(4, 9), -1), random_logits(4, 9, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(kl_to(teacher, student).sum(), student)
    torch.testing.assert_close(gradient, torch.softmax(student, -1).detach() - teacher.exp(), rtol=0, atol=1e-6)


def test_kl_over_different_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher \(2, 5\) and student \(3, 5\)"):
        kl_to(torch.zeros(2, 5), torch.zeros(3, 5))
