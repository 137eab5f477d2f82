"""Rung 2: group scales tuned end to end by KL to the trained function, integers frozen.

After EfficientQAT's end-to-end phase (arXiv 2407.11062, section 3.2) and PEQA (arXiv 2305.14152), with the trained
function as teacher in place of labels. The model is never whole in memory: scales and Adam's moments of a block lie on
disk while other blocks work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.export_formats import MergeBase
from qlora_trainer.numerics.affine import Grid, dequantize
from qlora_trainer.numerics.integer_weight import GridSpec
from qlora_trainer.numerics.scales import rescaled, tuned_scale
from qlora_trainer.recipe import Rounding
from qlora_trainer.runtime.progress import counted
from qlora_trainer.runtime.weight_files import read_file, write_tensors
from qlora_trainer.stages.export.blockwise import Bench, trained_ends
from qlora_trainer.stages.export.end_to_end import kl_and_gradients
from qlora_trainer.stages.export.rounded import RoundedModel

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class TuningBlock:
    """One block's matrices with scales that can be tuned.

    Attributes:
        codes: integers by module, as stored.
        grids: their grids before tuning.
        factors: float32 logarithms of the factors that scales are multiplied by, by module.
        plain: the block's other tensors by checkpoint name.
    """

    codes: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    factors: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]

    def weights(self, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """The block's weights by checkpoint name, differentiable in ``factors``."""
        matrices = {}
        for module, codes in self.codes.items():
            grid = self.grids[module]
            scale = tuned_scale(self.factors[module], grid.scale, scale_dtype)
            matrices[f"{module}.weight"] = dequantize(codes, rescaled(grid, scale))
        return {**self.plain, **matrices}


class ScaleTuning:
    """Tunes the scales of one rounded model.

    Args:
        bench: model and calibration rows.
        into: the base whose unrounded tensors the file has.
        spec: the format's grids.
        source: the rounded model.
        state: an existing, empty folder for scales and moments at work.
    """

    def __init__(self, bench: Bench, into: MergeBase, spec: GridSpec, source: RoundedModel, state: Path) -> None:
        self.bench, self.spec, self.source, self.state = bench, spec, source, state
        self.plain = {name: self._plain(name, into) for name in bench.model.block_names}
        self.ends = trained_ends(bench)
        self.steps = 0

    def run(self, settings: Rounding) -> None:
        """All epochs; the rate falls linearly to zero."""
        total = settings.scale_epochs * len(self.bench.batches)
        for step in counted(range(total), "tuning scales", unit="steps", total=total):
            generator = torch.Generator().manual_seed(step // len(self.bench.batches))
            order = torch.randperm(len(self.bench.batches), generator=generator).tolist()
            rate = settings.scale_learning_rate * (1 - step / total)
            self.step(order[step % len(self.bench.batches)], rate)

    def step(self, batch: int, rate: float) -> float:
        """One optimizer step on one batch; gives its mean KL in nats per label token before the step."""
        self.steps += 1

        def weights_of(name: str) -> tuple[Mapping[str, Tensor], Sequence[Tensor]]:
            block = self._block(name)
            for factor in block.factors.values():
                factor.requires_grad_()
            return block.weights(self.spec.scale_dtype), tuple(block.factors.values())

        return kl_and_gradients(
            self.bench,
            self.ends,
            batch,
            weights_of=weights_of,
            on_gradients=lambda name, gradients: self._adam(name, gradients, rate),
        )

    def write(self, target: RoundedModel) -> None:
        """The tuned model: the same integers, the scales as the format's type holds them."""
        self.source.share_integers_with(target)
        for name in self.source.blocks():
            grids = {module: weight.grid for module, weight in self.source.block(name).items()}
            if name in self.plain:
                grids = {
                    module: rescaled(grid, tuned_scale(factor.cpu(), grid.scale, self.spec.scale_dtype))
                    for (module, grid), factor in zip(grids.items(), self._block(name).factors.values(), strict=True)
                }
            target.write_grids(name, grids)

    def _block(self, name: str) -> TuningBlock:
        matrices = self.source.block(name)
        file = self._state_file(name)
        state = read_file(file) if file.exists() else {}
        device = self.bench.device
        return TuningBlock(
            codes={module: weight.codes.to(device) for module, weight in matrices.items()},
            grids={
                module: Grid(weight.grid.scale.to(device), weight.grid.zero_point.to(device), weight.grid.bits)
                for module, weight in matrices.items()
            },
            factors={
                module: state[f"{module}.factor"].to(device)
                if state
                else torch.zeros_like(weight.grid.scale, device=device)
                for module, weight in matrices.items()
            },
            plain=self.plain[name],
        )

    def _adam(self, name: str, gradients: Sequence[Tensor], rate: float) -> None:
        """Adam (arXiv 1412.6980, algorithm 1) on one block's factors."""
        file = self._state_file(name)
        state = read_file(file) if file.exists() else {}
        new = {}
        for module, gradient in zip(self.source.block(name), gradients, strict=True):
            now = gradient.cpu()
            zero = torch.zeros_like(now)
            first = torch.lerp(now, state.get(f"{module}.first", zero), BETA1)
            second = torch.lerp(now * now, state.get(f"{module}.second", zero), BETA2)
            direction = (first / (1 - BETA1**self.steps)) / ((second / (1 - BETA2**self.steps)).sqrt() + EPSILON)
            new[f"{module}.factor"] = state.get(f"{module}.factor", zero) - rate * direction
            new[f"{module}.first"], new[f"{module}.second"] = first, second
        write_tensors(file, new)

    def _state_file(self, name: str) -> Path:
        return self.state / f"{name}.state.safetensors"

    def _plain(self, name: str, into: MergeBase) -> dict[str, Tensor]:
        """A block's tensors that are not rounded: norms and biases, small enough to stay."""
        model, linears = self.bench.model, self.bench.inputs.layers.quantized
        stream = self.bench.inputs.weights(
            into,
            wanted=lambda key: model.block_of(key) == name and key.removesuffix(".weight") not in linears,
        )
        plain = {key: tensor.to(self.bench.device, torch.float32) for key, tensor in stream}
        return {**plain, **{key: tensor.to(self.bench.device) for key, tensor in self.source.plain(name).items()}}
