"""Low-rank factors and the weights they stand for: products, merges, principal parts.

Everything is float32, because a merge takes each product once and what rounding takes from a small
delta is not given back. W is ``weight`` of shape ``(out_features, in_features)``, A is ``lora_a`` of shape
``(r, in_features)``, B is ``lora_b`` of shape ``(out_features, r)`` and s is ``scale``: alpha / r for LoRA
(arXiv 2106.09685), alpha / sqrt(r) for rsLoRA (arXiv 2312.03732). Nothing here knows modules or files.
"""

import torch
from torch import Tensor


def delta_weight(lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """Weight change that a trained pair of factors stands for: ``s B A``.

    The product is taken in float32, whatever the factors are stored in: a bfloat16
    product of rank 64 is off by 0.3 % of its largest entry, and merging takes it only once.

    Args:
        lora_a: down-projection A, shape ``(r, in_features)``.
        lora_b: up-projection B, shape ``(out_features, r)``.
        scale: the factor s, not alpha.

    Returns:
        float32 tensor of shape ``(out_features, in_features)``, on the factors' device.

    Raises:
        ValueError: the two inner dimensions differ.
    """
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_b.shape[1] != lora_a.shape[0]:
        raise ValueError(
            f"lora_b {tuple(lora_b.shape)} times lora_a {tuple(lora_a.shape)}: "
            "want (out_features, r) times (r, in_features)"
        )
    return scale * (lora_b.float() @ lora_a.float())


def merged_weight(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float, magnitude: Tensor | None = None
) -> Tensor:
    """Weight of one plain linear layer that computes what layer and adapter compute together.

    LoRA and rsLoRA: ``W + s B A``. DoRA (arXiv 2402.09353, section 4.1): ``m (W + s B A) / ||W + s B A||``, with the
    norm over each output's row. A row of zeros has no direction and stays zero.

    Args:
        weight: the base that the adapter goes into, any float type; not changed.
        lora_a: factor A.
        lora_b: factor B.
        scale: the factor s.
        magnitude: DoRA's m, shape ``(out_features,)``; absent for LoRA and rsLoRA.

    Returns:
        float32 tensor of the weight's shape, on its device.

    Raises:
        ValueError: shapes that do not belong together.
    """
    delta = delta_weight(lora_a, lora_b, scale=scale)
    if delta.shape != weight.shape:
        raise ValueError(f"the factors give {tuple(delta.shape)}, the weight is {tuple(weight.shape)}")
    merged = weight.float() + delta
    if magnitude is None:
        return merged
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(
            f"magnitude must hold one value per output, ({weight.shape[0]},), got {tuple(magnitude.shape)}"
        )
    row_norm = torch.linalg.vector_norm(merged, dim=1)
    # 1 in place of 0 leaves a row of zeros as it is; peft divides and gives NaN there.
    safe_norm = torch.where(row_norm == 0, 1.0, row_norm)
    return (magnitude.float() / safe_norm).unsqueeze(1) * merged


def principal_factors(weight: Tensor, rank: int, *, scale: float) -> tuple[Tensor, Tensor]:
    """Factors A and B for which ``s B A`` is the best approximation of a matrix among those of its rank.

    By truncated singular value decomposition (Eckart and Young), each factor taking the root of the singular
    values. Of a weight these are PiSSA's factors (arXiv 2404.02948, section 3); of what quantization lost,
    ``W - dequantize(quantize(W))``, they are LoftQ's after one iteration (arXiv 2310.08659, section 3.2).
    The sign of a singular pair is LAPACK's choice: the product is repeatable across machines, the factors are not.

    Args:
        weight: matrix to approximate, any float type, shape ``(out_features, in_features)``.
        rank: r, at most the smaller side.
        scale: the factor s that will stand before the product; above 0.

    Returns:
        A of shape ``(r, in_features)`` and B of shape ``(out_features, r)``, float32, on the weight's device.

    Raises:
        ValueError: the rank or the scale is out of range.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank must be 1 to {min(weight.shape)} for a weight of {tuple(weight.shape)}, got {rank}")
    if scale <= 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    left, singular, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (singular[:rank] / scale).sqrt()
    return root.unsqueeze(1) * right[:rank], left[:, :rank] * root


def survived_share(delta: Tensor, carried: Tensor) -> float:
    """Share of a weight change that is still there after rounding: ``<carried, delta> / <delta, delta>``.

    With ``carried = round(W + delta) - W`` this is the dead-zone meter: 0 where every weight fell back to its own
    code, 1 where rounding kept the change on average. The projection ignores rounding noise that points elsewhere,
    but for chance: an independent error of the delta's own norm over n weights moves it by about 1 / sqrt(n), so it
    can pass 1.

    Args:
        delta: the change that was to be carried, any float type.
        carried: the change that is there, same shape.

    Returns:
        The share, summed in float64; 1 where ``delta`` is all zero, as nothing could be lost.

    Raises:
        ValueError: the shapes differ.
    """
    if delta.shape != carried.shape:
        raise ValueError(f"delta {tuple(delta.shape)} and carried {tuple(carried.shape)} must have one shape")
    wanted = delta.double()
    size = (wanted * wanted).sum().item()
    return (wanted * carried.double()).sum().item() / size if size > 0 else 1.0
