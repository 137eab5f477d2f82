"""How much of the forward pass is computed again in the backward pass, for less memory (arXiv 1604.06174)."""

from typing import Any, Literal

from torch import nn

Checkpointing = Literal["none", "selective", "full"]
"""``none``: nothing is computed again. ``selective``: every second decoder layer. ``full``: every decoder layer."""


def set_checkpointing(model: nn.Module, policy: Checkpointing) -> None:
    """Says which decoder layers keep their input alone; changes the model, not what it computes.

    The non-reentrant kind: it works where no input requires gradients, and repeats dropout's random draws.
    """
    door: Any = model
    if policy == "none":
        door.activation_checkpointing_disable()
        return
    every = {"selective": 2, "full": 1}[policy]
    door.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False}, every_n_layers=every)
