import io
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.utils import logging as library_logging

from qlora_trainer.errors import BaseModelError, MissingPackageError
from qlora_trainer.formats.bitsandbytes import Bitsandbytes
from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.formats.gptq import Gptq
from qlora_trainer.runners import transformers as runner
from tests.models import BOS_ID, EOS_ID, PAD_ID, quantized_copy, random_token_ids

DTYPE = torch.float32
W8A8 = CompressedTensors(8, None, activation_bits=8)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=random_token_ids()).logits
    return found


def changed_copy(source: Path, folder: Path, **settings: object) -> Path:
    """A copy of a model folder with other values in its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


# --- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_the_stock_one_in_evaluation_mode(dtype: torch.dtype, llama_folder: Path) -> None:
    model = runner.load(llama_folder, dtype=dtype)
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    stored = load_file(llama_folder / "model.safetensors")
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(part, stored[name].to(dtype)) for name, part in model.state_dict().items())


@pytest.mark.parametrize("weight_format", [Bitsandbytes("nf4"), Bitsandbytes("int8"), CompressedTensors(4, 32), W8A8])
def test_loading_and_a_first_forward_say_nothing(
    weight_format: Bitsandbytes | CompressedTensors,
    llama_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = quantized_copy(llama_folder, tmp_path / "model", weight_format, dtype=torch.bfloat16)
    model = runner.load(folder, dtype=torch.bfloat16)
    assert torch.isfinite(logits(model)).all()
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []


def test_the_librarys_settings_are_as_before_after_loading(llama_folder: Path) -> None:
    before = (library_logging.get_verbosity(), library_logging.is_progress_bar_enabled(), sys.stderr)
    runner.load(llama_folder, dtype=DTYPE)
    with pytest.raises(BaseModelError):
        runner.load(llama_folder / "nowhere", dtype=DTYPE)
    assert (library_logging.get_verbosity(), library_logging.is_progress_bar_enabled(), sys.stderr) == before


def test_text_that_is_no_bar_still_reaches_the_terminal() -> None:
    screen = io.StringIO()
    stream = runner._WithoutBars(screen)
    for text in ("\rLoading 10%", "\rLoading 100%", "\n", "a problem", "\n", "", "another\n"):
        assert stream.write(text) == len(text)
    stream.flush()
    assert screen.getvalue() == "a problem\nanother\n"


def test_missing_and_misfit_weights_are_named_together(llama_folder: Path, tmp_path: Path) -> None:
    folder = changed_copy(llama_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="do not fit") as caught:
        runner.load(folder, dtype=DTYPE)
    assert str(caught.value).splitlines() == [
        f"{folder}: the weights do not fit config.json",
        "  model.norm.weight: missing",
        "  model.layers.1.mlp.up_proj.weight: (3, 3) instead of (128, 64)",
    ]


def test_weights_that_the_model_has_no_place_for_are_told_and_ignored(
    llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed_copy(llama_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "extra.weight": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(runner.load(folder, dtype=DTYPE)), logits(runner.load(llama_folder, dtype=DTYPE)))
    assert caplog.messages == [f"{folder}: not part of the model, ignored: extra.weight"]
    assert caplog.records[0].levelno == logging.WARNING


def test_a_folder_that_is_no_model_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    unknown = changed_copy(llama_folder, tmp_path / "unknown", model_type="never_heard_of")
    for folder in (tmp_path / "empty", unknown):
        with pytest.raises(BaseModelError, match=f"{folder.name}: transformers cannot load this model"):
            runner.load(folder, dtype=DTYPE)
        with pytest.raises(BaseModelError, match=f"{folder.name}: transformers cannot read config.json"):
            runner.skeleton(folder)


def test_a_format_whose_package_is_missing_is_named_with_the_package(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantized_copy(llama_folder, tmp_path / "model", Gptq(4, 32), dtype=torch.float16)
    monkeypatch.setattr("transformers.quantizers.quantizer_gptq.is_optimum_available", lambda: False)
    with pytest.raises(MissingPackageError, match=r"model: transformers lacks a package .*pip install optimum"):
        runner.load(folder, dtype=torch.float16)


def test_code_that_comes_with_a_model_is_not_run_unless_trusted(llama_folder: Path, tmp_path: Path) -> None:
    folder = changed_copy(
        llama_folder,
        tmp_path / "model",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    (folder / "own.py").write_text("raise SystemExit('the code of the model was run')\n")
    with pytest.raises(BaseModelError, match="trust_remote_code"):
        runner.load(folder, dtype=DTYPE)
    with pytest.raises(BaseModelError, match="trust_remote_code"):
        runner.skeleton(folder)


# --- architecture


def test_a_skeleton_has_the_shapes_of_the_model_and_no_memory(llama_folder: Path) -> None:
    skeleton, model = runner.skeleton(llama_folder), runner.load(llama_folder, dtype=DTYPE)
    shapes = {name: part.shape for name, part in model.state_dict().items()}
    assert {name: part.shape for name, part in skeleton.state_dict().items()} == shapes
    assert {part.device.type for part in skeleton.parameters()} == {"meta"}
    assert not skeleton.training


def test_the_skeleton_of_a_quantized_folder_is_the_dense_one(llama_folder: Path, tmp_path: Path) -> None:
    folder = quantized_copy(llama_folder, tmp_path / "model", Bitsandbytes("nf4"), dtype=torch.bfloat16)
    assert runner.linear_modules(runner.skeleton(folder)) == runner.linear_modules(runner.skeleton(llama_folder))


@pytest.mark.parametrize("name", ["llama_folder", "tied_llama_folder"])
def test_linear_modules_are_all_but_the_output_head(name: str, request: pytest.FixtureRequest) -> None:
    skeleton = runner.skeleton(request.getfixturevalue(name))
    linears = runner.linear_modules(skeleton)
    assert runner.output_head_name(skeleton) == "lm_head"
    assert len(linears) == 14
    assert "lm_head" not in linears
    assert linears["model.layers.0.self_attn.k_proj"] == (32, 64)
    assert linears["model.layers.1.mlp.down_proj"] == (64, 128)


# --- a dense model of given weights


@pytest.mark.parametrize("name", ["llama_folder", "tied_llama_folder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_a_folders_own_weights_is_the_loaded_one(
    name: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    weights = load_file(folder / "model.safetensors")
    model = runner.from_weights(folder, weights.items(), dtype=dtype)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(logits(model), logits(runner.load(folder, dtype=dtype)))


def test_tied_embeddings_stay_tied(tied_llama_folder: Path) -> None:
    weights = load_file(tied_llama_folder / "model.safetensors")
    model = runner.from_weights(tied_llama_folder, weights.items(), dtype=DTYPE)
    embedding, head = model.get_submodule("model.embed_tokens"), model.get_submodule("lm_head")
    assert embedding.weight is head.weight
    assert torch.equal(head.weight, weights["model.embed_tokens.weight"].float())


def test_the_given_weights_are_used_and_not_changed(llama_folder: Path) -> None:
    weights = {name: part.float() for name, part in load_file(llama_folder / "model.safetensors").items()}
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 64)
    before = {name: part.clone() for name, part in weights.items()}
    model = runner.from_weights(llama_folder, weights.items(), dtype=torch.bfloat16)
    assert not torch.equal(logits(model), logits(runner.load(llama_folder, dtype=torch.bfloat16)))
    assert all(torch.equal(part, before[name]) for name, part in weights.items())


def test_given_weights_that_do_not_fit_are_refused(llama_folder: Path) -> None:
    weights = load_file(llama_folder / "model.safetensors")
    del weights["lm_head.weight"]
    weights["model.norm.weight"] = torch.ones(63)
    with pytest.raises(BaseModelError, match="the given weights") as caught:
        runner.from_weights(llama_folder, weights.items(), dtype=DTYPE)
    assert str(caught.value).splitlines()[1:] == [
        "  lm_head.weight: missing",
        "  model.norm.weight: (63,) instead of (64,)",
    ]


# --- inputs rounded to int8


def one_linear(inputs: int) -> nn.Module:
    """A model of one layer that gives its input back."""
    model = nn.Sequential(nn.Linear(inputs, inputs, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(inputs))
    return model


def test_each_tokens_input_is_rounded_with_a_scale_of_its_own() -> None:
    model = runner.with_dynamic_activations(one_linear(3), ["0"])
    tokens = torch.tensor([[[1.0, -0.5, 0.001], [100.0, -127.5, 0.6], [0.0, 0.0, 0.0]]])
    with torch.no_grad():
        found = model(tokens)
    # The largest value stands for 127.5 steps: 127 above zero, 128 (the even number) below.
    step = 1 / 127.5
    assert found[0, 0].tolist() == pytest.approx([127 * step, -64 * step, 0.0])
    assert found[0, 1].tolist() == [100.0, -128.0, 1.0]
    assert found[0, 2].tolist() == [0.0, 0.0, 0.0]


def test_only_the_named_layers_round_and_the_model_is_the_given_one(llama_folder: Path) -> None:
    weights = load_file(llama_folder / "model.safetensors")
    model = runner.from_weights(llama_folder, weights.items(), dtype=DTYPE)
    plain = logits(model)
    assert runner.with_dynamic_activations(model, []) is model
    assert torch.equal(logits(model), plain)
    # Measured: 0.041, of logits up to 3.8.
    one = logits(runner.with_dynamic_activations(model, ["model.layers.1.mlp.down_proj"]))
    assert 0 < (one - plain).abs().max() < 0.1


def test_a_w8a8_file_keeps_rounding_inputs_after_its_weights_were_unpacked(llama_folder: Path, tmp_path: Path) -> None:
    folder = quantized_copy(llama_folder, tmp_path / "model", W8A8, dtype=torch.bfloat16)
    layer = runner.load(folder, dtype=DTYPE).get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, nn.Linear)
    assert layer.weight.dtype == DTYPE
    tokens = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    scale = tokens.abs().amax(dim=-1, keepdim=True) / 127.5
    rounded = torch.round(tokens / scale).clamp(-128, 127) * scale
    with torch.no_grad():
        assert torch.equal(layer(tokens), nn.functional.linear(rounded, layer.weight))
        assert not torch.equal(layer(tokens), nn.functional.linear(tokens, layer.weight))


@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64), (2, 3, 5, 64)])
def test_inputs_of_any_number_of_axes_are_rounded_as_the_library_does(
    shape: tuple[int, ...], llama_folder: Path, tmp_path: Path
) -> None:
    folder = quantized_copy(llama_folder, tmp_path / "model", W8A8, dtype=torch.bfloat16)
    layer = runner.load(folder, dtype=DTYPE).get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, nn.Linear)
    dense = nn.Linear(64, 128, bias=False)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        reference = runner.with_dynamic_activations(nn.Sequential(dense), ["0"])
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(layer(values), reference(values))


# --- generation

PROMPTS = [[BOS_ID, 40], [BOS_ID, 50, 60, 70, 80, 90], [BOS_ID, 100, 110]]


def by_hand(model: nn.Module, prompt: list[int], *, max_new_tokens: int, stop_ids: list[int]) -> list[int]:
    """The most likely next token, one whole forward pass after the other."""
    token_ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([token_ids])).logits[0, -1].argmax())
        if token in stop_ids:
            break
        token_ids.append(token)
    return token_ids[len(prompt) :]


def test_a_batch_of_prompts_goes_on_as_each_does_alone(llama_folder: Path) -> None:
    model = runner.load(llama_folder, dtype=DTYPE)
    found = runner.generate_greedy(model, PROMPTS, max_new_tokens=12, stop_ids=[EOS_ID], pad_id=PAD_ID)
    assert found == [by_hand(model, prompt, max_new_tokens=12, stop_ids=[EOS_ID]) for prompt in PROMPTS]
    assert max(len(row) for row in found) == 12


def test_generation_ends_before_any_of_the_stop_tokens(llama_folder: Path) -> None:
    model = runner.load(llama_folder, dtype=DTYPE)
    free = runner.generate_greedy(model, PROMPTS, max_new_tokens=12, stop_ids=[], pad_id=PAD_ID)
    assert [len(row) for row in free] == [12, 12, 12]
    stop_ids = [free[0][3], free[1][5]]
    found = runner.generate_greedy(model, PROMPTS, max_new_tokens=12, stop_ids=stop_ids, pad_id=PAD_ID)
    assert found == [by_hand(model, prompt, max_new_tokens=12, stop_ids=stop_ids) for prompt in PROMPTS]
    assert len(found[0]) <= 3
    assert len(found[1]) <= 5


def test_generation_settings_of_the_models_authors_change_nothing_and_stay(
    llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = changed_copy(llama_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.3, "top_k": 7, "top_p": 0.5, "repetition_penalty": 1.7})
    )
    plain, opinionated = runner.load(llama_folder, dtype=DTYPE), runner.load(folder, dtype=DTYPE)
    kept = opinionated.generation_config
    assert isinstance(kept, GenerationConfig)
    assert kept.repetition_penalty == 1.7
    wanted, found = (
        runner.generate_greedy(model, PROMPTS, max_new_tokens=12, stop_ids=[EOS_ID], pad_id=PAD_ID)
        for model in (plain, opinionated)
    )
    assert found == wanted
    assert opinionated.generation_config is kept
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


def test_the_padding_token_does_not_matter(llama_folder: Path) -> None:
    model = runner.load(llama_folder, dtype=DTYPE)
    first, second = (
        runner.generate_greedy(model, PROMPTS, max_new_tokens=6, stop_ids=[EOS_ID], pad_id=pad_id)
        for pad_id in (PAD_ID, EOS_ID)
    )
    assert first == second


def test_no_prompts_give_no_continuations(llama_folder: Path) -> None:
    model = runner.load(llama_folder, dtype=DTYPE)
    assert runner.generate_greedy(model, [], max_new_tokens=4, stop_ids=[EOS_ID], pad_id=PAD_ID) == []


def test_empty_prompts_and_models_in_training_are_refused(llama_folder: Path) -> None:
    model = runner.load(llama_folder, dtype=DTYPE)
    with pytest.raises(ValueError, match=r"prompts \[1, 2\] of the batch are empty"):
        runner.generate_greedy(model, [[5], [], []], max_new_tokens=4, stop_ids=[EOS_ID], pad_id=PAD_ID)
    with pytest.raises(ValueError, match="in training mode"):
        runner.generate_greedy(model.train(), PROMPTS, max_new_tokens=4, stop_ids=[EOS_ID], pad_id=PAD_ID)


# --- real models


@pytest.mark.real
@pytest.mark.parametrize(("name", "linears"), [("stories260K", 35), ("bitllama-3M", 56)])
def test_real_small_models_load_and_generate(name: str, linears: int, shared_folder: Path) -> None:
    folder = shared_folder / "models" / name
    model = runner.load(folder, dtype=DTYPE)
    assert len(runner.linear_modules(runner.skeleton(folder))) == linears
    assert runner.output_head_name(runner.skeleton(folder)) == "lm_head"
    prompts = [[1, 403], [1, 403, 407, 261]]
    found = runner.generate_greedy(model, prompts, max_new_tokens=16, stop_ids=[1, 2], pad_id=0)
    assert found == [by_hand(model, prompt, max_new_tokens=16, stop_ids=[1, 2]) for prompt in prompts]
    assert len(set(found[0])) > 4
