"""How often the rows of each weighted source stand in an epoch.

A weight is a share: with weights 3 and 1, three of four rows of an epoch come from the first source, whatever the
sources' sizes; exactly, to the nearest row. The source that decides the epoch's length gives each of its rows once.
"""

import random
from array import array
from collections.abc import Sequence
from typing import Literal

WhenUsedUp = Literal["repeat", "stop"]


def rows_by_source(sizes: Sequence[int], weights: Sequence[float], when_used_up: WhenUsedUp) -> tuple[int, ...]:
    """Rows of each source in an epoch.

    ``repeat``: the source that is largest for its weight gives each row once, the others begin again until their share
    is full. ``stop``: the source that is smallest for its weight gives each row once, the others give a part of theirs.

    Args:
        sizes: rows of each source, none of them 0.
        weights: of each source.
        when_used_up: what happens when a source has no row left.
    """
    choose = max if when_used_up == "repeat" else min
    once = choose(range(len(sizes)), key=lambda source: sizes[source] / weights[source])
    return tuple(max(1, round(sizes[once] * weight / weights[once])) for weight in weights)


def mix(sizes: Sequence[int], weights: Sequence[float], *, when_used_up: WhenUsedUp, seed: int) -> Sequence[int]:
    """The rows of an epoch, source by source, as indexes into the sources' rows one behind the other.

    A source whose rows do not come out even gives each row equally often and a choice by the seed once more. The choice
    is the same in every epoch; in which order an epoch sees its rows is not decided here.
    """
    chosen = array("q")
    begin = 0
    for source, (size, count) in enumerate(zip(sizes, rows_by_source(sizes, weights, when_used_up), strict=True)):
        times, rest = divmod(count, size)
        for _ in range(times):
            chosen.extend(range(begin, begin + size))
        more = random.Random(f"mixture/{seed}/{source}").sample(range(begin, begin + size), rest)
        chosen.extend(sorted(more))
        begin += size
    return chosen
