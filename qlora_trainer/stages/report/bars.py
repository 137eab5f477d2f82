"""Whether a file is as good as the recipe asks, and by how much it falls short, in words."""

from collections.abc import Mapping
from typing import Literal

from qlora_trainer.export_formats import FACTS, bar_of, meets_bar
from qlora_trainer.pages.wording import percent, significant
from qlora_trainer.recipe import Ladder
from qlora_trainer.records import ExportFigures

Status = Literal["complete", "below_bar", "unverified"]


def bars(ladder: Ladder) -> Mapping[str, float | None]:
    """Share of the learned nats that a file must keep, by format; None where the recipe asks for none."""
    return {name: bar_of(name, ladder) for name in FACTS}


def lowest_bar(ladder: Ladder) -> float:
    """What a file without a bar of its own, such as an adapter, must keep to be recommended."""
    return min(ladder.bar_int4, ladder.bar_int8)


def meets(export: ExportFigures, *, bar: float, ladder: Ladder) -> bool:
    """Whether the test rows show that a file keeps what is asked; see ``export_formats.meets_bar``."""
    above = export.loss_above_trained_interval
    return meets_bar(bar, export.interval, kl=export.kl_to_trained, above=above, ladder=ladder)


def status_of(export: ExportFigures, ladder: Ladder) -> Status:
    """A file's status: whether it is faithful first, then whether it is good."""
    if not export.verified:
        return "unverified"
    if export.bar is None or meets(export, bar=export.bar, ladder=ladder):
        return "complete"
    return "below_bar"


def bar_in_words(bar: float) -> str:
    """A bar with the digits that it was given with, such as ``99.5 %``."""
    return f"{100 * bar:g} %"


def shortfall(export: ExportFigures, ladder: Ladder) -> str:
    """What a file that is below its bar gives beside what the recipe asks for.

    With a digit more than elsewhere: the two may lie close together.
    """
    if export.bar is not None and export.gain_kept is not None and export.interval is not None:
        low, high = export.interval
        return (
            f"it keeps {percent(export.gain_kept, 2)} ({100 * low:.2f} to {percent(high, 2)}) of what training won, "
            f"and the recipe asks for {bar_in_words(export.bar)} at the lower end of the interval"
        )
    return (
        f"its KL to the trained model is {significant(export.kl_to_trained, 3)} nats (allowed: {ladder.max_kl:g}) and "
        f"its loss at most {significant(export.loss_above_trained_interval[1], 3)} nats per token above the trained "
        f"model's (allowed: {ladder.max_loss_difference:g})"
    )
