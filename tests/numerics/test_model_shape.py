"""The sizes of a model, from its config.json."""

import json
from pathlib import Path

import pytest

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
