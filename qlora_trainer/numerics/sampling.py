"""Logits of one position -> the next token: the most likely one, or one drawn from what temperature, k and p leave."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 = always the most likely token, nothing random.
        top_k: only so many most likely tokens; 0 = all.
        top_p: only the most likely tokens that together reach this probability (nucleus sampling, arXiv 1904.09751).
        seed: of the draws; the same seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for settings that leave no token."""
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            given = f"{self.temperature}, {self.top_k} and {self.top_p}"
            raise ValueError(f"want temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {given}")

    def generator(self) -> torch.Generator:
        """A fresh source of chance, on the CPU whatever the model runs on."""
        return torch.Generator().manual_seed(self.seed)


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token's id.

    Args:
        logits: of one position, shape ``(vocabulary,)``.
        sampling: how to choose.
        generator: of ``Sampling.generator``; each draw moves it on.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits.float().cpu() / sampling.temperature, dim=0).sort(descending=True)
    # A token stays where what stands before it has not reached top_p: the first one always does.
    kept = probabilities.cumsum(0) - probabilities < sampling.top_p
    if sampling.top_k:
        kept[sampling.top_k :] = False
    drawn = torch.multinomial(probabilities * kept, 1, generator=generator)
    return int(order[drawn])
