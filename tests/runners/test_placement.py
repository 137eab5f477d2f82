from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_trainer.runners import placement, transformers
from tests.models import random_token_ids

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_a_model_that_fits_is_loaded_where_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_free_bytes", lambda _device: 1000)
    assert placement.place_for(900, CUDA) == CUDA
    assert placement.place_for(901, CUDA) == CPU


def test_on_a_processor_everything_lies_in_one_place() -> None:
    assert placement.place_for(1 << 60, CPU) == CPU


def test_the_first_blocks_go_to_the_gpu_whole_and_within_its_share(llama_folder: Path) -> None:
    model = transformers.load(llama_folder, dtype=torch.bfloat16)
    size = {name: _bytes(module) for name, module in model.named_modules()}
    held = size["model.embed_tokens"] + 2 * size["model.layers.0"] + 100
    placed = placement.device_map(model, held_bytes=held)
    assert placed["model.embed_tokens"] == 0
    assert placed["model.layers.1"] == "cpu"
    assert sum(size[name] for name, place in placed.items() if place == 0) <= held


def test_a_model_larger_than_the_gpu_is_loaded_outside_and_spread(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = transformers.load(llama_folder, dtype=torch.float32)
    seen: list[tuple[nn.Module, torch.device]] = []

    def spread(model: nn.Module, device: torch.device) -> nn.Module:
        seen.append((model, device))
        return model

    monkeypatch.setattr(transformers, "choose_device", lambda: CUDA)
    monkeypatch.setattr(placement, "_free_bytes", lambda _device: 1000)
    monkeypatch.setattr(placement, "spread", spread)
    loaded = transformers.load(llama_folder, dtype=torch.float32)
    assert seen == [(loaded, CUDA)]
    token_ids = random_token_ids()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=token_ids).logits, whole(input_ids=token_ids).logits)


def test_weights_that_lie_outside_give_the_same_logits(llama_folder: Path, tmp_path: Path) -> None:
    # What accelerate does between GPU and memory, here between memory and disk: the hooks are the same.
    model = transformers.load(llama_folder, dtype=torch.float32)
    token_ids = random_token_ids()
    with torch.no_grad():
        before = model(input_ids=token_ids, logits_to_keep=3).logits
        spread = placement.dispatch_model(
            model,
            device_map={
                "model.embed_tokens": "cpu",
                "model.layers.0": "cpu",
                "model.layers.1": "disk",
                "model.norm": "cpu",
                "model.rotary_emb": "cpu",
                "lm_head": "disk",
            },
            main_device=CPU,
            offload_dir=str(tmp_path),
        )
        assert torch.equal(spread(input_ids=token_ids, logits_to_keep=3).logits, before)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
