"""The sizes of a decoder with gated feed-forward layers, as its config.json gives them. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
SEPARATE = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"),
    *("smollm3", "granite", "olmo", "olmo2", "helium", "ernie4_5", "seed_oss"),
)
"""Model types of transformers with q, k, v, o and gate, up, down as layers of their own."""
FUSED = ("phi3", "glm", "glm4")
"""Model types that have gate and up in one layer; phi3 has q, k and v in one too."""
HEAD_NORMS = ("qwen3", "gemma3", "gemma3_text", "olmo2")
"""Model types that norm queries and keys."""
WHOLE_NORMS = ("olmo2",)
"""Of these, model types that norm all heads together, with a weight for each value of each head."""
QKV_BIASES = ("qwen2",)
"""Model types whose query, key and value projections always have biases."""
BARE_NORMS = ("olmo",)
"""Model types whose norms have no weights."""
FOUR_NORMS = ("gemma2", "gemma3", "gemma3_text", "glm4")
"""Model types with a norm before and behind attention and feed-forward part."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
"""Keys of config.json that tell of a mixture of experts."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

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
        norms_per_layer: norms over the residual stream's width in one layer.
        has_head_norms: whether queries and keys are normed.
        norms_heads_together: whether one such norm goes over all heads, with a weight for each of their values.
        has_norm_weights: whether norms have weights.
        has_qkv_biases: whether query, key and value projections have biases.
        fuses_qkv: whether q, k and v are one linear layer.
        fuses_gate_up: whether gate and up are one.
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
    norms_per_layer: int = 2
    has_head_norms: bool = False
    norms_heads_together: bool = False
    has_norm_weights: bool = True
    has_qkv_biases: bool = False
    fuses_qkv: bool = False
    fuses_gate_up: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, parameters: int | None = None) -> Self:
        """The sizes in a config.json.

        Args:
            config: its content; of a model for images and text, the part for text (``text_config``) is read.
            parameters: as counted in the weight files; None = as the sizes imply.

        Raises:
            ValueError: sizes are missing, or the layers are of another build; says which and why.
        """
        nested = config.get("text_config")
        text = {**config, **nested} if isinstance(nested, dict) else config
        kind = str(text.get("model_type") or "llama")
        _require_known(text, kind)
        hidden, layers, heads, ffn, vocabulary = (int(str(text[name])) for name in SIZES)
        shape = cls(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=int(str(text.get("num_key_value_heads") or heads)),
            head_dim=int(str(text.get("head_dim") or hidden // heads)),
            ffn=ffn,
            vocabulary=vocabulary,
            is_tied=bool(text.get("tie_word_embeddings", kind in ("gemma", "gemma2", "gemma3", "gemma3_text"))),
            parameters=0,
            norms_per_layer=4 if kind in FOUR_NORMS else 2,
            has_head_norms=kind in HEAD_NORMS,
            norms_heads_together=kind in WHOLE_NORMS,
            has_norm_weights=kind not in BARE_NORMS,
            has_qkv_biases=kind in QKV_BIASES,
            fuses_qkv=kind == "phi3",
            fuses_gate_up=kind in FUSED,
        )
        return replace(shape, parameters=shape.implied_parameters if parameters is None else parameters)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer: ``(out_features, in_features)`` by name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.fuses_qkv:
            attention = {"qkv_proj": (queries + 2 * keys, self.hidden)}
        else:
            attention = {"q_proj": (queries, self.hidden), "k_proj": (keys, self.hidden), "v_proj": (keys, self.hidden)}
        if self.fuses_gate_up:
            gated = {"gate_up_proj": (2 * self.ffn, self.hidden)}
        else:
            gated = {"gate_proj": (self.ffn, self.hidden), "up_proj": (self.ffn, self.hidden)}
        return {
            **attention,
            "o_proj": (self.hidden, queries),
            **gated,
            "down_proj": (self.hidden, self.ffn),
        }

    @property
    def inputs(self) -> dict[tuple[str, ...], int]:
        """The distinct tensors that linear layers read: width by the names of the layers that share one."""
        return {
            ("q_proj", "k_proj", "v_proj", "qkv_proj"): self.hidden,
            ("o_proj",): self.heads * self.head_dim,
            ("gate_proj", "up_proj", "gate_up_proj"): self.hidden,
            ("down_proj",): self.ffn,
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers but the output head: what is quantized."""
        return self.layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def implied_parameters(self) -> int:
        """Parameters that the sizes imply; of biases those alone that every model of the kind has."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        embeddings = (1 if self.is_tied else 2) * self.vocabulary * self.hidden
        norms = (self.norms_per_layer * self.layers + 1) * self.hidden if self.has_norm_weights else 0
        of_heads = (queries + keys if self.norms_heads_together else 2 * self.head_dim) if self.has_head_norms else 0
        biases = queries + 2 * keys if self.has_qkv_biases else 0
        return self.linear_parameters + embeddings + norms + self.layers * (of_heads + biases)


def _require_known(config: Mapping[str, object], kind: str) -> None:
    experts = [name for name in EXPERTS if config.get(name) not in (None, 0, 1)]
    if experts:
        raise ValueError(
            f"{kind} is a mixture of experts ({experts[0]}: {config[experts[0]]}), whose memory depends on where its "
            "router sends tokens"
        )
    missing = [name for name in SIZES if not isinstance(config.get(name), int)]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}")
    if kind not in (*SEPARATE, *FUSED):
        raise ValueError(
            f"layers of the model type {kind!r} are not known here. Known are {', '.join(sorted((*SEPARATE, *FUSED)))}"
        )
