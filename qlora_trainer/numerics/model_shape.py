"""The sizes of a decoder of the Llama family, as its config.json gives them. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder of the Llama family.

    Attributes:
        hidden: width of the residual stream.
        layers: decoder layers.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        ffn: width of the feed-forward part.
        vocabulary: tokens.
        is_tied: whether the output head is the embedding.
        parameters: distinct parameters in all.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    is_tied: bool
    parameters: int

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, parameters: int | None = None) -> Self:
        """The sizes in a config.json.

        Args:
            config: its content.
            parameters: as counted in the weight files; None = as the sizes imply.

        Raises:
            ValueError: sizes are missing; names them.
        """
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        missing = [name for name in names if not isinstance(config.get(name), int)]
        if missing:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        hidden, layers, heads, ffn, vocabulary = (int(str(config[name])) for name in names)
        is_tied = config.get("tie_word_embeddings") is True
        shape = cls(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=int(str(config.get("num_key_value_heads") or heads)),
            head_dim=int(str(config.get("head_dim") or hidden // heads)),
            ffn=ffn,
            vocabulary=vocabulary,
            is_tied=is_tied,
            parameters=0,
        )
        norms = (2 * layers + 1) * hidden
        implied = shape.linear_parameters + (1 if is_tied else 2) * vocabulary * hidden + norms
        return replace(shape, parameters=implied if parameters is None else parameters)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer: ``(out_features, in_features)`` by name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers but the output head: what is quantized."""
        return self.layers * sum(rows * columns for rows, columns in self.linears.values())
