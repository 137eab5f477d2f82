"""Cross entropy and KL divergence as sums over label tokens, in nats.

Sums, not means: a mean over unequal batches depends on how rows were grouped, sums and counts do not.
Whoever calls adds up sums and label counts and divides once. Nothing here knows a model, a
tokenizer or a device.

A *label token* is a position whose label is not ``IGNORE_INDEX``. Axes: B rows, T tokens, P kept
positions, V vocabulary.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX: Final = -100
"""Label of a position that is not trained on: the value that torch's cross entropy ignores by default."""


def label_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions whose logits the loss needs, and the label that each of them predicts.

    Position t predicts token t + 1, so a label at t asks for the logits at t - 1. The positions are the union over
    the rows of a right-padded batch, as transformers' ``logits_to_keep`` wants them: the output head then
    runs on the completions only, not on prompts and padding.

    Args:
        labels: int64, shape ``(B, T)``, not shifted: ``labels[b, t]`` is the token at t itself, or
            ``IGNORE_INDEX``. A label at t = 0 is never predicted and therefore dropped.

    Returns:
        Ascending positions, int64 of shape ``(P,)``, and labels aligned with the logits at those
        positions, int64 of shape ``(B, P)``; P is 0 where no row has a label. Both on the labels' device.

    Raises:
        ValueError: the labels do not have two axes.
    """
    if labels.ndim != 2:
        raise ValueError(f"labels must have the shape (rows, tokens), got {tuple(labels.shape)}")
    following = labels[:, 1:]
    positions = (following != IGNORE_INDEX).any(dim=0).nonzero().flatten()
    return positions, following[:, positions]


def nats_by_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood of each label; 0 where the label is ``IGNORE_INDEX``.

    Args:
        logits: any float type, shape ``(..., V)``; the softmax is taken in float32.
        labels: int64, shape ``(...)``, *aligned*: ``labels[b, p]`` is the token that ``logits[b, p]`` predicts
            (see ``label_positions``).

    Returns:
        float32, shape of ``labels``.

    Raises:
        ValueError: the shapes do not match.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}: "
            "every axis but the vocabulary must be equal"
        )
    flat = functional.cross_entropy(
        logits.flatten(end_dim=-2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return flat.view(labels.shape)


def summed_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood summed over all label tokens: a float32 scalar, 0 where there is none.

    Arguments and errors are those of ``nats_by_token``. Differentiable.
    """
    return nats_by_token(logits, labels).sum()


def nats_by_row(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood summed over the label tokens of each row: float32 of shape ``(B,)``.

    Arguments and errors are those of ``nats_by_token``, with logits of shape ``(B, P, V)``.
    """
    return nats_by_token(logits, labels).sum(dim=-1)


def kl_to(teacher_log_probs: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher || student) at each token, in nats; differentiable in the student.

    Args:
        teacher_log_probs: finite log probabilities, shape ``(..., V)``. Log probabilities rather than logits, because
            one teacher is compared with many students and its softmax is taken once.
        student_logits: any float type, the same shape.

    Returns:
        float32 of shape ``(...)``. Never below zero but by rounding: two equal distributions over 4,096 tokens gave
        magnitudes up to 5e-7.

    Raises:
        ValueError: the shapes differ.
    """
    if teacher_log_probs.shape != student_logits.shape:
        raise ValueError(
            f"teacher {tuple(teacher_log_probs.shape)} and student {tuple(student_logits.shape)} must have one shape: "
            "the same tokens over the same vocabulary"
        )
    teacher = teacher_log_probs.float()
    student = torch.log_softmax(student_logits.float(), dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)
