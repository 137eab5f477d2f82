"""The sizes of a model, from its config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.runtime.weight_headers import read_headers


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "ffn", "parameters"),
    [
        (4096, 32, 32, 11008, 6_738_415_616),
        (5120, 40, 40, 13824, 13_015_864_320),
        (6656, 60, 52, 17920, 32_528_943_616),
        (8192, 80, 64, 22016, 65_285_660_672),
    ],
)
def test_the_sizes_of_llama_imply_its_published_parameter_counts(
    hidden: int, layers: int, heads: int, ffn: int, parameters: int
) -> None:
    """LLaMA, arXiv 2302.13971, table 2: 6.7B, 13.0B, 32.5B and 65.2B; exact counts from the released checkpoints."""
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "vocab_size": 32000,
    }
    assert ModelShape.from_config(config).parameters == parameters


@pytest.mark.parametrize("fixture", ["llama_folder", "wide_llama_folder"])
def test_the_implied_parameters_are_those_of_the_weight_files(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    shape = ModelShape.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    headers = read_headers(folder)
    layer = {name.split(".")[-2]: info.shape for name, info in headers.items() if "layers.0." in name}
    assert shape.parameters == sum(info.bytes // 2 for info in headers.values())
    assert shape.linears.items() <= layer.items()


def test_parameters_counted_in_files_win_over_implied_ones() -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    assert ModelShape.from_config({**config, "vocab_size": 320}, parameters=7).parameters == 7


def test_a_config_without_sizes_is_refused_with_their_names() -> None:
    with pytest.raises(ValueError, match=r"no num_hidden_layers, vocab_size"):
        ModelShape.from_config({"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128})


def test_a_tied_head_counts_once() -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    untied = ModelShape.from_config({**config, "vocab_size": 320})
    tied = ModelShape.from_config({**config, "vocab_size": 320, "tie_word_embeddings": True})
    assert untied.parameters - tied.parameters == 320 * 64


SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 320,
}
# What keeps a small vocabulary from clashing with the special tokens of a large one.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {}),
    ("mistral", {"head_dim": 32}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
    ("gemma", {"head_dim": 32}),
    ("gemma2", {"head_dim": 32}),
    ("gemma3_text", {"head_dim": 32}),
    ("phi3", {}),
    ("glm", {"head_dim": 16, "attention_bias": False}),
    ("glm4", {"head_dim": 16, "attention_bias": False}),
    ("olmo", {}),
    ("olmo2", {}),
    ("smollm3", {}),
    ("granite", {}),
    ("helium", {"head_dim": 16}),
    ("ernie4_5", {"head_dim": 32}),
    ("seed_oss", {"head_dim": 32, "attention_bias": False}),
]


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_sizes_of_a_config_are_those_of_the_model_that_is_built_from_it(
    kind: str, more: dict[str, Any], is_tied: bool
) -> None:
    config = AutoConfig.for_model(kind, **SIZES, **SPECIAL, **more, tie_word_embeddings=is_tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_config(config.to_dict())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    layer = [(name.split(".")[-2], part) for name, part in model.named_parameters() if ".layers.0." in name]
    assert shape.linears == {name: tuple(part.shape) for name, part in layer if part.ndim == 2}
    norms = [name for name, part in model.model.layers[0].named_children() if "layernorm" in name]
    assert shape.norms_per_layer == len(norms)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_mixture_of_experts_is_refused_and_says_why(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"{kind} is a mixture of experts \(\w+: \d+\)"):
        ModelShape.from_config(AutoConfig.for_model(kind).to_dict())


@pytest.mark.parametrize("kind", ["arcee", "gpt2", "falcon"])
def test_layers_of_another_build_are_refused_with_the_known_kinds(kind: str) -> None:
    with pytest.raises(ValueError, match=r"model type '\w+' are not known here\. Known are .*gemma, .*qwen3"):
        ModelShape.from_config({**SIZES, "model_type": kind})
