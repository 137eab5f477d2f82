"""Learned rounding: an offset per weight and a narrower range per group, trained by the signs of gradients.

Rung 3 of the export ladder, after SignRound and AutoRound (arXiv 2309.05516, section 3):
``q = clamp(round(W / S + V) + z, q_min, q_max)`` with V in [-1/2, 1/2] per weight, and S and z those of the group's
min-max range times factors alpha (its low end) and beta (its high end) in (0, 1]. ``soft`` gives the reals with
gradients for all of these; ``hard`` gives the same reals as integers on a grid. What the reals are trained towards is
not known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from qlora_trainer.numerics.affine import Grid, integer_range, quantize
from qlora_trainer.numerics.clipping import fit_range, ranges
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight

NARROWEST: Final = 0.1
"""Smallest share of a group's range that clip factors may reach; at 0 there would be no step."""


@dataclass(frozen=True)
class LearnedRounding:
    """What is trained for one weight; all are leaves that require gradients.

    Attributes:
        offset: V, float32, shape ``(out_features, in_features)``, from -1/2 to 1/2.
        clip: shares of the group's min-max range, float32, shape ``(rows, groups)``, from ``NARROWEST`` to 1: one
            tensor for a symmetric grid, two (low end, high end) for the others.
    """

    offset: Tensor
    clip: tuple[Tensor, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        """Offset, then clip factors."""
        return (self.offset, *self.clip)


def initial(weight: Tensor, spec: GridSpec) -> LearnedRounding:
    """Parameters that stand for rounding to nearest on the min-max grid: no offset, the whole range.

    Args:
        weight: any float type, shape ``(out_features, in_features)``.
        spec: the format's grids.

    Raises:
        ValueError: a group that does not divide the rows, or a value that is not finite.
    """
    low, _ = ranges(weight, spec)
    clip = tuple(torch.ones_like(low, requires_grad=True) for _ in range(1 if spec.offset == "none" else 2))
    return LearnedRounding(torch.zeros_like(weight, dtype=torch.float32, requires_grad=True), clip)


def soft(weight: Tensor, parameters: LearnedRounding, spec: GridSpec) -> Tensor:
    """The reals of ``hard``, bit for bit, with gradients for the parameters; none for the weight.

    Rounding passes gradients straight through: of W / S + V, of the zero point, and of scales and minima to the type
    that the format stores. Where an integer is clamped, its offset takes none.

    Args:
        weight: any float type, shape ``(out_features, in_features)``.
        parameters: of ``initial`` for the same weight.
        spec: the format's grids.

    Returns:
        float32, shape of ``weight``.

    Raises:
        ValueError: as ``hard``.
    """
    low, high = parameters.clip[0], parameters.clip[-1]
    result: Tensor = _LearnedReals.apply(weight, parameters.offset, low, high, spec)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return result


def hard(weight: Tensor, parameters: LearnedRounding, spec: GridSpec) -> IntegerWeight:
    """The integers that the parameters stand for, and their grid.

    Args:
        weight: any float type, shape ``(out_features, in_features)``.
        parameters: of ``initial`` for the same weight.
        spec: the format's grids.

    Raises:
        ValueError: shapes that do not belong together, or values that are not finite.
    """
    with torch.no_grad():
        return _rounded(weight, parameters.offset, parameters.clip[0], parameters.clip[-1], spec)


def sign_step(parameters: LearnedRounding, learning_rate: float) -> None:
    """Changes the parameters by one step of signed gradient descent, keeps them within their bounds, drops gradients.

    A parameter moves by ``learning_rate`` against its gradient's sign; by nothing where the gradient is 0
    (arXiv 2309.05516, section 3). Rates of 1 / steps, falling linearly, let an offset travel its whole half.

    Keep the parameters of the least loss seen, not the last: a gradient that is passed straight through never
    vanishes, and drives offsets to the tie between two integers. On random layers of 64 and 256 inputs, 200 steps, the
    last step lost 0.7 to 2.0 of what rounding to nearest loses, the best one 0.7 to 0.97, and 0.6 to 0.94 where
    each step saw another quarter of the tokens.

    Raises:
        ValueError: a parameter has no gradient, or one that is not finite.
    """
    with torch.no_grad():
        for index, tensor in enumerate(parameters.tensors()):
            if tensor.grad is None:
                raise ValueError("a parameter of the rounding has no gradient; call backward on a loss of soft() first")
            if not bool(torch.isfinite(tensor.grad).all()):
                raise ValueError("gradients of the rounding are NaN or infinite; the loss that gave them is not finite")
            tensor.sub_(learning_rate * tensor.grad.sign())
            tensor.clamp_(*((-0.5, 0.5) if index == 0 else (NARROWEST, 1.0)))
            tensor.grad = None


class _LearnedReals(torch.autograd.Function):
    """``S (q - z)``; see ``backward`` for the derivatives. Everything but the arguments is computed anew there."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, offset: Tensor, low: Tensor, high: Tensor, spec: GridSpec) -> Tensor:
        ctx.save_for_backward(weight, offset, low, high)
        ctx.spec = spec  # type: ignore[attr-defined]  # torch keeps what is no tensor so
        return _rounded(weight, offset, low, high, spec).dequantized()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: BackwardCFunction, gradient: Tensor
    ) -> tuple[None, Tensor | None, Tensor | None, Tensor | None, None]:
        """With G the gradient and I = 1 where no integer is clamped, sums running over the group.

        ``dV = G S I``; ``dS = sum G (q - z - I W / S)``; ``dz = -S sum G (1 - I)``. The range
        ``[alpha low, beta high]`` over L steps gives ``S = (beta high - alpha low) / L`` and
        ``z = q_min - alpha low / S``. A symmetric range gives ``S = 2 beta limit / L``.
        """
        saved: Sequence[Tensor] = ctx.saved_tensors
        weight, offset, low, high = saved
        spec: GridSpec = ctx.spec  # type: ignore[attr-defined]  # set in forward
        rounded = _rounded(weight, offset, low, high, spec)
        grid, shape = rounded.grid, (*rounded.grid.scale.shape, -1)
        scale, zero_point = grid.scale.unsqueeze(-1), grid.zero_point.float().unsqueeze(-1)
        passed, values = gradient.reshape(shape), weight.float().reshape(shape) / scale
        inside = _is_inside(values + offset.reshape(shape), grid)
        by_offset = (passed * scale * inside).reshape(weight.shape)
        steps = rounded.codes.reshape(shape) - zero_point - inside * values
        by_scale = (passed * steps).sum(dim=-1)
        by_zero_point = -grid.scale * (passed * ~inside).sum(dim=-1)
        by_low, by_high = _by_clip(by_scale, by_zero_point, grid, ranges(weight, spec), low, spec)
        return None, by_offset, by_low, by_high, None


def _by_clip(
    by_scale: Tensor,
    by_zero_point: Tensor,
    grid: Grid,
    widest: tuple[Tensor, Tensor],
    low_factor: Tensor,
    spec: GridSpec,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the two clip factors; for a symmetric range one, as the second."""
    low, high = widest
    smallest, largest = integer_range(spec.bits)
    steps = largest - smallest
    if spec.offset == "none":
        return None, by_scale * 2 * high / steps
    # z = q_min - alpha low / S, so that dz/dS = alpha low / S^2, and dz/dalpha = -low / S with S held.
    whole = by_scale + by_zero_point * low_factor * low / grid.scale.square()
    return -whole * low / steps - by_zero_point * low / grid.scale, whole * high / steps


def _is_inside(steps: Tensor, grid: Grid) -> Tensor:
    """Where ``quantize`` clamps nothing; steps are values in units of the scale, shape ``(rows, groups, size)``."""
    smallest, largest = integer_range(grid.bits)
    zero_point = grid.zero_point.unsqueeze(-1)
    is_real = grid.zero_point.is_floating_point()
    codes = torch.round(steps + zero_point) if is_real else torch.round(steps) + zero_point
    return (codes >= smallest) & (codes <= largest)


def _rounded(weight: Tensor, offset: Tensor, low_factor: Tensor, high_factor: Tensor, spec: GridSpec) -> IntegerWeight:
    if offset.shape != weight.shape:
        raise ValueError(f"offsets of shape {tuple(offset.shape)} do not fit a weight of {tuple(weight.shape)}")
    low, high = ranges(weight, spec)
    grid = fit_range(low * low_factor, high * high_factor, spec)
    # An offset in steps is one in reals times the step, so that the exporter's own rounding chooses the integers.
    moved = weight.float() + (offset.reshape(*grid.scale.shape, -1) * grid.scale.unsqueeze(-1)).reshape(weight.shape)
    return IntegerWeight(quantize(moved, grid), grid)
