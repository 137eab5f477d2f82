"""Rungs 1 and 2 by AWQ: salient inputs scaled up before rounding to nearest (arXiv 2306.00978, section 3.2).

The inverse of a layer's input scale goes into what produces that input: the norm before query, key and value and the
one before gate and up; the rows of up before down; the rows of value before the output projection where heads are not
shared. Whether that leaves the block's function as it is, is tried on a batch, so that an architecture whose norms
work otherwise is refused and not spoilt.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_trainer.numerics.awq import search_scale
from qlora_trainer.numerics.integer_weight import GridSpec, round_to_nearest
from qlora_trainer.recipe import Rounding
from qlora_trainer.stages.export.blockwise import BlockAtWork, BlockMethod, RoundedBlock
from qlora_trainer.stages.export.layerwise import gram_of, reading_alike

SAME_FUNCTION = 1e-4
"""Largest relative difference of hidden states behind a block that scaling may make: float32 sums in another order."""


class Producer(NamedTuple):
    """What gives some layers their input, by the last parts of names.

    Attributes:
        readers: last part of the names of the layers that read it.
        name: of the producer, below the block.
        is_norm: a norm, whose weight is divided; else a linear layer, whose rows are.
    """

    readers: frozenset[str]
    name: str
    is_norm: bool


# Producers that are rounded themselves come first: their rows are final before their own inputs are scaled.
PRODUCERS = (
    Producer(frozenset({"down_proj"}), "mlp.up_proj", is_norm=False),
    Producer(frozenset({"o_proj"}), "self_attn.v_proj", is_norm=False),
    Producer(frozenset({"gate_proj", "up_proj"}), "post_attention_layernorm", is_norm=True),
    Producer(frozenset({"q_proj", "k_proj", "v_proj"}), "input_layernorm", is_norm=True),
)


def awq_method(spec: GridSpec, _settings: Rounding) -> BlockMethod:
    """Rounds a block to nearest after its salient inputs were scaled."""

    def round_block(work: BlockAtWork) -> RoundedBlock:
        groups = reading_alike(work)
        weights = dict(work.merged)
        columns: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        for producer in PRODUCERS:
            readers = _readers(producer, groups)
            place = f"{work.name}.{producer.name}.weight"
            # Where several heads share a value head, an input has no row of its own there.
            if not readers or len(weights.get(place, ())) != work.merged[f"{readers[0]}.weight"].shape[1]:
                continue
            gram = gram_of(work, readers, work.merged)
            matrices = [weights[f"{module}.weight"] for module in readers]
            scale = search_scale(matrices, gram.magnitude, gram.rounded, spec)
            for module in readers:
                weights[f"{module}.weight"] = weights[f"{module}.weight"] * scale
                columns[module] = scale
            weights[place] = weights[place] / (scale if producer.is_norm else scale.unsqueeze(1))
            if not producer.is_norm:
                rows[place.removesuffix(".weight")] = scale
        _require_same_function(work, weights)
        matrices_rounded = {module: round_to_nearest(weights[f"{module}.weight"], spec) for module in work.linears}
        plain = {
            name: tensor
            for name, tensor in weights.items()
            if name.removesuffix(".weight") not in work.linears and not torch.equal(tensor, work.merged[name])
        }
        return RoundedBlock(matrices_rounded, plain, columns, rows)

    return round_block


def _readers(producer: Producer, groups: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The layers that read a producer, all of them or none."""
    wanted = [group for group in groups if {module.rpartition(".")[2] for module in group} == producer.readers]
    return wanted[0] if wanted else ()


def _require_same_function(work: BlockAtWork, weights: Mapping[str, Tensor]) -> None:
    hidden = work.before_rounded[0]
    before, after = work.call(work.merged, hidden, 0), work.call(weights, hidden, 0)
    difference = float((after - before).norm() / before.norm())
    if not difference <= SAME_FUNCTION:
        raise ValueError(
            f"{work.name}: scaling its inputs changes its outputs by {difference:.2g}: the norms of this architecture "
            "do not multiply by their weight, so AWQ cannot be folded into them. Set rounding.method: gptq"
        )
