"""Activation outliers as LLM.int8() counts them: magnitudes of 6.0 and more, and where they keep coming back.

After arXiv 2208.07339, section 4: an input dimension is an outlier feature where its magnitude reaches 6.0 in at least
6 % of the tokens, and of the model where it is one in at least a quarter of the layers. (There: at least 25 % of the
layers and 6 % of the sequence positions.) What the activations are of is not known here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

MAGNITUDE: Final = 6.0
TOKEN_SHARE: Final = 0.06
LAYER_SHARE: Final = 0.25


@dataclass(frozen=True)
class OutlierCount:
    """What was seen of one layer's inputs; sums, so that batches can be added.

    Attributes:
        tokens: number of tokens.
        tokens_with: tokens in which some input reaches the magnitude.
        largest: ``max|x|`` of each input, float32, shape ``(in_features,)``.
        reached: tokens in which each input reaches the magnitude, int64, same shape.
    """

    tokens: int
    tokens_with: int
    largest: Tensor
    reached: Tensor

    def __add__(self, other: "OutlierCount") -> "OutlierCount":
        """The count over both batches."""
        return OutlierCount(
            self.tokens + other.tokens,
            self.tokens_with + other.tokens_with,
            torch.maximum(self.largest, other.largest),
            self.reached + other.reached,
        )

    @property
    def magnitude(self) -> float:
        """The largest magnitude of any input."""
        return float(self.largest.max())

    @property
    def token_share(self) -> float:
        """Share of the tokens in which some input reaches the magnitude."""
        return self.tokens_with / self.tokens

    def dimensions(self, token_share: float = TOKEN_SHARE) -> tuple[int, ...]:
        """Inputs that reach the magnitude in at least so large a share of the tokens, ascending."""
        return tuple(torch.nonzero(self.reached >= token_share * self.tokens).flatten().tolist())

    @property
    def spread(self) -> float:
        """Largest magnitude over the median input's largest: how much of an int8 range the usual input leaves unused.

        Infinite where the median input was always 0 and some other was not; 1 where all were 0.
        """
        median = float(self.largest.median())
        if median == 0:
            return 1.0 if self.magnitude == 0 else float("inf")
        return self.magnitude / median


def count_outliers(activations: Tensor, magnitude: float = MAGNITUDE) -> OutlierCount:
    """The count of one batch.

    Args:
        activations: any float type, shape ``(tokens, in_features)``, padding left out.
        magnitude: from which a value is an outlier.

    Raises:
        ValueError: no tokens, not a matrix, or values that are not finite.
    """
    if activations.ndim != 2 or activations.numel() == 0:
        raise ValueError(f"want activations (tokens, in_features), got shape {tuple(activations.shape)}")
    bad = int((~torch.isfinite(activations)).sum())
    if bad:
        raise ValueError(f"{bad:,} of {activations.numel():,} activations are NaN or infinite")
    size = activations.float().abs()
    is_outlier = size >= magnitude
    return OutlierCount(
        tokens=len(size),
        tokens_with=int(is_outlier.any(dim=1).sum()),
        largest=size.amax(dim=0),
        reached=is_outlier.sum(dim=0),
    )


def systematic_dimensions(counts: Mapping[str, OutlierCount], layer_share: float = LAYER_SHARE) -> tuple[int, ...]:
    """Input dimensions that are outlier features in at least so large a share of layers of one width.

    Args:
        counts: by layer; only layers that read the same hidden state are comparable, so give those of one width.
        layer_share: of the layers.

    Raises:
        ValueError: no layers, or layers of unlike widths.
    """
    widths = sorted({len(count.largest) for count in counts.values()})
    if len(widths) != 1:
        raise ValueError(f"want layers that read one hidden state, got inputs of the widths {widths}")
    found = [dimension for count in counts.values() for dimension in count.dimensions()]
    return tuple(sorted({each for each in found if found.count(each) >= layer_share * len(counts)}))
