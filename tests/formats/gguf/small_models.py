"""Small random models of the architectures that GGUF files are written for, as folders in Hugging Face layout."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import BOS_ID, EOS_ID, PAD_ID, VOCABULARY_SIZE, tiny_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

GPT2_STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_STEP = {**GPT2_STEP, "use_regex": False}
DIGITS_STEP = {"type": "Digits", "individual_digits": True}
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# As in the tokenizer.json of Mistral Nemo.
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def steps(*each: dict[str, Any]) -> dict[str, Any]:
    """Pre-tokenizers one after the other, as in a tokenizer.json."""
    return {"type": "Sequence", "pretokenizers": list(each)}


def split(pattern: str) -> dict[str, Any]:
    """The step that takes each match of a pattern as a word."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# llama.cpp's name, the ``pre_tokenizer`` and ``ignore_merges`` of a tokenizer.json.
PRE_TOKENIZERS: list[tuple[str, dict[str, Any], bool]] = [
    ("gpt-2", GPT2_STEP, False),
    ("smollm", steps(DIGITS_STEP, GPT2_STEP), False),
    ("llama-bpe", steps(split(LLAMA3_PATTERN), BYTES_STEP), True),
    ("smaug-bpe", steps(split(LLAMA3_PATTERN), BYTES_STEP), False),
    ("qwen2", steps(split(LLAMA3_PATTERN.replace("{1,3}", "")), BYTES_STEP), False),
    ("tekken", steps(split(TEKKEN_PATTERN), BYTES_STEP), True),
]

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama with biases, tied": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama with Llama 3's rope": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama with linear rope": {"model_type": "llama", "rope_parameters": LINEAR_ROPE},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}


def small_model(folder: Path, variant: str) -> Path:
    """Writes a random float16 model of two layers and its tokenizer into ``folder`` and gives the folder back.

    All its tensors are random, norms and biases too, and large enough to matter to the logits.
    """
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": 512,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": False,
        **VARIANTS[variant],
    }
    model_type = settings.pop("model_type")
    generator = torch.Generator().manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 1 + 0.2 * noise)
    model.to(torch.float16).save_pretrained(folder)
    return tiny_tokenizer(folder)
