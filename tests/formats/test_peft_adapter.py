import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_trainer.formats.peft_adapter import (
    AdapterSettings,
    Factors,
    attach,
    factors_of,
    load_factors,
    quiet_peft,
    read,
    write,
)
from qlora_trainer.runners import transformers as runner
from tests.models import linear_names, random_token_ids

# isort: split
from peft import LoraConfig, PeftModel, get_peft_model

PLAIN = AdapterSettings(rank=4, alpha=8.0, dropout=0.0, use_rslora=False, use_dora=False, base_model="some/base")
KINDS = {"lora": PLAIN, "rslora": replace(PLAIN, use_rslora=True), "dora": replace(PLAIN, use_dora=True)}
DTYPE = torch.bfloat16


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=random_token_ids()).logits
    return found


def trained(folder: Path, settings: AdapterSettings) -> nn.Module:
    """A PEFT model in evaluation mode that took two large steps, so that every factor matters."""
    base = runner.load(folder, dtype=DTYPE)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=list(runner.linear_modules(base)),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    with quiet_peft():
        model: nn.Module = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=0.02)
    for seed in range(2):
        token_ids = random_token_ids(seed=seed)
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def random_factors(*, rank: int = 4, has_magnitude: bool = False) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(0)
    modules = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
    return {
        module: Factors(
            lora_a=torch.randn(rank, 16, generator=generator),
            lora_b=torch.randn(12, rank, generator=generator),
            magnitude=torch.randn(12, generator=generator) if has_magnitude else None,
        )
        for module in sorted(modules)
    }


def require_equal(found: dict[str, Factors], wanted: dict[str, Factors]) -> None:
    assert found.keys() == wanted.keys()
    for module, factors in wanted.items():
        other = found[module]
        assert torch.equal(other.lora_a, factors.lora_a)
        assert torch.equal(other.lora_b, factors.lora_b)
        assert (other.magnitude is None) == (factors.magnitude is None)
        if factors.magnitude is not None and other.magnitude is not None:
            assert torch.equal(other.magnitude, factors.magnitude)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_stock_peft_loads_what_was_written_as_the_model_that_was_trained(
    settings: AdapterSettings, llama_folder: Path, tmp_path: Path
) -> None:
    model = trained(llama_folder, settings)
    wanted = logits(model)
    write(tmp_path, factors_of(model), settings)
    with quiet_peft():
        stock = PeftModel.from_pretrained(runner.load(llama_folder, dtype=DTYPE), tmp_path).eval()
    assert torch.equal(logits(stock), wanted)
    assert not torch.equal(logits(runner.load(llama_folder, dtype=DTYPE)), wanted)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_attaching_gives_the_model_that_was_trained(
    settings: AdapterSettings, llama_folder: Path, tmp_path: Path
) -> None:
    model = trained(llama_folder, settings)
    write(tmp_path, factors_of(model), settings)
    attached = attach(runner.load(llama_folder, dtype=DTYPE), tmp_path)
    assert not attached.training
    assert torch.equal(logits(attached), logits(model))
    require_equal(factors_of(attached), factors_of(model))
    assert all(part.dtype == torch.float32 for name, part in attached.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_files_hold_the_tensors_that_peft_itself_saves(
    settings: AdapterSettings, llama_folder: Path, tmp_path: Path
) -> None:
    model = trained(llama_folder, settings)
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", factors_of(model), settings)
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(part, theirs[name]) for name, part in ours.items())
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
        config["base_model_name_or_path"] = None
    assert configs[0] == configs[1]
    found, described = read(tmp_path / "theirs")
    require_equal(found, factors_of(model))
    assert replace(described, base_model="some/base") == settings


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_reading_gives_what_was_written(settings: AdapterSettings, tmp_path: Path) -> None:
    factors = random_factors(has_magnitude=settings.use_dora)
    write(tmp_path, factors, settings)
    found, described = read(tmp_path)
    require_equal(found, factors)
    assert described == settings


def test_the_same_adapter_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, random_factors(), PLAIN)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_factors_are_stored_as_float32(tmp_path: Path) -> None:
    halved = {
        module: Factors(factors.lora_a.bfloat16(), factors.lora_b.bfloat16())
        for module, factors in random_factors().items()
    }
    write(tmp_path, halved, PLAIN)
    assert all(part.lora_a.dtype == part.lora_b.dtype == torch.float32 for part in read(tmp_path)[0].values())


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_the_scale_is_the_one_that_peft_computes(settings: AdapterSettings, llama_folder: Path) -> None:
    model = trained(llama_folder, settings)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert vars(layer)["scaling"] == {"default": settings.scale}
    assert settings.scale == (8 / math.sqrt(4) if settings.use_rslora else 2.0)


