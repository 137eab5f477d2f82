"""LLM-QAT: quantization-aware training without data, on what the model itself writes.

arXiv 2305.17888. The 16-bit model writes sequences (``runners.sampling``) and is the teacher: the student's loss is
the cross entropy to the teacher's whole next-token distribution at every token (section 2), which differs from the KL
divergence taken here by the teacher's own entropy. Weights, inputs and the key-value cache of the student are rounded
by min-max, symmetric, weights by channel, the others by token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.numerics.integer_weight import GridSpec
from qlora_trainer.numerics.loss import kl_to
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.kv_cache import with_rounded_kv_cache
from qlora_trainer.runners.sampling import self_written
from qlora_trainer.stages.compare.inputs import CompareInputs
from qlora_trainer.stages.compare.student import StudentLinear, as_student

GREEDY_TOKENS = 3
"""Tokens that are the most likely ones before sampling begins (the paper's hybrid way: 3 to 5)."""
BATCH_ROWS = 8
HELD_OUT_SHARE = 8
"""One in so many self-written sequences is not trained on and says which factors to keep."""


@dataclass(frozen=True)
class QatResult:
    """What LLM-QAT gave.

    Attributes:
        matrices: ``W + s B A`` by checkpoint name, float32, not rounded yet.
        kl_before: mean KL(teacher || student) on the held-out self-written sequences, in nats per token.
        kl_after: the same with the factors that were kept.
    """

    matrices: dict[str, Tensor]
    kl_before: float
    kl_after: float


def train_student(inputs: CompareInputs, spec: GridSpec, *, activation_bits: int, kv_bits: int) -> QatResult:
    """Distils the 16-bit model into one of few bits.

    Adam on the factors, the rate falling linearly to zero, gradients cut to norm 1. After each pass over the sequences
    the held-out ones are scored, and the factors of least loss are kept, those of the beginning among them.

    Args:
        inputs: the model, the beginnings of its own data, the settings.
        spec: grids of the weights.
        activation_bits: of the inputs of quantized layers.
        kv_bits: of the key-value cache.

    Raises:
        ValueError: the model's distributions are not finite.
    """
    settings, factors = inputs.settings, inputs.factors
    teacher = runner.load(inputs.folder, dtype=inputs.dtype, trust_remote_code=inputs.trust_remote_code)
    token_ids, real = self_written(
        teacher,
        inputs.beginnings[: settings.qat_rows],
        tokens=settings.qat_tokens,
        greedy_tokens=GREEDY_TOKENS,
        stop_ids=inputs.stop_ids,
        pad_id=inputs.pad_id,
        seed=inputs.seed,
    )
    student = runner.load(inputs.folder, dtype=torch.float32, trust_remote_code=inputs.trust_remote_code)
    layers = as_student(
        student,
        inputs.layers.quantized,
        rank=factors.rank,
        scale=factors.scale,
        spec=spec,
        activation_bits=activation_bits,
        seed=inputs.seed,
    )
    if kv_bits < 16:
        with_rounded_kv_cache(student, kv_bits)
    before, after = _train(teacher, student, layers, _Sequences(token_ids, real), inputs)
    return QatResult({f"{name}.weight": layer.merged() for name, layer in layers.items()}, before, after)


@dataclass(frozen=True)
class _Sequences:
    """Token ids and where they are real, shape ``(sequences, tokens)``."""

    token_ids: Tensor
    real: Tensor

    def rows(self, indexes: Tensor) -> "_Sequences":
        """Some of the sequences."""
        return _Sequences(self.token_ids[indexes], self.real[indexes])


def _train(
    teacher: nn.Module,
    student: nn.Module,
    layers: dict[str, StudentLinear],
    sequences: _Sequences,
    inputs: CompareInputs,
) -> tuple[float, float]:
    """Trains the factors in place; gives the held-out loss before, and of the factors that are left in the layers."""
    every = torch.arange(len(sequences.token_ids))
    is_held_out = every % HELD_OUT_SHARE == 0
    held_out, trained = sequences.rows(every[is_held_out]), sequences.rows(every[~is_held_out])
    parameters = [part for layer in layers.values() for part in (layer.lora_a, layer.lora_b)]
    steps, rate = inputs.settings.qat_steps, inputs.settings.qat_learning_rate
    optimizer = torch.optim.Adam(parameters, lr=rate)
    generator = torch.Generator().manual_seed(inputs.seed)
    before = least = _mean_kl(teacher, student, held_out)
    best = [part.detach().clone() for part in parameters]
    a_pass = max(1, len(trained.token_ids) // BATCH_ROWS)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - (step - 1) / steps)
        batch = trained.rows(torch.randperm(len(trained.token_ids), generator=generator)[:BATCH_ROWS])
        kl, count = _summed_kl(teacher, student, batch)
        optimizer.zero_grad()
        torch.autograd.backward(kl / count)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % a_pass == 0 or step == steps:
            found = _mean_kl(teacher, student, held_out)
            if found < least:
                least, best = found, [part.detach().clone() for part in parameters]
    with torch.no_grad():
        for part, kept in zip(parameters, best, strict=True):
            part.copy_(kept)
    return before, least


@torch.no_grad()
def _mean_kl(teacher: nn.Module, student: nn.Module, sequences: _Sequences) -> float:
    total, tokens = 0.0, 0
    for start in range(0, len(sequences.token_ids), BATCH_ROWS):
        indexes = torch.arange(start, min(start + BATCH_ROWS, len(sequences.token_ids)))
        kl, count = _summed_kl(teacher, student, sequences.rows(indexes))
        total, tokens = total + float(kl), tokens + count
    return total / tokens


def _summed_kl(teacher: nn.Module, student: nn.Module, batch: _Sequences) -> tuple[Tensor, int]:
    """KL(teacher || student) summed over tokens that predict a real one, and how many these are."""
    device = next(student.parameters()).device
    token_ids, counted = batch.token_ids.to(device), batch.real[:, 1:].to(device)
    doors: tuple[Any, Any] = teacher, student
    with torch.no_grad():
        expected = torch.log_softmax(doors[0](input_ids=token_ids, use_cache=False).logits[:, :-1].float(), dim=-1)
    given = doors[1](input_ids=token_ids, use_cache=False).logits[:, :-1]
    return kl_to(expected, given)[counted].sum(), int(counted.sum())
