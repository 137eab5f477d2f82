"""What several parts of the page read off a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from qlora_trainer.pages.layer_map import place_of
from qlora_trainer.records import Comparison, ComparisonRow
from qlora_trainer.stages.compare.judging import MIB
from qlora_trainer.stages.compare.methods import REFERENCE


def measured(comparison: Comparison) -> tuple[ComparisonRow, ...]:
    """The rows that hold figures, 16 bit first."""
    return tuple(row for row in comparison.rows if row.failed is None)


def reference(comparison: Comparison) -> ComparisonRow:
    """The row of the 16-bit model."""
    return next(row for row in comparison.rows if row.method == REFERENCE)


def metrics_of(comparison: Comparison) -> tuple[str, ...]:
    """Every task metric that some row has, in their order."""
    return tuple(dict.fromkeys(name for row in comparison.rows for name in row.metrics or {}))


@dataclass(frozen=True)
class Bounds:
    """What the recipe allows; None where it sets no bound, or the comparison was kept without its settings.

    Attributes:
        added_nats: nats per token above 16 bit, at the upper end of the interval.
        bytes: of the weights.
    """

    added_nats: float | None
    bytes: float | None

    @classmethod
    def of(cls, comparison: Comparison) -> Self:
        """Those of a comparison's settings."""
        nats, mib = (comparison.settings.get(name) for name in ("most_added_nats", "most_mib"))
        return cls(
            added_nats=nats if isinstance(nats, int | float) else None,
            bytes=mib * MIB if isinstance(mib, int | float) else None,
        )


def standing_of_the_chosen(comparison: Comparison) -> str:
    """What the chosen method is: recommended, or merely nearest to the bounds that no method meets."""
    return "recommended" if comparison.recommendation.is_within_bounds else "of least loss"


def layers_in_words(names: Sequence[str]) -> str:
    """Layers by their kind and blocks, in the order of the model; none is left out.

    >>> layers_in_words(["h.0.mlp.down", "h.1.mlp.down", "h.2.mlp.down", "h.5.mlp.down", "lm_head"])
    'mlp.down of blocks 0 to 2, 5; lm_head'
    """
    blocks: dict[str, list[int]] = {}
    for name in names:
        place = place_of(name)
        blocks.setdefault(place.kind, [])
        if place.block is not None:
            blocks[place.kind].append(place.block)
    return "; ".join(f"{kind} of {_blocks(sorted(numbers))}" if numbers else kind for kind, numbers in blocks.items())


def _blocks(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"{'block' if len(numbers) == 1 else 'blocks'} {', '.join(parts)}"
