"""A transformers causal language model run one decoder block at a time, never in memory as a whole.

Memory holds the embeddings, the output head, one block and activations. The model's own forward does everything
outside the blocks: with stand-ins for the blocks it is run once to learn the first block's input and the arguments
that each block is called with, and once more for what follows the last block. So masks, position embeddings,
scalings and caps are those of the architecture, and the logits have the bits of the whole model.

Rows are right-padded and go without an attention mask, as in ``runners.causal_lm``. Where weights come from is not
known here.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.errors import BaseModelError
from qlora_trainer.numerics.loss import label_positions
from qlora_trainer.runners import transformers
from qlora_trainer.runtime.device import choose_device

# What a block would keep of earlier tokens; it must not, whatever the model passes.
_NO_CACHE = {"use_cache": False, "past_key_values": None, "past_key_value": None, "layer_past": None}


@dataclass(frozen=True)
class Call:
    """Arguments that the model calls one block with, the hidden states before them left out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """What the blocks are given for one batch.

    Attributes:
        hidden: input of the first block, shape ``(rows, tokens, d)``.
        calls: one per block.
    """

    hidden: Tensor
    calls: tuple[Call, ...]


class _NotPassedThrough(Exception):  # noqa: N818 - a sign to ``start``, nobody else sees it
    """A block's input is not the output of the block before it."""


