"""Rung 1: each matrix of a block rounded so that its layer answers like the trained function's.

The layer's inputs enter as Gram matrices of the calibration tokens. GPTQ (arXiv 2210.17323) chooses integers with
second-order compensation; AWQ (arXiv 2306.00978) scales salient inputs up and rounds to nearest.
"""

import logging
from collections.abc import Mapping, Sequence
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
        return RoundedBlock(
            {
                module: _solve(work, module, gram, spec, settings)
                for modules, gram in grams_of(work).items()
                for module in modules
            }
        )

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


def grams_of(work: BlockAtWork) -> dict[tuple[str, ...], Gram]:
    """Gram matrices of a block's layers; layers that read the same tensor share one.

    Both streams pass the unrounded block: a layer's inputs are those that the rounding of earlier blocks left.
    """
    sums: dict[tuple[str, ...], Gram] = {}
    with inputs_of(work.module, work.name, work.linears) as seen:
        for number, batch in enumerate(work.batches):
            trained = _inputs(work, work.trained, work.before_trained[number], number, seen)
            rounded = _inputs(work, work.merged, work.before_rounded[number], number, seen)
            for modules in _sharing(rounded, tuple(sums)):
                ours = rounded[modules[0]][batch.real].float()
                theirs = trained[modules[0]][batch.real].float()
                gram = sums.get(modules)
                if gram is None:
                    sums[modules] = Gram(ours.T @ ours, theirs.T @ ours, ours.abs().sum(dim=0))
                else:
                    gram.rounded.addmm_(ours.T, ours)
                    gram.cross.addmm_(theirs.T, ours)
                    gram.magnitude.add_(ours.abs().sum(dim=0))
    return sums


def _inputs(
    work: BlockAtWork, weights: Mapping[str, Tensor], hidden: Tensor, number: int, seen: dict[str, list[Tensor]]
) -> dict[str, Tensor]:
    """What each layer reads when a batch passes the block."""
    for tensors in seen.values():
        tensors.clear()
    work.call(weights, hidden, number)
    silent = [module for module in work.linears if len(seen[module]) != 1]
    if silent:
        calls = ", ".join(f"{module} ({len(seen[module])} times)" for module in silent)
        raise ValueError(
            f"{calls}: GPTQ needs layers that are called once in a forward pass; set rounding.method: awq or "
            "ladder.start_rung_int4: 3"
        )
    return {module: tensors[0] for module, tensors in seen.items()}


def _sharing(inputs: Mapping[str, Tensor], known: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """Groups of modules that read the very same tensor."""
    if known:
        return known
    groups: dict[int, list[str]] = {}
    for module, tensor in inputs.items():
        groups.setdefault(tensor.data_ptr(), []).append(module)
    return [tuple(modules) for modules in groups.values()]
