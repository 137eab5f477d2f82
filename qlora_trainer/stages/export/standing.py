"""Where an attempt stands on the validation rows: what it keeps, and whether that is enough."""

from dataclasses import dataclass

from qlora_trainer.export_formats import meets_bar
from qlora_trainer.numerics.bootstrap import Resampling, difference_interval, gain_kept_interval
from qlora_trainer.recipe import Ladder
from qlora_trainer.records import Fidelity, Interval


@dataclass(frozen=True)
class HeldOut:
    """A model's loss on the validation rows.

    Attributes:
        nats: summed over each row's label tokens.
        labels: label tokens of each row.
    """

    nats: tuple[float, ...]
    labels: tuple[int, ...]

    @property
    def nats_per_token(self) -> float:
        """Summed nats over label tokens."""
        return sum(self.nats) / sum(self.labels)


@dataclass(frozen=True)
class Standing:
    """An attempt measured against the quantized base and the trained model; fields as in ``records.Attempt``."""

    nats_per_token: float
    gain_kept: float | None
    interval: Interval
    meets_bar: bool


def standing(
    file: HeldOut,
    fidelity: Fidelity,
    *,
    quantized: HeldOut,
    trained: HeldOut,
    bar: float | None,
    ladder: Ladder,
    resampling: Resampling,
) -> Standing:
    """What an attempt keeps of what training won, and whether that reaches the bar.

    What is enough, ``export_formats.meets_bar`` says, here for validation rows and in the report for test rows.

    Args:
        file: the attempt.
        fidelity: its distance to the trained model on validation rows.
        quantized: the quantized base on the same rows.
        trained: base and unmerged adapter on the same rows.
        bar: share to keep at the lower end of the interval; None = any is enough.
        ladder: what must hold where there is no share.
        resampling: how intervals are drawn.
    """
    interval = gain_kept_interval(quantized.nats, file.nats, trained.nats, resampling=resampling)
    above = difference_interval(file.nats, trained.nats, file.labels, resampling=resampling)
    is_good = bar is None or meets_bar(bar, interval, kl=fidelity.kl_to_trained, above=above, ladder=ladder)
    if interval is None:
        return Standing(file.nats_per_token, None, above, is_good)
    base = sum(quantized.nats)
    kept = (base - sum(file.nats)) / (base - sum(trained.nats))
    return Standing(file.nats_per_token, kept, interval, is_good)


def resampling_of(resamples: int, confidence: float, seed: int) -> Resampling:
    """How intervals of validation rows are drawn."""
    return Resampling(resamples=resamples, confidence=confidence, seed=seed)
