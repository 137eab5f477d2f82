"""SmoothQuant on a whole model: alpha searched for each norm, its scale folded into norm and weights.

arXiv 2211.10438, section 4: layers that read a norm (query, key and value; gate and up) are smoothed, because the norm
takes the inverse scale at no cost. Layers that read anything else stay as they are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlora_trainer.numerics.smoothing import Smoothing, search_smoothing
from qlora_trainer.stages.compare.walking import BlockInView

SAME_FUNCTION = 1e-4
"""Largest relative difference of hidden states behind a block that folding may make: float32 sums in another order."""


def smoothed_block(block: BlockInView) -> tuple[dict[str, Tensor], dict[str, Smoothing]]:
    """A block's weights with every smoothing folded in: the same function in full precision, other numbers to round.

    Args:
        block: with calibration rows.

    Returns:
        All weights of the block by checkpoint name, float32; and each smoothing by the norm's name.

    Raises:
        ValueError: folding changes what the block computes, as where a norm multiplies by ``1 + weight``.
    """
    weights, found = dict(block.weights), dict[str, Smoothing]()
    for norm, readers in block.readers_by_norm.items():
        matrices = [weights[f"{module}.weight"] for module in readers]
        smoothing = search_smoothing(matrices, block.inputs[readers[0]])
        found[norm] = smoothing
        for module in readers:
            weights[f"{module}.weight"] = weights[f"{module}.weight"] * smoothing.scale
        for part in ("weight", "bias"):
            if f"{norm}.{part}" in weights:
                weights[f"{norm}.{part}"] = weights[f"{norm}.{part}"] / smoothing.scale
    _require_same_function(block, weights)
    return weights, found


@torch.no_grad()
def _require_same_function(block: BlockInView, weights: Mapping[str, Tensor]) -> None:
    before, after = block.call(block.weights, block.hidden[0], 0), block.call(weights, block.hidden[0], 0)
    difference = float((after - before).norm() / before.norm().clamp(min=torch.finfo(torch.float32).tiny))
    if not difference <= SAME_FUNCTION:
        raise ValueError(
            f"{block.name}: folding SmoothQuant's scales changes its outputs by {difference:.2g}: the norms of this "
            "architecture do not multiply by their weight"
        )
