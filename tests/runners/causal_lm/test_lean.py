"""Lean modules stand only where they compute what the module computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.causal_lm import make_lean
from qlora_trainer.runners.causal_lm.lean import LeanGatedPart, LeanNorm

GEMMA = transformers.Gemma3TextConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, head_dim=8,
)  # fmt: skip


def frozen(folder: Path) -> nn.Module:
    return runner.load(folder, dtype=torch.float32).requires_grad_(False)


def gradient_of(model: nn.Module) -> Tensor:
    """Gradient of the input embeddings, through every layer."""
    door: Any = model
    embedded = door.get_input_embeddings()(torch.arange(5, 15)[None]).detach().requires_grad_()
    output = model(inputs_embeds=embedded, use_cache=False).logits
    (gradient,) = torch.autograd.grad(output.square().sum(), embedded)
    return gradient


def test_a_llama_is_made_lean_and_computes_the_same(llama_folder: Path) -> None:
    model = frozen(llama_folder)
    names = list(model.state_dict())
    wanted, answer = gradient_of(model), model(input_ids=torch.arange(9)[None]).logits
    assert make_lean(model, torch.float32) == 2 * 2 + 1 + 2  # norms of two layers, the last norm, two gated parts
    assert list(model.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(9)[None]).logits, answer)
    # Two layers of float32 rounding.
    torch.testing.assert_close(gradient_of(model), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_gemmas_norms_have_an_offset_of_one() -> None:
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(GEMMA).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_()
    wanted = gradient_of(model)
    make_lean(model, torch.float32)
    norms = [module for module in model.modules() if isinstance(module, LeanNorm)]
    assert {norm.offset for norm in norms} == {1.0}
    assert len(norms) == 2 * 6 + 1  # four around attention and feed-forward part, one each of queries and keys
    torch.testing.assert_close(gradient_of(model), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_gate_and_up_of_one_layer_are_made_lean_too() -> None:
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, pad_token_id=0
    )
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    wanted = gradient_of(model)
    make_lean(model, torch.float32)
    assert sum(isinstance(module, LeanGatedPart) for module in model.modules()) == 2
    torch.testing.assert_close(gradient_of(model), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_a_norm_that_does_something_else_is_left_alone(llama_folder: Path) -> None:
    model = frozen(llama_folder)
    norm: Any = model.get_submodule("model.norm")
    plain = norm.forward
    norm.forward = lambda x: plain(x) + 0.01
    gated: Any = model.get_submodule("model.layers.0.mlp")
    gated.forward = lambda x: gated.down_proj(gated.act_fn(gated.up_proj(x)) * gated.gate_proj(x))
    assert make_lean(model, torch.float32) == 2 * 2 + 1
    assert model.get_submodule("model.norm") is norm
    assert model.get_submodule("model.layers.0.mlp") is gated
    assert isinstance(model.get_submodule("model.layers.1.mlp"), LeanGatedPart)


def test_a_norm_that_is_trained_is_left_alone(llama_folder: Path) -> None:
    model = frozen(llama_folder)
    model.get_submodule("model.norm").requires_grad_()
    assert make_lean(model, torch.float32) == 2 * 2 + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_numbers_are_not_touched(dtype: torch.dtype, llama_folder: Path) -> None:
    model = runner.load(llama_folder, dtype=dtype).requires_grad_(False)
    before = torch.get_rng_state()
    assert make_lean(model, dtype) == 7
    assert torch.equal(torch.get_rng_state(), before)
