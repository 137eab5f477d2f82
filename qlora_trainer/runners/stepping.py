"""One conversation with a model, token after token: what makes streaming possible for every runtime alike."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Steps(Protocol):
    """A model that goes on from what it has read."""

    def next_logits(self, token_ids: Sequence[int], *, start: int) -> Tensor:
        """Logits behind the last of some tokens, shape ``(vocabulary,)``.

        Args:
            token_ids: at least one.
            start: how many tokens stand before them, all of earlier calls; 0 forgets what was read.
        """


class CachedSteps:
    """Steps of a transformers model, with its own cache of keys and values.

    Args:
        model: in evaluation mode, with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._cache: Any = None

    @torch.inference_mode()
    def next_logits(self, token_ids: Sequence[int], *, start: int) -> Tensor:
        """See ``Steps``."""
        if start == 0:
            self._cache = None
        device = next(self._model.parameters()).device
        output = self._model(
            input_ids=torch.tensor([list(token_ids)], device=device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits[0, -1]
        return logits
