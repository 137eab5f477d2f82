from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from qlora_trainer.errors import RecipeError
from qlora_trainer.formats.gguf import write_gguf_adapter

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def factors(rank: int = 4) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lora_a = {module: torch.randn(rank, 64, generator=generator) for module in (Q, UP)}
    lora_b = {Q: torch.randn(64, rank, generator=generator), UP: torch.randn(128, rank, generator=generator)}
    return lora_a, lora_b


@pytest.mark.parametrize("scale", [2.0, 16 / 4**0.5, 0.37])
def test_alpha_over_rank_is_the_scale_of_training(scale: float, llama_folder: Path, tmp_path: Path) -> None:
    size = write_gguf_adapter(tmp_path / "a.gguf", *factors(), scale=scale, like=llama_folder)
    assert size == (tmp_path / "a.gguf").stat().st_size
    reader = GGUFReader(tmp_path / "a.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert alpha / 4 == pytest.approx(scale, rel=torch.finfo(torch.float32).eps)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"


def test_factors_are_stored_under_llama_cpps_names_with_the_rows_of_q_reordered(
    llama_folder: Path, tmp_path: Path
) -> None:
    lora_a, lora_b = factors()
    write_gguf_adapter(tmp_path / "a.gguf", lora_a, lora_b, scale=1.0, like=llama_folder)
    found = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert torch.equal(found["blk.0.attn_q.weight.lora_a"], lora_a[Q])
    assert torch.equal(found["blk.0.attn_q.weight.lora_b"][:4], lora_b[Q][[0, 8, 1, 9]])
    assert torch.equal(found["blk.1.ffn_up.weight.lora_b"], lora_b[UP])


def test_what_has_no_place_is_refused(tied_llama_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    head = {"lm_head": torch.ones(4, 64)}, {"lm_head": torch.ones(320, 4)}
    with pytest.raises(RecipeError, match="lm_head is the embedding itself"):
        write_gguf_adapter(tmp_path / "a", *head, scale=1.0, like=tied_llama_folder)
    router = {"model.layers.0.router": torch.ones(4, 64)}, {"model.layers.0.router": torch.ones(8, 4)}
    with pytest.raises(RecipeError, match="router"):
        write_gguf_adapter(tmp_path / "a", *router, scale=1.0, like=llama_folder)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_differ_a_scale_of_zero_and_no_factors_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    lora_a, lora_b = factors()
    wider_a, wider_b = factors(8)
    mixed = {Q: lora_a[Q], UP: wider_a[UP]}, {Q: lora_b[Q], UP: wider_b[UP]}
    with pytest.raises(ValueError, match=r"ranks \[4, 8\]"):
        write_gguf_adapter(tmp_path / "a", *mixed, scale=1.0, like=llama_folder)
    with pytest.raises(ValueError, match="reads it as 1"):
        write_gguf_adapter(tmp_path / "a", lora_a, lora_b, scale=0.0, like=llama_folder)
    with pytest.raises(ValueError, match="A and B of the same modules"):
        write_gguf_adapter(tmp_path / "a", {}, {}, scale=1.0, like=llama_folder)
    with pytest.raises(ValueError, match="got 2 A and 1 B"):
        write_gguf_adapter(tmp_path / "a", lora_a, {Q: lora_b[Q]}, scale=1.0, like=llama_folder)
