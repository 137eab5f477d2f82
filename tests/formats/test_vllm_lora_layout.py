"""Adapters in the layout that vLLM's LoRA loader takes.

Its rules, restated from vllm/lora/peft_helper.py (fields, refused features) and vllm/lora/utils.py
(``parse_fine_tuned_lora_name``); vLLM itself does not run here.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qlora_trainer.formats.peft_adapter import AdapterSettings, Factors, write

REQUIRED = {"r": int, "lora_alpha": int | float, "target_modules": list | str}
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def module_of(tensor: str) -> tuple[str, bool]:
    """Module of a tensor, and whether it is A; what vLLM cannot parse raises ValueError."""
    parts = tensor.split(".")
    if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
        raise ValueError(f"{tensor} is unsupported LoRA weight")
    start = 2 if "base_model.model." in tensor else 0
    return ".".join(parts[start:-2]), parts[-2] == "lora_A"


def written(folder: Path, *, use_dora: bool = False, use_rslora: bool = False) -> Path:
    factors = {
        name: Factors(torch.randn(4, 8), torch.randn(6, 4), torch.ones(6) if use_dora else None) for name in MODULES
    }
    settings = AdapterSettings(
        rank=4, alpha=8.0, dropout=0.0, use_rslora=use_rslora, use_dora=use_dora, base_model="owner/base"
    )
    write(folder, factors, settings)
    return folder


@pytest.mark.parametrize("use_rslora", [False, True])
def test_settings_hold_every_field_that_vllm_needs_and_none_that_it_refuses(tmp_path: Path, use_rslora: bool) -> None:
    settings = json.loads((written(tmp_path, use_rslora=use_rslora) / "adapter_config.json").read_text())
    for name, kind in REQUIRED.items():
        assert isinstance(settings[name], kind)
    assert settings["bias"] == "none"
    assert not settings["modules_to_save"]
    assert not settings["use_dora"]
    # vLLM computes the scale of these two alone: patterns of single layers would be ignored there.
    assert not settings["rank_pattern"]
    assert not settings["alpha_pattern"]
    assert settings["use_rslora"] is use_rslora


def test_every_tensor_is_a_factor_of_a_module_that_the_settings_name(tmp_path: Path) -> None:
    folder = written(tmp_path)
    targets = set(json.loads((folder / "adapter_config.json").read_text())["target_modules"])
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    found = {module_of(name): shape for name, shape in shapes.items()}
    assert {module for module, _ in found} == set(MODULES) == targets
    for module in MODULES:
        assert (found[module, True], found[module, False]) == ((4, 8), (6, 4))


def test_dora_is_what_vllm_refuses(tmp_path: Path) -> None:
    folder = written(tmp_path, use_dora=True)
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        magnitudes = [name for name in file.keys() if "magnitude" in name]  # noqa: SIM118 - no mapping
    with pytest.raises(ValueError, match="unsupported LoRA weight"):
        module_of(magnitudes[0])
