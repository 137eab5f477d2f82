"""A key-value cache of few bits: what attention remembers of a token is rounded as it enters the cache.

Token-wise, symmetric, min-max (LLM-QAT, arXiv 2305.17888, section 2), one scale over all heads of a token. Keys and
values are kept as the reals that the integers stand for, so that attention of any architecture reads them; ``bytes``
are those of the integers. In training the gradient passes straight through.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from qlora_trainer.numerics.dynamic import rounded_tokens, straight_through


class RoundedCache(DynamicCache):  # type: ignore[misc]  # transformers is not typed
    """A cache whose keys and values have so many bits.

    Args:
        bits: 2 to 8.
        config: the model's.
    """

    def __init__(self, bits: int, config: Any) -> None:
        super().__init__(config=config)
        self.bits = bits

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds the new tokens, rounded; gives all tokens so far, each of shape ``(rows, heads, tokens, features)``."""
        keys, values = self._rounded(key_states), self._rounded(value_states)
        both: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return both

    def _rounded(self, states: Tensor) -> Tensor:
        by_token = states.transpose(1, 2)
        flat = rounded_tokens(by_token.detach().flatten(2), bits=self.bits)
        return straight_through(states, flat.reshape(by_token.shape).transpose(1, 2))


def with_rounded_kv_cache(model: nn.Module, bits: int) -> nn.Module:
    """Changes a model so that attention reads keys and values of few bits, and gives it back.

    Every forward gets a ``RoundedCache`` in place of an empty cache or none, so that scoring, training and generation
    compute the same function.

    Args:
        model: causal language model of transformers whose attention updates a cache.
        bits: 2 to 8.

    Raises:
        ValueError: the bits are out of range.
    """
    rounded_tokens(torch.zeros(1, 1), bits=bits)

    def insert(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, RoundedCache):
            return args, kwargs
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("a cache that was filled without rounding cannot be continued; start with an empty one")
        door: Any = module
        return args, {**kwargs, "past_key_values": RoundedCache(bits, door.config), "use_cache": True}

    model.register_forward_pre_hook(insert, with_kwargs=True)
    return model


def cache_bytes_per_token(config: Any, bits: int) -> int:
    """Bytes of one token in the cache of all layers: keys and values, and below 16 bits a float16 scale for each.

    Args:
        config: the model's, of transformers.
        bits: 2 to 8, or 16.
    """
    text = config.get_text_config(decoder=True)
    settings = vars(text)
    heads = settings.get("num_key_value_heads") or settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    scale = 2 if bits < 16 else 0
    return int(settings["num_hidden_layers"] * 2 * ((heads * head_dim * bits + 7) // 8 + scale))
