"""Static ranges restated value by value on Python numbers; ends are ``(low, high)``, zero included."""

from tests.oracles import affine


def moving_average(batches: list[list[float]], momentum: float) -> tuple[float, float]:
    low, high = min(batches[0]), max(batches[0])
    for batch in batches[1:]:
        low = momentum * low + (1 - momentum) * min(batch)
        high = momentum * high + (1 - momentum) * max(batch)
    return min(low, 0.0), max(high, 0.0)


def percentile(values: list[float], percent: float) -> tuple[float, float]:
    """Half of what lies beyond is left out at either end; the ends are values that are there."""
    ascending = sorted(values)
    kept = max(1, round((1 - (1 - percent / 100) / 2) * len(values)))
    return min(ascending[-kept], 0.0), max(ascending[kept - 1], 0.0)


def squared_error(values: list[float], low: float, high: float, bits: int) -> float:
    scale, zero_point = affine.scale_and_zero_point(low, high, bits)
    total = 0.0
    for value in values:
        code = affine.quantize(value, scale, zero_point, bits)
        total += (scale * (code - zero_point) - value) ** 2
    return total


def least_error(values: list[float], bits: int) -> float:
    """The least squared error over hundredths of the min-max range."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    return min(squared_error(values, low * step / 100, high * step / 100, bits) for step in range(1, 101))
