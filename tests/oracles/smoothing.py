"""SmoothQuant restated with Python loops (arXiv 2211.10438, equation 4), and a W8A8 product in whole numbers."""

from collections.abc import Sequence


def scale(inputs: Sequence[Sequence[float]], weight: Sequence[Sequence[float]], alpha: float) -> list[float]:
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)``; inputs by token, weight by output."""
    found = []
    for column in range(len(weight[0])):
        largest_x = max(abs(token[column]) for token in inputs)
        largest_w = max(abs(row[column]) for row in weight)
        found.append(largest_x**alpha / largest_w ** (1 - alpha) if largest_x and largest_w else 1.0)
    return found


def w8a8(inputs: Sequence[Sequence[float]], weight: Sequence[Sequence[float]]) -> list[list[float]]:
    """``X W^T`` with tokens and rows in integers of 8 bits, 255 steps over ``[-absmax, absmax]``."""
    tokens, rows = [_integers(token) for token in inputs], [_integers(row) for row in weight]
    return [
        [sum(a * b for a, b in zip(x, w, strict=True)) * step_x * step_w for w, step_w in rows] for x, step_x in tokens
    ]


def _integers(values: Sequence[float]) -> tuple[list[int], float]:
    step = 2 * max(abs(value) for value in values) / 255 or 1.0
    return [min(max(round(value / step), -128), 127) for value in values], step
