"""The loss of label tokens a few at a time: values, gradients, and how little it holds."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.numerics import chunked_loss
from qlora_trainer.numerics.chunked_loss import OutputHead, chunked_nats, summed_chunked_nats

P, E, V = 23, 6, 50


def head(**settings: float) -> OutputHead:
    torch.manual_seed(0)
    return OutputHead(weight=torch.randn(V, E), bias=torch.randn(V), **settings)  # type: ignore[arg-type]


def states() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(P, E, requires_grad=True), torch.randint(V, (P,))


@pytest.fixture(params=[1, 4, 100], ids=lambda rows: f"{rows} rows at a time")
def _chunks_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_VALUES", request.param * V)


@pytest.mark.usefixtures("_chunks_of")
@pytest.mark.parametrize("settings", [{}, {"factor": 0.25}, {"softcap": 3.0}, {"factor": 2.0, "softcap": 5.0}])
def test_loss_and_gradient_are_those_of_whole_logits(settings: dict[str, float]) -> None:
    hidden, targets = states()
    output = head(**settings)
    wanted = functional.cross_entropy(output.logits(hidden), targets, reduction="none")
    torch.testing.assert_close(chunked_nats(hidden, targets, output), wanted.detach(), rtol=1e-5, atol=1e-5)
    found = summed_chunked_nats(hidden, targets, output)
    torch.testing.assert_close(found, wanted.sum(), rtol=1e-5, atol=0)
    (mine,), (theirs,) = torch.autograd.grad(0.5 * found, hidden), torch.autograd.grad(0.5 * wanted.sum(), hidden)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_label_whose_probability_is_zero_in_float32_has_a_finite_loss() -> None:
    output = OutputHead(weight=torch.tensor([[400.0], [0.0]]))
    nats = summed_chunked_nats(torch.ones(1, 1, requires_grad=True), torch.tensor([1]), output)
    assert nats.item() == pytest.approx(400.0)


def test_no_label_has_no_loss_and_a_gradient_of_nothing() -> None:
    hidden = torch.zeros(0, E, requires_grad=True)
    nats = summed_chunked_nats(hidden, torch.zeros(0, dtype=torch.int64), head())
    assert nats.item() == 0.0
    assert torch.autograd.grad(nats, hidden)[0].shape == (0, E)


def test_bfloat16_logits_lose_no_more_than_their_rounding() -> None:
    hidden, targets = states()
    exact = head()
    assert exact.bias is not None
    rounded = OutputHead(weight=exact.weight.bfloat16(), bias=exact.bias.bfloat16())
    found = chunked_nats(hidden.detach().bfloat16(), targets, rounded)
    wanted = functional.cross_entropy(rounded.logits(hidden.detach().bfloat16()).float(), targets, reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Values of the largest tensor that any operation gave."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return result


@pytest.mark.parametrize("tokens", [64, 1024])
def test_no_tensor_grows_with_vocabulary_times_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_VALUES", 8 * 512)
    output = OutputHead(weight=torch.randn(512, 2))
    hidden, targets = torch.randn(tokens, 2, requires_grad=True), torch.randint(512, (tokens,))
    with Largest() as seen:
        summed_chunked_nats(hidden, targets, output).backward()
    assert seen.values == 8 * 512


def test_a_vocabulary_larger_than_a_chunk_is_taken_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_VALUES", V - 1)
    hidden, targets = states()
    uniform = OutputHead(weight=torch.zeros(V, E))
    assert summed_chunked_nats(hidden, targets, uniform).item() == pytest.approx(P * math.log(V), rel=1e-5)