@pytest.mark.parametrize("settings", [KINDS["lora"], KINDS["dora"]], ids=["lora", "dora"])
def test_loaded_factors_are_the_ones_in_the_model(settings: AdapterSettings, llama_folder: Path) -> None:
    source, target = trained(llama_folder, settings), trained(llama_folder, settings)
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if ".lora_" in name:
                parameter.zero_()
    load_factors(target, factors_of(source))
    require_equal(factors_of(target), factors_of(source))
    assert torch.equal(logits(target), logits(source))


def test_factors_taken_out_do_not_change_with_the_model(llama_folder: Path) -> None:
    model = trained(llama_folder, PLAIN)
    taken = factors_of(model)
    kept = {module: factors.lora_a.clone() for module, factors in taken.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(taken[module].lora_a, lora_a) for module, lora_a in kept.items())


def test_factors_are_named_as_in_the_checkpoint(llama_folder: Path) -> None:
    names = linear_names(load_file(llama_folder / "model.safetensors"))
    assert sorted(factors_of(trained(llama_folder, PLAIN))) == sorted(names)


def test_factors_that_do_not_fit_the_model_are_refused_and_change_nothing(llama_folder: Path) -> None:
    model = trained(llama_folder, PLAIN)
    before = factors_of(model)
    wrong = {module: Factors(part.lora_a + 1, part.lora_b) for module, part in before.items()}
    up, down = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
    wrong[up] = Factors(torch.zeros(4, 65), wrong[up].lora_b)
    wrong["model.layers.7.mlp.up_proj"] = wrong.pop(down)
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_factors(model, wrong)
    assert str(caught.value).splitlines()[1:] == [
        "  base_model.model.model.layers.7.mlp.up_proj.lora_A.weight: only in the factors",
        "  base_model.model.model.layers.7.mlp.up_proj.lora_B.weight: only in the factors",
        f"  base_model.model.{down}.lora_A.weight: only in the model",
        f"  base_model.model.{down}.lora_B.weight: only in the model",
        f"  base_model.model.{up}.lora_A.weight: (4, 65) given, (4, 64) in the model",
    ]
    require_equal(factors_of(model), before)


def test_a_model_without_adapter_has_no_factors(llama_folder: Path) -> None:
    with pytest.raises(ValueError, match="has no LoRA adapter"):
        factors_of(runner.load(llama_folder, dtype=DTYPE))


def test_writing_names_every_contradiction(tmp_path: Path) -> None:
    factors = random_factors()
    names = list(factors)
    factors[names[0]] = Factors(torch.zeros(5, 16), torch.zeros(12, 4))
    factors[names[1]] = replace(factors[names[1]], magnitude=torch.zeros(12))
    with pytest.raises(ValueError, match="contradict") as caught:
        write(tmp_path, factors, PLAIN)
    assert str(caught.value).splitlines()[1:] == [
        f"  {names[0]}: A and B of ranks (5, 4), the settings say 4",
        f"  {names[1]}: a magnitude, the settings say use_dora: False",
    ]
    with pytest.raises(ValueError, match="no factors to write"):
        write(tmp_path, {}, PLAIN)
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_another_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path, random_factors(), PLAIN)
    path = tmp_path / "adapter_config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "peft_type": "IA3"}))
    with pytest.raises(ValueError, match="IA3 cannot be read"):
        read(tmp_path)
    path.write_text(json.dumps({**described, "alpha_pattern": {"q_proj": 4}}))
    with pytest.raises(ValueError, match="LORA and alpha_pattern cannot be read"):
        read(tmp_path)


def test_tensors_that_are_no_factors_and_layers_without_one_are_named(tmp_path: Path) -> None:
    write(tmp_path, random_factors(), PLAIN)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 2)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read(tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        "  base_model.model.model.embed_tokens.lora_embedding_A: no part of a linear layer's LoRA",
        "  model.layers.0.self_attn.q_proj: lacks A or B",
    ]


def test_an_adapter_of_another_base_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    factors = factors_of(trained(llama_folder, PLAIN))
    known = factors["model.layers.0.mlp.up_proj"]
    factors["model.layers.9.mlp.up_proj"] = Factors(known.lora_a.clone(), known.lora_b.clone())
    write(tmp_path, factors, PLAIN)
    with pytest.raises(ValueError, match=r"did not load these layers: model\.layers\.9\.mlp\.up_proj"):
        attach(runner.load(llama_folder, dtype=DTYPE), tmp_path)
