"""Rung 5: the layers whose rounding costs most KL get 8 bits.

Near the trained function the KL of a file is quadratic in its weights' errors, ``KL = e^T F e / 2`` with e the errors
of all layers. Its gradient at the file is ``F e``, so the products ``<gradient, error>`` of single layers add up to
twice the KL: each is the layer's share. One backward pass gives them all, where leaving out layer by layer would take
a pass for each.
"""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from qlora_trainer.export_formats import MergeBase
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, round_to_nearest
from qlora_trainer.runtime.progress import counted
from qlora_trainer.stages.export.blockwise import Bench, trained_ends
from qlora_trainer.stages.export.end_to_end import kl_and_gradients
from qlora_trainer.stages.export.rounded import RoundedModel

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def worst_layers(bench: Bench, into: MergeBase, spec: GridSpec, rounded: RoundedModel | None) -> list[str]:
    """Modules to give more bits, the most KL per parameter first, up to the recipe's share of all parameters.

    Args:
        bench: the model and the calibration rows.
        into: base of the merged weights that were rounded.
        spec: the format's grids.
        rounded: how they were rounded; None = to nearest.
    """
    shares = kl_shares(bench, into, spec, rounded)
    sizes = {module: rows * columns for module, (rows, columns) in bench.inputs.layers.quantized.items()}
    room = bench.inputs.rounding.raised_share * sum(sizes.values())
    units = _fused(shares)
    cost = {unit: sum(shares[module] for module in unit) / sum(sizes[module] for module in unit) for unit in units}
    chosen: list[str] = []
    for unit in sorted(units, key=cost.__getitem__, reverse=True):
        needed = sum(sizes[module] for module in unit)
        if needed <= room:
            chosen += unit
            room -= needed
    return chosen


def _fused(modules: Collection[str]) -> list[tuple[str, ...]]:
    """Modules that serving runtimes compute in one multiplication, and therefore want stored alike."""
    units: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        parent, _, name = module.rpartition(".")
        together = next((members[0] for members in FUSED if name in members), name)
        units.setdefault((parent, together), []).append(module)
    return [tuple(members) for members in units.values()]


def kl_shares(bench: Bench, into: MergeBase, spec: GridSpec, rounded: RoundedModel | None) -> dict[str, float]:
    """Each module's share of twice the file's KL, in nats per label token, averaged over the calibration batches.

    Arguments as for ``worst_layers``.
    """
    shares: dict[str, float] = {}
    ends = trained_ends(bench)
    errors: dict[str, dict[str, Tensor]] = {}

    def weights_of(name: str) -> tuple[Mapping[str, Tensor], Sequence[Tensor]]:
        merged = bench.weights_of(name, into)
        matrices = _matrices(bench, name, merged, spec, rounded)
        errors.clear()
        errors[name] = {module: matrix - merged[f"{module}.weight"] for module, matrix in matrices.items()}
        leaves = {module: matrix.requires_grad_() for module, matrix in matrices.items()}
        return {**merged, **{f"{module}.weight": leaf for module, leaf in leaves.items()}}, tuple(leaves.values())

    def on_gradients(name: str, gradients: Sequence[Tensor]) -> None:
        for (module, error), gradient in zip(errors[name].items(), gradients, strict=True):
            share = float((gradient.double() * error.double()).sum()) / len(bench.batches)
            shares[module] = shares.get(module, 0.0) + share

    batches = len(bench.batches)
    for batch in counted(range(batches), "finding the worst layers", unit="batches", total=batches):
        kl_and_gradients(bench, ends, batch, weights_of=weights_of, on_gradients=on_gradients)
    return shares


def _matrices(
    bench: Bench, name: str, merged: Mapping[str, Tensor], spec: GridSpec, rounded: RoundedModel | None
) -> dict[str, Tensor]:
    found: Mapping[str, IntegerWeight]
    if rounded is None:
        found = {module: round_to_nearest(merged[f"{module}.weight"], spec) for module in bench.linears_of(name)}
    else:
        found = rounded.block(name)
    return {module: weight.dequantized().to(bench.device) for module, weight in found.items()}
