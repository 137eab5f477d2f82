"""Affine integer quantization restated value by value on Python numbers (QUANTIZATION, section 1)."""


def integer_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def scale_and_zero_point(low: float, high: float, bits: int) -> tuple[float, int]:
    """``S = (beta - alpha) / (q_max - q_min)`` and ``z = clamp(round(q_min - alpha / S), q_min, q_max)``."""
    smallest, largest = integer_range(bits)
    scale = (high - low) / (largest - smallest)
    if scale == 0:
        return 1.0, 0
    return scale, min(max(round(smallest - low / scale), smallest), largest)


def quantize(value: float, scale: float, zero_point: int, bits: int) -> int:
    """``q = clamp(round(x / S) + z, q_min, q_max)``; Python rounds ties to even, as torch does."""
    smallest, largest = integer_range(bits)
    return min(max(round(value / scale) + zero_point, smallest), largest)


def dequantize(code: int, scale: float, zero_point: int) -> float:
    """``x' = S (q - z)``."""
    return scale * (code - zero_point)


def round_trip(values: list[float], bits: int, *, is_symmetric: bool) -> tuple[list[int], list[float]]:
    """Codes and restored values of numbers that share one scale, the clipping range being theirs."""
    limit = max(abs(value) for value in values)
    low, high = (-limit, limit) if is_symmetric else (min(0.0, *values), max(0.0, *values))
    scale, zero_point = scale_and_zero_point(low, high, bits)
    if is_symmetric:
        zero_point = 0
    codes = [quantize(value, scale, zero_point, bits) for value in values]
    return codes, [dequantize(code, scale, zero_point) for code in codes]
