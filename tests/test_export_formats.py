"""What each format can hold, and what is refused before anything is trained for it."""

from pathlib import Path

import pytest

from qlora_trainer import export_formats
from qlora_trainer.export_formats import (
    FACTS,
    bar_of,
    lora_rank_of_vllm,
    merge_bases,
    unfit_base_in_words,
    unfit_in_words,
    unwritable,
)
from qlora_trainer.recipe import Ladder, Quantization
from tests.stages.workbench import recipe_for

LAYERS = {"a.b": (8, 96), "a.c": (8, 64)}


def test_unfit_layers_are_named_with_the_nearest_format_that_fits() -> None:
    assert unfit_in_words("compressed_tensors_w4a16_g32", LAYERS) is None
    problem = unfit_in_words("compressed_tensors_w4a16_g64", LAYERS)
    assert problem is not None
    assert "a.b (96 inputs)" in problem
    assert "compressed_tensors_w4a16_g32 fits" in problem
    assert unfit_in_words("compressed_tensors_w8a16", LAYERS) is None


def test_outputs_must_fill_the_words_of_a_gptq_file() -> None:
    assert unfit_in_words("gptq_w4_g32", {"a": (16, 64)}) is None
    problem = unfit_in_words("gptq_w4_g32", {"a": (12, 64)})
    assert problem is not None
    assert "a (12 outputs)" in problem
    assert "outputs in multiples of 8" in problem


def test_a_runtime_that_fits_nothing_says_so() -> None:
    problem = unfit_in_words("gguf_q4_0", {"a": (8, 172)})
    assert problem is not None
    assert "choose gguf_f16" in problem


def test_every_format_has_a_bar_but_adapters_and_16_bit() -> None:
    ladder = Ladder()
    for name, facts in FACTS.items():
        assert bar_of(name, ladder) == {16: None, 8: 0.995}.get(facts.bits, 0.98)


def test_loftq_goes_into_no_base_that_needs_no_repair(tmp_path: Path) -> None:
    assert merge_bases(recipe_for(tmp_path, tmp_path)) == ("dequantized", "original")
    assert merge_bases(recipe_for(tmp_path, tmp_path, lora={"init": "loftq"})) == ("dequantized",)
    assert merge_bases(recipe_for(tmp_path, tmp_path, merge={"into": "original"})) == ("original",)


def test_a_base_that_is_not_quantized_is_the_one_base_to_merge_into(tmp_path: Path) -> None:
    assert merge_bases(recipe_for(tmp_path, tmp_path, quantization={"data_type": "none"})) == ("original",)
    gptq = recipe_for(tmp_path, tmp_path, quantization={"data_type": "gptq_int4"})
    assert merge_bases(gptq) == ("dequantized", "original")


def test_a_base_whose_groups_do_not_fit_is_told_with_the_largest_that_do() -> None:
    settings = Quantization(data_type="gptq_int4")
    assert unfit_base_in_words(settings, {"a": (8, 128)}) is None
    problem = unfit_base_in_words(settings, {"a": (8, 128), "b": (8, 96)})
    assert problem is not None
    assert "its group_size, 64; b (96 inputs) are not. Set group_size: 32" in problem
    hopeless = unfit_base_in_words(settings, {"a": (8, 172)})
    assert hopeless is not None
    assert hopeless.endswith("No group size fits; set quantization.data_type: nf4")
    assert unfit_base_in_words(Quantization(), {"a": (8, 172)}) is None


def test_magnitudes_have_no_place_in_a_gguf_adapter(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tmp_path, lora={"use_dora": True}, export={"formats": ("gguf_adapter",)})
    (problem,) = unwritable(recipe)
    assert "lora.use_dora" in problem


def test_a_library_that_must_round_and_is_missing_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_formats, "find_spec", lambda _name: None)
    recipe = recipe_for(tmp_path, tmp_path, export={"formats": ("gguf_q4_k_m", "gguf_q4_0", "bitsandbytes_nf4")})
    (problem,) = unwritable(recipe)
    assert "gguf_q4_k_m" in problem
    assert 'pip install "qlora-trainer[gguf]"' in problem


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (16, 16), (65, 128), (512, 512), (513, None)])
def test_an_adapter_takes_the_next_room_that_vllm_has(rank: int, room: int | None) -> None:
    assert lora_rank_of_vllm(rank) == room
