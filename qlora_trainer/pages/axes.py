"""Axes of a plot: values onto pixels, and the round values to label."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import asinh, ceil, floor, log10
from typing import Protocol


class Axis(Protocol):
    """Maps values onto pixels and knows its round values."""

    @property
    def start(self) -> float:
        """Pixel of the lowest value."""

    @property
    def end(self) -> float:
        """Pixel of the highest value."""

    def at(self, value: float) -> float:
        """Pixel of a value."""

    def ticks(self, count: int) -> list[float]:
        """Round values within the range, about ``count`` of them."""


@dataclass(frozen=True)
class Scale:
    """Maps values from ``low`` to ``high`` linearly onto pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round values within the range, about ``count`` of them.

        >>> Scale(0.0, 3.2, 0, 100).ticks(4)
        [0.0, 1.0, 2.0, 3.0]
        """
        step = _round_step((self.high - self.low) / count)
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        return [round(index * step, 10) for index in range(first, last + 1)]


@dataclass(frozen=True)
class LogScale:
    """Maps positive values from ``low`` to ``high`` by their logarithm onto pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + log10(value / self.low) / log10(self.high / self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """1, 2 and 5 times each power of ten within the range, or the powers alone where those are more than enough.

        >>> LogScale(0.12, 3.2, 0, 100).ticks(5)
        [0.2, 0.5, 1.0, 2.0]
        """
        powers = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        factors = (1, 2, 5) if len(powers) <= count else (1,)
        candidates = [round(factor * 10.0**power, 12) for power in powers for factor in factors]
        return [value for value in candidates if self.low <= value <= self.high]


@dataclass(frozen=True)
class SymmetricLogScale:
    """Maps values of either sign: linearly near zero, by their logarithm from about ``linear`` on (``asinh``)."""

    low: float
    high: float
    start: float
    end: float
    linear: float

    def at(self, value: float) -> float:
        """Pixel of a value."""
        low, high = asinh(self.low / self.linear), asinh(self.high / self.linear)
        return self.start + (asinh(value / self.linear) - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Zero, and 1, 2 and 5 times each power of ten from ``linear`` on; the powers alone where those are enough.

        >>> SymmetricLogScale(-0.002, 0.05, 0, 100, linear=0.001).ticks(8)
        [-0.002, -0.001, 0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05]
        """
        largest = max(abs(self.low), abs(self.high))
        powers = range(round(log10(self.linear)), floor(log10(largest)) + 1)
        factors = (1, 2, 5) if len(powers) * 3 <= count + 1 else (1,)
        sizes = [round(factor * 10.0**power, 12) for power in powers for factor in factors]
        return [tick for tick in (*(-size for size in reversed(sizes)), 0.0, *sizes) if self.low <= tick <= self.high]


def padded(values: Sequence[float], *, pixels: tuple[float, float]) -> Scale:
    """A scale that leaves a little air at both ends, also where all values are equal."""
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or max(abs(high), 1.0) * 0.01
    return Scale(low - air, high + air, *pixels)


def tick_text(tick: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as the smallest distance between ticks needs."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(tick) or 1.0
    return f"{tick:.{max(0, -floor(log10(step) + 1e-9))}f}"


def _round_step(step: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten that is not below ``step``."""
    power = 10.0 ** floor(log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
