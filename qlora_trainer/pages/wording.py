"""Figures as text: how many digits, which unit. One place, so that a figure reads the same wherever it stands."""

from collections.abc import Callable
from math import exp, isfinite

from qlora_trainer.records import Interval

LARGEST_EXPONENT = 20.0
"""A loss above this many nats means a perplexity of half a billion: the digits mean nothing."""
METRIC_TITLES = {
    "exact_match": "Exact match",
    "slot_f1": "Slot F1",
    "token_f1": "Token F1",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
}


def nats(value: float) -> str:
    """Loss in nats, to four decimals: exported files differ in the third and fourth."""
    return f"{value:.4f}"


def signed_nats(value: float) -> str:
    """A difference of losses with its sign, such as ``+0.0012`` or ``-0.0003``; nothing has no sign."""
    shown = f"{value:+.4f}"
    return shown[1:] if float(shown) == 0 else shown


def perplexity(nats_per_token: float, digits: int = 3) -> str:
    """``exp`` of a loss, to about so many digits."""
    if nats_per_token > LARGEST_EXPONENT:
        return "> 10^8"
    return significant(exp(nats_per_token), digits)


def significant(value: float, digits: int = 2) -> str:
    """A number to so many significant digits, digits before the point all kept; scientific below 0.0001.

    >>> significant(0.01234), significant(2.308, 3), significant(48211.0, 3), significant(0.0000123)
    ('0.012', '2.31', '48,211', '1.2e-05')
    """
    if value == 0 or not isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    # Taken after rounding, so that 9.999 is 10.0 and not 10.00.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    decimals = max(0, digits - 1 - exponent)
    return f"{value:,.{decimals}f}"


def percent(share: float, decimals: int = 1) -> str:
    """A share as a percentage with a space before the sign."""
    return f"{100 * share:.{decimals}f} %"


def interval(bounds: Interval, show: Callable[[float], str]) -> str:
    """Both ends, worded by ``show``."""
    return f"{show(bounds[0])} to {show(bounds[1])}"


def share_of_gain(share: float | None, bounds: Interval | None) -> str:
    """A share with its interval, such as ``99.4 % (98.9 to 99.8 %)``; a dash where there is none."""
    if share is None or bounds is None:
        return "—"
    return f"{percent(share)} ({100 * bounds[0]:.1f} to {percent(bounds[1])})"


def metric(name: str, value: float) -> str:
    """A task metric: BLEU on its own scale of 0 to 100, every other one as a percentage."""
    return f"{value:.1f}" if name == "bleu" else percent(value)


def size(count: float) -> str:
    """Bytes in KiB, MiB or GiB, to three digits.

    >>> size(512), size(3_670_016), size(5 * 1024**3)
    ('512 B', '3.50 MiB', '5.00 GiB')
    """
    for bytes_per_unit, unit in ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if count >= bytes_per_unit:
            return f"{significant(count / bytes_per_unit, 3)} {unit}"
    return f"{count:.0f} B"


def count_of(value: int) -> str:
    """A whole number with thousands separated."""
    return f"{value:,}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as far as they matter.

    >>> duration(7.31), duration(312), duration(8000)
    ('7.3 s', '5 min 12 s', '2 h 13 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
