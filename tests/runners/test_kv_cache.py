from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.kv_cache import RoundedCache, cache_bytes_per_token, with_rounded_kv_cache
from tests.models import EOS_ID, PAD_ID, random_token_ids


def model_of(folder: Path, bits: int | None = None) -> nn.Module:
    model = runner.load(folder, dtype=torch.float32)
    return model if bits is None else with_rounded_kv_cache(model, bits)


@torch.no_grad()
def logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return found


def test_each_token_is_rounded_over_all_heads(llama_folder: Path) -> None:
    cache = RoundedCache(4, model_of(llama_folder).config)
    keys, values = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    cache.update(keys[:, :, :4], values[:, :, :4], 0)
    seen, _ = cache.update(keys[:, :, 4:], values[:, :, 4:], 0)
    assert seen.shape == keys.shape
    for row in range(2):
        for token in range(5):
            whole = keys[row, :, token].flatten()
            step = 2 * whole.abs().max() / 15
            expected = (torch.round(whole / step).clamp(-8, 7) * step).reshape(3, 8)
            # The largest magnitude lies in the middle between two integers, where float32 may take either.
            is_tie = whole.abs() == whole.abs().max()
            kept = ~is_tie.reshape(3, 8)
            torch.testing.assert_close(seen[row, :, token][kept], expected[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_generating_computes_the_function_that_scoring_does(bits: int, llama_folder: Path) -> None:
    model = model_of(llama_folder, bits)
    prompts = random_token_ids(rows=1, tokens=9).tolist()
    (written,) = runner.generate_greedy(model, prompts, max_new_tokens=12, stop_ids=(), pad_id=PAD_ID)
    whole = torch.tensor([prompts[0] + written])
    predicted = logits(model, whole)[0, 8:-1].argmax(dim=-1).tolist()
    assert written == predicted


def test_fewer_bits_are_farther_from_the_16_bit_cache(llama_folder: Path) -> None:
    token_ids = random_token_ids()
    exact = logits(model_of(llama_folder), token_ids)
    lost = [
        float((logits(model_of(llama_folder, bits), token_ids) - exact).norm() / exact.norm()) for bits in (8, 4, 2)
    ]
    # 0.0098, 0.180 and 0.715 with these random weights.
    assert 0.005 < lost[0] < 0.02 < 0.1 < lost[1] < 0.25 < lost[2] < 1


def test_gradients_pass_through_the_cache(llama_folder: Path) -> None:
    model = model_of(llama_folder, 4)
    model.requires_grad_(requires_grad=True)
    model(input_ids=random_token_ids()).logits.square().mean().backward()
    for layer in (0, 1):
        for name in ("k_proj", "v_proj"):
            gradient = model.get_submodule(f"model.layers.{layer}.self_attn.{name}").get_parameter("weight").grad
            assert gradient is not None
            assert gradient.abs().max() > 0


def test_generation_stops_and_pads_as_without_rounding(llama_folder: Path) -> None:
    model = model_of(llama_folder, 8)
    prompts = [[10, 11, 12], [20, 21, 22, 23, 24]]
    together = runner.generate_greedy(model, prompts, max_new_tokens=6, stop_ids=(EOS_ID,), pad_id=PAD_ID)
    alone = [
        runner.generate_greedy(model, [prompt], max_new_tokens=6, stop_ids=(EOS_ID,), pad_id=PAD_ID)[0]
        for prompt in prompts
    ]
    assert together == alone


def test_bytes_are_those_of_integers_and_scales(llama_folder: Path) -> None:
    config = model_of(llama_folder).config
    # Two layers, keys and values, two heads of 16 features.
    assert cache_bytes_per_token(config, 16) == 2 * 2 * 2 * 16 * 2
    assert cache_bytes_per_token(config, 8) == 2 * 2 * (2 * 16 + 2)
    assert cache_bytes_per_token(config, 4) == 2 * 2 * (16 + 2)


def test_what_cannot_be_is_refused(llama_folder: Path) -> None:
    plain = model_of(llama_folder)
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 1"):
        with_rounded_kv_cache(plain, 1)
    filled = plain(input_ids=random_token_ids(), use_cache=True).past_key_values
    rounded = with_rounded_kv_cache(plain, 4)
    with pytest.raises(ValueError, match="filled without rounding"):
        rounded(input_ids=random_token_ids(tokens=1), past_key_values=filled)