class BlockwiseModel:
    """A causal language model in evaluation mode whose decoder blocks come into memory one at a time.

    Attributes:
        block_names: of each decoder block in the checkpoint, in order, such as ``model.layers.0``.
        device: where work is done, and where everything in memory is.
        dtype: of every weight in memory.
    """

    def __init__(
        self,
        folder: Path,
        rest: Iterable[tuple[str, Tensor]],
        *,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Reads the architecture from a folder's config.json and takes what lies outside the blocks into memory.

        Args:
            folder: its weights are not read.
            rest: every tensor outside the blocks by checkpoint name; a tied output head may be left out, tensors of
                blocks are passed over.
            dtype: that weights are cast to.
            trust_remote_code: run code that comes with the model.
            device: to work on; None chooses as ``runtime.device`` does.

        Raises:
            BaseModelError: transformers does not know the architecture, it has no list of blocks with linear layers,
                or tensors are missing or of another shape.
        """
        self.dtype = dtype
        self.device = device or choose_device()
        self._model = transformers.skeleton(folder, trust_remote_code=trust_remote_code, buffers_for=dtype)
        self._model.requires_grad_(requires_grad=False)
        _move_buffers(self._model, self.device)
        list_name, self._blocks = self._block_list()
        self._prefix = f"{list_name}."
        self.block_names = tuple(f"{self._prefix}{index}" for index in range(len(self._blocks)))
        # Decoder layers of some architectures give a tuple, hidden states first; ``start`` finds out.
        self._gives_tuple = False
        self._take_rest(folder, rest)

    def block_of(self, tensor_name: str) -> str | None:
        """Name of the block that a checkpoint's tensor belongs to, None where it lies outside them."""
        name = self._prefix + tensor_name.removeprefix(self._prefix).split(".")[0]
        return name if tensor_name.startswith(f"{name}.") and name in self.block_names else None

    @contextmanager
    def block(self, index: int, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """A block with its weights, frozen; afterwards it holds none.

        Weights that are on the device and of the type already are not copied: changing them changes the caller's.

        Args:
            index: of the block.
            weights: every tensor of the block by checkpoint name; others are refused.

        Raises:
            BaseModelError: tensors are missing, unknown or of another shape; names all of them.
        """
        block, prefix = self._blocks[index], f"{self.block_names[index]}."
        empty = block.state_dict()
        expected = {prefix + name: tensor for name, tensor in empty.items()}
        given = {
            name: weight
            for name, weight in weights.items()
            if name in expected or not name.endswith(transformers.LEFTOVER)
        }
        problems = [f"  {name}: missing" for name in sorted(expected.keys() - given)]
        problems += [f"  {name}: unexpected" for name in sorted(given.keys() - expected)]
        problems += transformers.misshapen(expected, given)
        if problems:
            raise BaseModelError("\n".join([f"{self.block_names[index]}: the weights do not fit the block", *problems]))
        held = {name.removeprefix(prefix): self._held(weight) for name, weight in given.items()}
        block.load_state_dict(held, assign=True)
        try:
            yield block
        finally:
            # Frozen first, because a tensor that is assigned trains if the one before it did.
            block.requires_grad_(requires_grad=False).load_state_dict(empty, assign=True)
            held.clear()

    @torch.no_grad()
    def start(self, token_ids: Tensor) -> Start:
        """The first block's input and what each block is called with, found by one forward without the blocks.

        Args:
            token_ids: int64, shape ``(rows, tokens)``, right-padded.

        Raises:
            BaseModelError: the architecture does not hand hidden states from block to block.
        """
        cause: Exception | None = None
        for gives_tuple in (self._gives_tuple, not self._gives_tuple):
            try:
                start = self._recorded(token_ids, gives_tuple=gives_tuple)
            # The wrong one of a tensor and a tuple may also fail in the model's own code.
            except (_NotPassedThrough, AttributeError, TypeError) as error:
                cause = error
            else:
                self._gives_tuple = gives_tuple
                return start
        raise BaseModelError(
            f"{type(self._model).__name__} cannot be run block by block: it does not call {self.block_names[0]} to "
            f"{self.block_names[-1]} in order, each with the hidden states that the one before gave. Choose a model of "
            "another architecture."
        ) from cause

    def run(self, block: Callable[..., Any], index: int, hidden: Tensor, start: Start) -> Tensor:
        """Hidden states behind a block; differentiable.

        Args:
            block: of ``block``, or anything that is called like it.
            index: of the block.
            hidden: its input, shape ``(rows, tokens, d)``.
            start: of the same rows.
        """
        call = start.calls[index]
        output = block(hidden, *call.args, **call.kwargs)
        behind: Tensor = output if isinstance(output, Tensor) else output[0]
        return behind

    def logits(self, hidden: Tensor, token_ids: Tensor, positions: Tensor | int) -> Tensor:
        """What follows the last block: final norm, output head, caps; differentiable in the hidden states.

        Args:
            hidden: output of the last block, shape ``(rows, tokens, d)``.
            token_ids: int64, shape ``(rows, tokens)``, which the hidden states belong to.
            positions: int64 of shape ``(kept,)``, the positions whose logits are wanted; 0 for all.

        Returns:
            Shape ``(rows, kept, vocabulary)``.
        """
        return self._forward(token_ids, positions, lambda *_args, **_kwargs: (hidden,) if self._gives_tuple else hidden)

    def _block_list(self) -> tuple[str, nn.ModuleList]:
        """The list of modules that holds most of the linear layers' weights; an outer one before one inside it."""
        linear = transformers.linear_modules(self._model)
        lists = {name: module for name, module in self._model.named_modules() if isinstance(module, nn.ModuleList)}
        weights = {
            name: sum(rows * columns for inner, (rows, columns) in linear.items() if inner.startswith(f"{name}."))
            for name in lists
        }
        name = max(weights, key=weights.__getitem__, default="")
        if not weights.get(name):
            raise BaseModelError(
                f"{type(self._model).__name__} cannot be run block by block: it has no list of modules with linear "
                "layers in them. Choose a model of another architecture."
            )
        return name, lists[name]

    def _take_rest(self, folder: Path, rest: Iterable[tuple[str, Tensor]]) -> None:
        expected = {name: part for name, part in self._model.state_dict().items() if self.block_of(name) is None}
        given = {name: self._held(tensor) for name, tensor in rest if self.block_of(name) is None}
        transformers.take_weights(self._model, expected, given, where=folder, what="the weights outside the blocks")

    def _held(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def _recorded(self, token_ids: Tensor, *, gives_tuple: bool) -> Start:
        """One forward with stand-ins that give their input on, as a new tensor so that it can be told apart."""
        passed: list[Tensor] = []
        calls: list[Call] = []

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            hidden, call = _split(args, kwargs)
            if index != len(calls) or (passed and hidden is not passed[-1]):
                raise _NotPassedThrough
            passed.append(hidden.detach())
            calls.append(call)
            return (passed[-1],) if gives_tuple else passed[-1]

        # One position, so that the output head has little to do.
        self._forward(token_ids, 1, stand_in)
        if len(calls) != len(self.block_names):
            raise _NotPassedThrough
        return Start(hidden=passed[0], calls=tuple(calls))

    def _forward(self, token_ids: Tensor, positions: Tensor | int, stand_in: Callable[..., Any]) -> Tensor:
        """Logits of the model with ``stand_in(index, ...)`` in place of each block's forward."""
        # A block's forward is replaced, not the block: models look at attributes of their blocks.
        for index, block in enumerate(self._blocks):
            vars(block)["forward"] = partial(stand_in, index)
        try:
            found: Tensor = self._model(
                input_ids=token_ids.to(self.device), use_cache=False, logits_to_keep=positions
            ).logits
        finally:
            for block in self._blocks:
                del vars(block)["forward"]
        return found


def streamed_label_logits(
    model: BlockwiseModel,
    read_block: Callable[[str], Mapping[str, Tensor]],
    batches: Sequence[tuple[Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """What ``runners.causal_lm.label_logits`` gives for each batch, all batches passing block after block.

    Each block is read once. The hidden states of all batches are in memory at the same time.

    Args:
        model: with everything but the blocks.
        read_block: gives the weights of a block by checkpoint name.
        batches: token ids and labels, int64 of shape ``(rows, tokens)``.

    Yields:
        Logits ``(rows, kept, vocabulary)`` and labels ``(rows, kept)`` of each batch, in order.

    Raises:
        BaseModelError: as ``BlockwiseModel.start`` and ``BlockwiseModel.block``.
    """
    reached = [model.start(token_ids) for token_ids, _ in batches]
    for index, name in enumerate(model.block_names):
        with model.block(index, read_block(name)) as block:
            for number, at in enumerate(reached):
                reached[number] = replace(at, hidden=model.run(block, index, at.hidden, at))
    for at, (token_ids, labels) in zip(reached, batches, strict=True):
        positions, kept = label_positions(labels.to(model.device))
        yield model.logits(at.hidden, token_ids, positions), kept


@contextmanager
def inputs_of(block: nn.Module, prefix: str, modules: Collection[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collects what linear layers are given while the block runs.

    Args:
        block: as ``BlockwiseModel.block`` gives it.
        prefix: its name in the checkpoint.
        modules: names of its layers in the checkpoint.

    Yields:
        One list per name that grows by one tensor ``(rows, tokens, in_features)`` at each run, detached, not copied;
        the caller clears the lists.

    Raises:
        ValueError: a name is not that of a layer in the block.
    """
    inside = {f"{prefix}.{name}": module for name, module in block.named_modules() if name}
    strangers = sorted(set(modules) - inside.keys())
    if strangers:
        raise ValueError(f"{', '.join(strangers)}: not in the block {prefix}, which has {', '.join(inside)}")
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[name].append(args[0].detach())

    handles = [inside[name].register_forward_pre_hook(partial(keep, name)) for name in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states that a block was called with, and everything else but caches."""
    if not args:
        args = (kwargs.get("hidden_states"),)
    if not isinstance(args[0], Tensor):
        raise _NotPassedThrough
    others = {name: _NO_CACHE.get(name, value) for name, value in kwargs.items() if name != "hidden_states"}
    return args[0], Call(args=args[1:], kwargs=others)
