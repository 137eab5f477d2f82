"""The summed loss of a batch, by the leanest way that this model was shown to allow.

The leanest way packs documents one behind the other and never holds logits. Whether a model allows it is not read
off its name: it is tried on two short documents and compared with what the model itself answers. What a model does not
allow is done in the ordinary way, and ``why_not`` says so.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.numerics.chunked_loss import OutputHead, chunked_nats, summed_chunked_nats
from qlora_trainer.numerics.loss import IGNORE_INDEX, nats_by_row, summed_nats
from qlora_trainer.runners.causal_lm.attention import BOUNDARIES, documents_attended
from qlora_trainer.runners.causal_lm.head import output_head
from qlora_trainer.runners.causal_lm.logits import label_logits

PROBE_LENGTHS = (7, 5)
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest distance of probed logits from the model's own, as a share of their size, by the model's type: rounding on
two ways through the model. A token that sees another document moves them by a share of order one."""


@dataclass(frozen=True)
class LossPath:
    """How a model's loss is taken.

    Attributes:
        head: turns hidden states into logits a few at a time; None = the model's own forward gives all of them.
        packs: whether documents may stand one behind the other in one sequence.
        why_not: what kept the leaner way from being taken; empty where nothing did.
    """

    head: OutputHead | None
    packs: bool
    why_not: str = ""

    def attending(self, model: nn.Module, *, is_packed: bool) -> AbstractContextManager[None]:
        """What both passes over a batch have to happen in."""
        return documents_attended(model) if is_packed else nullcontext()

    def summed_nats(
        self, model: nn.Module, token_ids: Tensor, labels: Tensor, *, boundaries: Sequence[int] | None = None
    ) -> Tensor:
        """Negative log likelihood summed over the label tokens: a float32 scalar, differentiable.

        Args:
            model: as it was probed; inside ``attending``.
            token_ids: int64, shape ``(rows, tokens)`` right-padded, or ``(1, tokens)`` packed; on the CPU.
            labels: the same shape, not shifted; a document's first label is never predicted and must be ignored.
            boundaries: where packed documents begin, with the number of tokens at the end; None = padded rows.
        """
        device = next(model.parameters()).device
        if self.head is None:
            return summed_nats(*label_logits(model, token_ids.to(device), labels.to(device)))
        hidden, targets, _ = _label_states(model, token_ids, labels, boundaries)
        return summed_chunked_nats(hidden, targets, self.head)

    def nats_by_row(self, model: nn.Module, token_ids: Tensor, labels: Tensor) -> list[float]:
        """Negative log likelihood summed over the label tokens of each padded row; not differentiable.

        Arguments are those of ``summed_nats``.
        """
        device = next(model.parameters()).device
        if self.head is None:
            return nats_by_row(*label_logits(model, token_ids.to(device), labels.to(device))).tolist()
        hidden, targets, rows = _label_states(model, token_ids, labels, None)
        nats = chunked_nats(hidden, targets, self.head)
        return torch.zeros(len(token_ids), device=device).index_add_(0, rows, nats).tolist()


def find_loss_path(model: nn.Module) -> LossPath:
    """Tries the lean ways on the model; leaves weights, random states and mode as they were."""
    with _undisturbed(model):
        path, documents, answers = _with_head(model)
        if path.head is None:
            return path
        why_not = _what_leaks(model, path.head, documents, torch.cat(answers, dim=1))
        return LossPath(path.head, packs=not why_not, why_not=why_not)


def find_scoring_path(model: nn.Module) -> LossPath:
    """``find_loss_path`` for rows side by side: whether documents may be packed is not tried."""
    with _undisturbed(model):
        return _with_head(model)[0]


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and the model's own mode again behind it."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _with_head(model: nn.Module) -> tuple[LossPath, list[Tensor], list[Tensor]]:
    """The path that does not pack, the probed documents, and the model's own logits of each."""
    head = output_head(model)
    if head is None:
        return LossPath(None, packs=False, why_not="its output head is no plain linear layer"), [], []
    documents = _probe_documents(head)
    device = head.weight.device
    answers = [model(input_ids=ids.to(device), use_cache=False).logits for ids in documents]
    pairs = zip(documents, answers, strict=True)
    if all(_agree(head.logits(_hidden_states(model, ids.to(device), None)), answer) for ids, answer in pairs):
        return LossPath(head, packs=False), documents, answers
    why_not = "its logits are not those of its output layer alone"
    return LossPath(None, packs=False, why_not=why_not), documents, answers


def _what_leaks(model: nn.Module, head: OutputHead, documents: Sequence[Tensor], wanted: Tensor) -> str:
    """Why the documents cannot be packed; empty where they can."""
    boundaries = (0, PROBE_LENGTHS[0], sum(PROBE_LENGTHS))
    try:
        with documents_attended(model):
            hidden = _hidden_states(model, torch.cat(list(documents), dim=1).to(head.weight.device), boundaries)
    except ValueError as error:
        return str(error)
    return "" if _agree(head.logits(hidden), wanted) else "packed documents are not kept apart by its layers"


def _label_states(
    model: nn.Module, token_ids: Tensor, labels: Tensor, boundaries: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """States that predict labels ``(P, width)``, the labels ``(P,)``, and the row of each ``(P,)``."""
    device = next(model.parameters()).device
    # Found on the CPU: on a device this would wait for it.
    rows, places = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    targets = labels[rows, places + 1].to(device, non_blocking=True)
    hidden = _hidden_states(model, token_ids.to(device, non_blocking=True), boundaries)
    rows, places = rows.to(device, non_blocking=True), places.to(device, non_blocking=True)
    return hidden[rows, places], targets, rows


def _hidden_states(model: nn.Module, token_ids: Tensor, boundaries: Sequence[int] | None) -> Tensor:
    """What the output head gets, shape ``(rows, tokens, width)``."""
    door: Any = model
    packing = {} if boundaries is None else _packing(boundaries, token_ids.device)
    hidden: Tensor = door.get_decoder()(input_ids=token_ids, use_cache=False, **packing).last_hidden_state
    return hidden


def _packing(boundaries: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Keywords of a packed pass: positions that begin anew in each document, and the boundaries on the CPU."""
    ends = torch.tensor(boundaries)
    positions = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(ends.diff())
    return {"position_ids": positions[None].to(device, non_blocking=True), BOUNDARIES: ends.to(torch.int32)}


def _probe_documents(head: OutputHead) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(head.weight.shape[0], (1, length), generator=generator) for length in PROBE_LENGTHS]


def _agree(found: Tensor, wanted: Tensor) -> bool:
    distance = (found.float() - wanted.float()).norm()
    return bool(distance <= AGREEMENT[wanted.dtype] * wanted.float().norm())
