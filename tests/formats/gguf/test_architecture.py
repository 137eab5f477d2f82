import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_trainer.errors import RecipeError
from qlora_trainer.formats.gguf.architecture import ROPE_FACTORS, Architecture
from tests.formats.gguf.small_models import LLAMA3_ROPE

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
Q = "model.layers.1.self_attn.q_proj.weight"


def architecture(**changes: Any) -> Architecture:
    return Architecture({**CONFIG, **changes})


def refused(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        Architecture.of_folder(folder)
    return str(caught.value)


def rotated(heads: Tensor, angles: Tensor, *, pairs: str) -> Tensor:
    """Each pair of channels turned by its angle; pairs are neighbours, or channel i and i + half."""
    half = heads.shape[-1] // 2
    first, second = (
        (heads[..., 0::2], heads[..., 1::2]) if pairs == "neighbours" else (heads[..., :half], heads[..., half:])
    )
    turned = (first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2) if pairs == "neighbours" else torch.cat(turned, dim=-1)


def test_llama_rows_are_ordered_so_that_both_rotations_give_the_same_scores() -> None:
    model = architecture()
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(64, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    here, there = (torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(2))

    def scores(pairs: str, first: Tensor, second: Tensor) -> Tensor:
        heads = [rows.T.reshape(8, 4, 16) for rows in (first, second)]
        turned = [rotated(one, angle, pairs=pairs) for one, angle in zip(heads, (here, there), strict=True)]
        return (turned[0] * turned[1]).sum(-1)

    ordered = [model.to_file(Q, rows) for rows in (query, key)]
    torch.testing.assert_close(scores("neighbours", *ordered), scores("halves", query, key))
    assert not torch.allclose(scores("neighbours", query, key), scores("halves", query, key))


@pytest.mark.parametrize("part", ["q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "q_proj", "k_proj"])
def test_weights_biases_and_adapters_of_q_and_k_are_reordered_and_back(part: str) -> None:
    rows = torch.arange(64 if part.startswith("q") else 32)
    name = f"model.layers.0.self_attn.{part}"
    moved = architecture().to_file(name, rows)
    assert not torch.equal(moved, rows)
    assert torch.equal(moved[:4], torch.tensor([0, 8, 1, 9]))
    assert torch.equal(architecture().from_file(name, moved), rows)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_other_rows_keep_their_order(name: str) -> None:
    rows = torch.arange(32)
    assert torch.equal(architecture().to_file(name, rows), rows)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwens_rows_keep_their_order(model_type: str) -> None:
    rows = torch.arange(64)
    assert torch.equal(architecture(model_type=model_type).to_file(Q, rows), rows)


def test_names_are_llama_cpps_and_back() -> None:
    model = architecture()
    expected = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        Q: "blk.1.attn_q.weight",
        "model.layers.0.self_attn.k_proj.bias": "blk.0.attn_k.bias",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }
    for checkpoint, stored in expected.items():
        assert model.file_name(checkpoint) == stored
        assert model.checkpoint_names[stored] == checkpoint
    assert architecture(model_type="qwen3").file_name("model.layers.0.self_attn.q_norm.weight") == (
        "blk.0.attn_q_norm.weight"
    )


def test_a_tied_head_is_not_in_the_file() -> None:
    assert architecture(tie_word_embeddings=True).file_name("lm_head.weight") is None


def test_a_tensor_without_a_place_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.router\.weight has no place"):
        architecture().file_name("model.layers.0.router.weight")


def test_metadata_is_what_config_says() -> None:
    keys = architecture(rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}).metadata()
    assert keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.attention.key_length"] == keys["llama.rope.dimension_count"] == 16
    assert keys["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert keys["llama.rope.freq_base"] == 5e5
    assert (keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"]) == ("linear", 2.0)
    assert keys["llama.context_length"] == 512


def test_older_files_keep_rope_elsewhere() -> None:
    old = {**CONFIG, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
    del old["rope_parameters"]
    keys = Architecture(old).metadata()
    assert (keys["llama.rope.freq_base"], keys["llama.rope.scaling.factor"]) == (7.0, 3.0)


def test_a_sliding_window_ends_the_context() -> None:
    assert architecture(model_type="mistral", sliding_window=128).context_length == 128
    assert architecture(model_type="mistral", sliding_window=None).context_length == 512
    assert architecture(model_type="qwen2", sliding_window=128, use_sliding_window=False).context_length == 512


def test_llama3_divisors_give_transformers_frequencies() -> None:
    rope = LLAMA3_ROPE
    divisors = architecture(rope_parameters=rope).extra_tensors()[ROPE_FACTORS]
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    # Both sides are float32 products of a handful of factors.
    torch.testing.assert_close(plain / divisors, expected, rtol=8 * torch.finfo(torch.float32).eps, atol=0)
    assert divisors.min() == 1
    assert divisors.max() == 8
    assert bool(((divisors > 1) & (divisors < 8)).any())


def test_other_ropes_have_no_divisors() -> None:
    assert architecture().extra_tensors() == {}


@pytest.mark.parametrize("model_type", ["bitnet", "gemma3_text", None])
def test_an_unknown_model_type_is_named_with_the_known_ones(model_type: str | None, tmp_path: Path) -> None:
    text = refused(tmp_path, model_type=model_type)
    assert f"model_type {model_type!r} is not supported" in text
    assert "llama, mistral, qwen2, qwen3" in text


def test_what_llama_cpp_computes_otherwise_is_refused_at_once(tmp_path: Path) -> None:
    text = refused(
        tmp_path,
        hidden_act="gelu",
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )
    assert "hidden_act 'gelu'" in text
    assert "rope scaling 'yarn'" in text
    assert "partial_rotary_factor" in text
    assert "attention_bias" in refused(tmp_path, model_type="qwen3", attention_bias=True)
