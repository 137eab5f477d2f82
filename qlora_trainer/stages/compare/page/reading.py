"""What several parts of the page read off a comparison."""

from collections.abc import Sequence

from qlora_trainer.pages.layer_map import place_of
from qlora_trainer.records import Comparison, ComparisonRow
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


def most_added_nats(comparison: Comparison) -> float | None:
    """What the recipe allows above 16 bit; None where the comparison was kept without its settings."""
    bound = comparison.settings.get("most_added_nats")
    return float(bound) if isinstance(bound, int | float) else None


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
