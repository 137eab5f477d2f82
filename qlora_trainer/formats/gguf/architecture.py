"""A Hugging Face config.json and its tensor names as llama.cpp knows them.

llama.cpp's ``llama`` rotates neighbouring pairs of a head's channels, transformers' Llama rotates channel i with
channel i + half. So the rows of q and k are reordered there, whatever they are stored as (``to_file``); Qwen's are not.
Values are not changed and nothing is written here.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, Keys, TensorNameMap, get_tensor_name_map
from torch import Tensor

from qlora_trainer.errors import RecipeError
from qlora_trainer.formats.gguf.container import Metadata

SUPPORTED = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}

ROPE_FACTORS = "rope_freqs.weight"

_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Architecture:
    """How one model is named, described and ordered in a GGUF file.

    Attributes:
        config: content of its config.json.
    """

    config: Mapping[str, object]

    @classmethod
    def of_folder(cls, folder: Path) -> "Architecture":
        """The architecture of a folder in Hugging Face layout.

        Raises:
            RecipeError: llama.cpp would compute something else from it; says what.
        """
        config: dict[str, object] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = cls(config)
        problems = architecture._problems()
        if problems:
            raise RecipeError("\n".join([f"{folder}: cannot be written as GGUF:", *(f"  {text}" for text in problems)]))
        return architecture

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture."""
        name: str = MODEL_ARCH_NAMES[self._arch]
        return name

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the embedding, so that the file holds no ``output.weight``."""
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return self._number("vocab_size")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        own = self.config.get("head_dim")
        return own if isinstance(own, int) else self._number("hidden_size") // self._number("num_attention_heads")

    @property
    def context_length(self) -> int:
        """Tokens up to which llama.cpp computes what transformers does: a sliding window, never written, ends it."""
        longest = self._number("max_position_embeddings")
        window = self.config.get("sliding_window")
        is_used = self.config["model_type"] == "mistral" or bool(self.config.get("use_sliding_window"))
        return min(longest, window) if is_used and isinstance(window, int) else longest

    def metadata(self) -> Metadata:
        """The keys that llama.cpp builds the model from."""
        keys: Metadata = {
            Keys.LLM.BLOCK_COUNT: self._number("num_hidden_layers"),
            Keys.LLM.CONTEXT_LENGTH: self.context_length,
            Keys.LLM.EMBEDDING_LENGTH: self._number("hidden_size"),
            Keys.LLM.FEED_FORWARD_LENGTH: self._number("intermediate_size"),
            Keys.LLM.VOCAB_SIZE: self.vocabulary_size,
            Keys.Attention.HEAD_COUNT: self._number("num_attention_heads"),
            Keys.Attention.HEAD_COUNT_KV: self._key_heads,
            Keys.Attention.KEY_LENGTH: self.head_dim,
            Keys.Attention.VALUE_LENGTH: self.head_dim,
            Keys.Attention.LAYERNORM_RMS_EPS: float(str(self.config["rms_norm_eps"])),
            Keys.Rope.DIMENSION_COUNT: self.head_dim,
            Keys.Rope.FREQ_BASE: self._theta,
        }
        if self._rope_type == "linear":
            keys[Keys.Rope.SCALING_TYPE] = "linear"
            keys[Keys.Rope.SCALING_FACTOR] = self._rope_number("factor")
        return {key.format(arch=self.name): value for key, value in keys.items()}

    def extra_tensors(self) -> dict[str, Tensor]:
        """Float32 tensors of the file that the checkpoint does not hold: Llama 3's divisors of the frequencies."""
        if self._rope_type != "llama3":
            return {}
        channels = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        return {ROPE_FACTORS: self._llama3_divisors(self._theta**-channels).float()}

    def file_name(self, checkpoint_name: str) -> str | None:
        """Name of a checkpoint's tensor in the file; None where the file does not hold it, as a tied head.

        Raises:
            RecipeError: llama.cpp has no place for it.
        """
        if checkpoint_name == "lm_head.weight" and self.is_tied:
            return None
        name = self._names.get_name(checkpoint_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise RecipeError(
                f"GGUF: {checkpoint_name} has no place in llama.cpp's architecture {self.name!r}. "
                "Choose a format that is a folder, such as merged_16bit"
            )
        found: str = name
        return found

    @cached_property
    def checkpoint_names(self) -> dict[str, str]:
        """Names in the checkpoint by names in the file, for every tensor that the architecture may have."""
        modules = ["model.embed_tokens", "model.norm", "lm_head"]
        for layer in range(self._number("num_hidden_layers")):
            modules += [f"model.layers.{layer}.{part}" for part in (*_LINEARS, *_NORMS)]
        names = {}
        for name in (f"{module}.{suffix}" for module in modules for suffix in ("weight", "bias")):
            stored = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
            if stored is not None:
                names[stored] = name
        return names

    def to_file(self, checkpoint_name: str, value: Tensor) -> Tensor:
        """Rows in llama.cpp's order: q's and k's of a Llama reordered, everything else as it is.

        Args:
            checkpoint_name: of a weight or bias, or the module of a LoRA B.
            value: shape ``(out_features, ...)``: reals, or the bytes that a format packed each row into, because
                codes, scales and zero points of a row move together.
        """
        order = self._row_order(checkpoint_name)
        return value if order is None else value[order]

    def from_file(self, checkpoint_name: str, tensor: Tensor) -> Tensor:
        """The inverse of ``to_file``."""
        order = self._row_order(checkpoint_name)
        return tensor if order is None else tensor[torch.argsort(order)]

    def _row_order(self, checkpoint_name: str) -> Tensor | None:
        """Row of the checkpoint for each row of the file; None where it is the same."""
        if self._arch is not MODEL_ARCH.LLAMA:
            return None
        module = checkpoint_name.removesuffix(".weight").removesuffix(".bias")
        if module.endswith(".self_attn.q_proj"):
            heads = self._number("num_attention_heads")
        elif module.endswith(".self_attn.k_proj"):
            heads = self._key_heads
        else:
            return None
        return torch.arange(heads * self.head_dim).reshape(heads, 2, -1).transpose(1, 2).flatten()

    @cached_property
    def _names(self) -> TensorNameMap:
        return get_tensor_name_map(self._arch, self._number("num_hidden_layers"))

    @property
    def _arch(self) -> MODEL_ARCH:
        return SUPPORTED[str(self.config["model_type"])]

    @property
    def _key_heads(self) -> int:
        own = self.config.get("num_key_value_heads")
        return own if isinstance(own, int) else self._number("num_attention_heads")

    @property
    def _rope(self) -> Mapping[str, object]:
        """All of it is in ``rope_parameters`` since transformers 5, in ``rope_theta`` and ``rope_scaling`` before."""
        for key in ("rope_parameters", "rope_scaling"):
            found = self.config.get(key)
            if isinstance(found, dict):
                return found
        return {}

    @property
    def _rope_type(self) -> str:
        return str(self._rope.get("rope_type", self._rope.get("type", "default")))

    @property
    def _theta(self) -> float:
        return float(str(self._rope.get("rope_theta", self.config.get("rope_theta", 10000.0))))

    def _rope_number(self, key: str) -> float:
        return float(str(self._rope[key]))

    def _llama3_divisors(self, frequencies: Tensor) -> Tensor:
        """Long waves are slowed by ``factor``, short ones kept, those between blended (Llama 3.1, RoPE scaling)."""
        factor, low, high = (self._rope_number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = self._rope_number("original_max_position_embeddings") * frequencies / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return 1 / ((1 - smooth) / factor + smooth)

    def _number(self, key: str) -> int:
        return int(str(self.config[key]))

    def _problems(self) -> list[str]:
        model_type = self.config.get("model_type")
        if model_type not in SUPPORTED:
            return [
                f"model_type {model_type!r} is not supported here; supported are {', '.join(SUPPORTED)}. "
                "Choose another format, such as merged_16bit"
            ]
        problems = []
        if self.config.get("hidden_act", "silu") != "silu":
            problems.append(f"hidden_act {self.config['hidden_act']!r}: llama.cpp computes silu for this model_type")
        if self._rope_type not in ("default", "linear", "llama3"):
            problems.append(f"rope scaling {self._rope_type!r}: only default, linear and llama3 are written")
        if float(str(self._rope.get("partial_rotary_factor", self.config.get("partial_rotary_factor", 1)))) != 1:
            problems.append("partial_rotary_factor is not 1: llama.cpp rotates whole heads for this model_type")
        if model_type == "qwen3" and self.config.get("attention_bias"):
            problems.append("attention_bias: llama.cpp's qwen3 has none")
        return problems
