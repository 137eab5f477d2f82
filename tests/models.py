"""Small true models for tests: a random two-layer Llama and its tokenizer, as files in Hugging Face layout.

Written without transformers, so that a test of a module that does not need it stays quick.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from qlora_trainer.formats.model_folder import write_model
from qlora_trainer.formats.weight_format import WeightFormat

VOCABULARY_SIZE = 320
LAYERS = 2
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
SPECIAL_TOKENS = (BOS, EOS, PAD, "<|user|>", "<|assistant|>", "<|system|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TEXT = """The quick brown fox jumps over the lazy dog. A small model learns what is said often and forgets the rest.
Book a table for two at seven in the evening; do not book it on Monday. Remind me to call Anna and Paul tomorrow.
def add(first, second): return first + second
"""


def tiny_llama(
    folder: Path,
    *,
    hidden_size: int = 64,
    is_tied: bool = False,
    has_biases: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes a random Llama of two layers with its tokenizer into ``folder`` and gives the folder back.

    Grouped-query attention (4 heads, 2 of them with keys), feed-forward of twice the hidden size. The weights are
    large enough that every layer matters to the logits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = tiny_llama_weights(hidden_size=hidden_size, is_tied=is_tied, has_biases=has_biases)
    save_file(
        {name: weight.to(dtype) for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": has_biases,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": is_tied,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    )
    tiny_tokenizer(folder)
    return folder


def tiny_llama_weights(*, hidden_size: int = 64, is_tied: bool = False, has_biases: bool = False) -> dict[str, Tensor]:
    """The float32 weights of ``tiny_llama`` by checkpoint name, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(hidden_size, generator=generator)

    weights = {"model.embed_tokens.weight": normal(VOCABULARY_SIZE, hidden_size)}
    outputs = {"q_proj": hidden_size, "k_proj": hidden_size // 2, "v_proj": hidden_size // 2, "o_proj": hidden_size}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        weights[f"{start}.input_layernorm.weight"] = norm()
        for name, out_features in outputs.items():
            weights[f"{start}.self_attn.{name}.weight"] = normal(out_features, hidden_size)
            if has_biases:
                weights[f"{start}.self_attn.{name}.bias"] = normal(out_features)
        weights[f"{start}.post_attention_layernorm.weight"] = norm()
        weights[f"{start}.mlp.gate_proj.weight"] = normal(2 * hidden_size, hidden_size)
        weights[f"{start}.mlp.up_proj.weight"] = normal(2 * hidden_size, hidden_size)
        weights[f"{start}.mlp.down_proj.weight"] = normal(hidden_size, 2 * hidden_size)
    weights["model.norm.weight"] = norm()
    if not is_tied:
        weights["lm_head.weight"] = normal(VOCABULARY_SIZE, hidden_size)
    return weights


def tiny_tokenizer(folder: Path) -> Path:
    """Writes a byte-level BPE tokenizer of 320 tokens into ``folder``; encoding a text puts bos before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def linear_names(weights: Iterable[str]) -> list[str]:
    """Modules of a Llama that are linear layers but not the output head, from the names of its weights."""
    return [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]


def quantized_copy(like: Path, folder: Path, weight_format: WeightFormat, *, dtype: torch.dtype) -> Path:
    """Writes the Llama of one folder into another in a weight format and gives that folder back.

    Args:
        like: of ``tiny_llama``.
        folder: is made.
        weight_format: of the linear layers.
        dtype: of everything else.
    """
    folder.mkdir(parents=True)
    weights = load_file(like / "model.safetensors")
    write_model(
        folder,
        weights.items(),
        weight_format,
        linear_modules=linear_names(weights),
        like=like,
        rest_dtype=dtype,
        ignored=["lm_head"],
    )
    return folder


def random_token_ids(*, rows: int = 2, tokens: int = 24, seed: int = 0) -> Tensor:
    """Ordinary token ids, int64 of shape ``(rows, tokens)``, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), VOCABULARY_SIZE, (rows, tokens), generator=generator)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
