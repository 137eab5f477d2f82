"""Rung 4: quantization-aware merging: the factors trained a little further through the exporter's own rounding.

The forward multiplies by ``Q(W + s B A)`` on a base that is off the grid (L4Q, arXiv 2402.04902; LR-QAT, arXiv
2406.06385), so that B and A learn to fall on the right side of each rounding. The gradient of the dense weight is
never formed (``numerics.merging``). What is exported is the rounding of the further trained sum.
"""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor, nn

from qlora_trainer.data.batches import BatchPlan, collate, training_micro_batches
from qlora_trainer.data.store import row_lengths
from qlora_trainer.export_formats import MergeBase
from qlora_trainer.numerics.integer_weight import GridSpec
from qlora_trainer.numerics.loss import IGNORE_INDEX, summed_nats
from qlora_trainer.numerics.low_rank import merged_weight
from qlora_trainer.numerics.merging import quantized_merged_product
from qlora_trainer.recipe import Rounding
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.causal_lm import label_logits
from qlora_trainer.runtime.progress import counted
from qlora_trainer.stages.export.inputs import ExportInputs

RATE_SHARE = 0.15
"""First rate as a share of training's peak: where a cosine schedule stands when a quarter of it is left."""

MICRO_BATCH_ROWS = 4
MAX_GRADIENT_NORM = 0.3


class AwareLinear(nn.Module):
    """A linear layer that multiplies by the rounded sum of its base and its adapter.

    Args:
        base: the layer as it was; frozen.
        lora_a: trained factor A, shape ``(r, in_features)``; copied.
        lora_b: trained factor B, shape ``(out_features, r)``; copied.
        scale: the factor s.
        spec: grids of the format.
    """

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, *, scale: float, spec: GridSpec) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(lora_a.to(base.weight.device, torch.float32, copy=True))
        self.lora_b = nn.Parameter(lora_b.to(base.weight.device, torch.float32, copy=True))
        self.scale, self.spec = scale, spec

    def forward(self, inputs: Tensor) -> Tensor:
        """``x Q(W + s B A)^T + bias``; shape ``(..., in_features)`` to ``(..., out_features)``."""
        product = quantized_merged_product(
            inputs, self.weight, self.lora_a, self.lora_b, scale=self.scale, spec=self.spec
        )
        return product if self.bias is None else product + self.bias


def aware_matrices(
    inputs: ExportInputs, into: MergeBase, spec: GridSpec, settings: Rounding
) -> Iterator[tuple[str, Tensor]]:
    """Trains the factors further and gives every matrix that is to be rounded, by module, float32.

    Holds a dense model of the base, as training did.
    """
    model = runner.from_weights(inputs.base, inputs.base_weights(into), dtype=torch.float32)
    layers = _insert(model, inputs, spec)
    _train(model, layers, inputs, settings)
    for module, layer in layers.items():
        with torch.no_grad():
            yield module, merged_weight(layer.weight, layer.lora_a, layer.lora_b, scale=layer.scale)
    for module in inputs.layers.quantized:
        if module not in layers:
            plain = model.get_submodule(module).get_parameter("weight")
            yield module, plain.detach().float()


def _insert(model: nn.Module, inputs: ExportInputs, spec: GridSpec) -> dict[str, AwareLinear]:
    """Puts aware layers in place of the adapted ones; those without an adapter are rounded for good."""
    model.requires_grad_(requires_grad=False)
    layers = {}
    factors = inputs.factors
    for module in inputs.layers.quantized:
        parent, _, name = module.rpartition(".")
        linear = model.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        if module in factors.lora_a:
            layers[module] = AwareLinear(
                linear, factors.lora_a[module], factors.lora_b[module], scale=factors.scale, spec=spec
            )
            setattr(model.get_submodule(parent), name, layers[module])
    return layers


def _train(model: nn.Module, layers: dict[str, AwareLinear], inputs: ExportInputs, settings: Rounding) -> None:
    data = inputs.data
    steps = ceil(settings.merging_share * data.steps)
    parameters = [part for layer in layers.values() for part in (layer.lora_a, layer.lora_b)]
    optimizer = torch.optim.AdamW(parameters, lr=RATE_SHARE * data.learning_rate, weight_decay=0.0)
    micro = min(MICRO_BATCH_ROWS, data.batch_size)
    plan = BatchPlan(micro, max(1, data.batch_size // micro), data.seed)
    lengths = row_lengths(data.rows)
    device = next(model.parameters()).device
    for step in counted(range(steps), "training to be rounded", unit="steps", total=steps):
        # The rows that training would have gone on with.
        batches = [
            collate(data.rows, indexes, data.pad_id)
            for indexes in training_micro_batches(data.steps + step, lengths, plan)
        ]
        tokens = sum(int((batch.labels[:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
        for batch in batches:
            logits, labels = label_logits(model, batch.token_ids.to(device), batch.labels.to(device))
            torch.autograd.backward(summed_nats(logits, labels) / tokens)
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        for group in optimizer.param_groups:
            group["lr"] = RATE_SHARE * data.learning_rate * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
