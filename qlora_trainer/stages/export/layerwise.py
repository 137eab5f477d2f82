"""Rung 1: each matrix of a block rounded so that its layer answers like the trained function's.

The layer's inputs enter as Gram matrices of the calibration tokens. GPTQ (arXiv 2210.17323) chooses integers with
second-order compensation; AWQ (arXiv 2306.00978) scales salient inputs up and rounds to nearest.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qlora_trainer.numerics.gptq import gptq, toward
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight
from qlora_trainer.recipe import Rounding
from qlora_trainer.runners.blocks import inputs_of
from qlora_trainer.stages.export.blockwise import BlockAtWork, BlockMethod, RoundedBlock

logger = logging.getLogger(__name__)


@dataclass
class Gram:
    """Second moments of one layer's inputs, summed over the real calibration tokens; float32, ``(inputs, inputs)``.

    Attributes:
        rounded: of the file's inputs with themselves.
        cross: of the trained function's inputs with the file's.
        magnitude: summed absolute values of the file's inputs, shape ``(inputs,)``.
    """

    rounded: Tensor
    cross: Tensor
    magnitude: Tensor


def gptq_method(spec: GridSpec, settings: Rounding) -> BlockMethod:
    """Rounds a block by GPTQ toward the layer outputs of the trained function.

    Where errors of earlier blocks have changed a layer's inputs, or the merged weight is not the trained function's,
    the weight is first moved to the one whose outputs on the file's inputs are nearest to the trained function's on
    its own.
    """

    def round_block(work: BlockAtWork) -> RoundedBlock:
        rounded: dict[str, IntegerWeight] = {}
        file = dict(work.merged)
        for modules in reading_alike(work):
            gram = gram_of(work, modules, file)
            for module in modules:
                rounded[module] = _solve(work, module, gram, spec, settings)
                file[f"{module}.weight"] = rounded[module].dequantized()
        return RoundedBlock(rounded)

    return round_block


def _solve(work: BlockAtWork, module: str, gram: Gram, spec: GridSpec, settings: Rounding) -> IntegerWeight:
    name = f"{module}.weight"
    try:
        wanted = toward(work.merged[name], gram.rounded, gram.cross, work.trained[name], damping=settings.damping)
        solved = gptq(wanted, gram.rounded, spec, damping=settings.damping, activation_order=settings.activation_order)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error
    if solved.damping > settings.damping:
        logger.warning("%s: its Gram matrix is singular; damping raised to %.3g", module, solved.damping)
    return solved.weight


def reading_alike(work: BlockAtWork) -> list[tuple[str, ...]]:
    """A block's layers in groups that read the very same tensor, in the order of the block's definition."""
    with inputs_of(work.module, work.name, work.linears) as seen:
        inputs = _inputs(work, work.merged, work.before_rounded[0], 0, seen)
    groups: dict[int, list[str]] = {}
    for module, tensor in inputs.items():
        groups.setdefault(tensor.data_ptr(), []).append(module)
    return [tuple(modules) for modules in groups.values()]


def gram_of(work: BlockAtWork, modules: tuple[str, ...], file: Mapping[str, Tensor]) -> Gram:
    """The Gram matrix of layers that read the same tensor.

    Args:
        work: the block.
        modules: the layers.
        file: the block's weights as they are in the file so far, by checkpoint name: a layer's inputs are those that
            the rounding of earlier blocks and of earlier layers of this block leaves.
    """
    first = modules[0]
    total: Gram | None = None
    with inputs_of(work.module, work.name, [first]) as seen:
        for number, batch in enumerate(work.batches):
            theirs = _inputs(work, work.trained, work.before_trained[number], number, seen)[first][batch.real].float()
            ours = _inputs(work, file, work.before_rounded[number], number, seen)[first][batch.real].float()
            if total is None:
                total = Gram(ours.T @ ours, theirs.T @ ours, ours.abs().sum(dim=0))
            else:
                total.rounded.addmm_(ours.T, ours)
                total.cross.addmm_(theirs.T, ours)
                total.magnitude.add_(ours.abs().sum(dim=0))
    assert total is not None
    return total


def _inputs(
    work: BlockAtWork, weights: Mapping[str, Tensor], hidden: Tensor, number: int, seen: dict[str, list[Tensor]]
) -> dict[str, Tensor]:
    """What each listened-to layer reads when a batch passes the block."""
    for tensors in seen.values():
        tensors.clear()
    work.call(weights, hidden, number)
    silent = [module for module, tensors in seen.items() if len(tensors) != 1]
    if silent:
        calls = ", ".join(f"{module} ({len(seen[module])} times)" for module in silent)
        raise ValueError(
            f"{calls}: layer-wise rounding needs layers that are called once in a forward pass; set "
            "ladder.start_rung_int4: 3"
        )
    return {module: tensors[0] for module, tensors in seen.items()}
