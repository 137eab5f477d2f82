"""What ends or spares a training that goes wrong."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_trainer.recipe.section import PositiveInt, Section


class Watchdog(Section):
    """What is done when training goes wrong. Each incident is told, counted and reported, whatever is chosen.

    A run that was stopped may go on under other choices: they shape nothing until something goes wrong.
    """

    non_finite: Literal["stop", "skip"] = "stop"
    """Loss or gradients of a step are NaN or infinite. ``skip``: the step changes nothing, its rows are named, and
    training goes on with the next."""
    zero_gradients: Literal["stop", "skip"] = "stop"
    """All gradients of a step are exactly zero, as where the adapter is not connected to the loss."""
    skips_in_a_row: PositiveInt = 5
    """Most steps that are skipped one after the other; one more stops the run."""
    zero_loss: Literal["stop", "warn"] = "stop"
    """The loss has been exactly zero for ``zero_loss_steps`` steps: nothing is left to learn, or it is not computed
    on what it should be."""
    zero_loss_steps: PositiveInt = 20
    """Steps in a row of a loss of exactly zero that are one too many."""
    divergence: Literal["stop", "warn"] = "stop"
    """The loss has risen far above where it was: the median of the last ``divergence_steps`` step losses is more than
    ``divergence_factor`` times the lowest such median of the run, plus half a nat per token."""
    divergence_steps: PositiveInt = 20
    """Steps in the running median; a few odd batches do not move it."""
    divergence_factor: Annotated[float, Field(gt=1)] = 1.5
    """How many times its lowest the running median may be. In the shipped recipes it never was more than 1.23 times,
    or 0.08 nats, above."""
