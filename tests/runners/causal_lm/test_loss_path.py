"""Packed and padded passes give the loss and gradients of the model itself; what it does not allow is found out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qlora_trainer.data.batches import Batch, collate, collate_packed
from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.numerics.loss import IGNORE_INDEX
from qlora_trainer.runners.causal_lm import LossPath, find_loss_path, set_checkpointing
from qlora_trainer.runners.causal_lm.attention import documents_attended
from tests.stages.workbench import random_rows

ROWS = random_rows(4, seed=3)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "mistral, window of 4": lambda: transformers.MistralConfig(**SIZES, sliding_window=4),
    "gemma2, capped": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4),
    "granite, scaled": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0, residual_multiplier=0.5),
    "phi3, fused": lambda: transformers.Phi3Config(**SIZES),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4  # as they are made, every token would have nearly the same loss
    model.requires_grad_(False)
    embedding: Any = model.get_submodule("model.embed_tokens")
    embedding.register_forward_hook(lambda module, arguments, output: output.requires_grad_())
    layer = model.get_submodule("model.layers.0")
    first = next(parameter for parameter in layer.parameters() if parameter.ndim > 1)
    first.requires_grad_()
    return model.train()


def loss_and_gradient(model: nn.Module, batches: list[Batch]) -> tuple[float, Tensor]:
    path = find_loss_path(model)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        with path.attending(model, is_packed=batch.boundaries is not None):
            nats = path.summed_nats(model, batch.token_ids, batch.labels, boundaries=batch.boundaries)
            nats.backward()
        total += nats.item()
    return total, torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


def models_loss(model: nn.Module, row: EncodedRow) -> Tensor:
    token_ids, labels = torch.tensor([row.token_ids]), torch.tensor([row.labels])
    nats: Tensor = model(input_ids=token_ids, labels=labels, use_cache=False).loss
    return nats * int((labels[:, 1:] != IGNORE_INDEX).sum())


def models_own(model: nn.Module, rows: list[EncodedRow]) -> tuple[float, Tensor]:
    """Loss by transformers' own loss function, row by row."""
    model.zero_grad()
    total = 0.0
    for row in rows:
        nats = models_loss(model, row)
        nats.backward()
        total += nats.item()
    return total, torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_and_padded_are_the_models_own_loss_and_gradient(name: str) -> None:
    model = model_of(name)
    assert find_loss_path(model).packs
    wanted_loss, wanted = models_own(model, ROWS)
    assert wanted.norm() > 0
    for batch in (collate_packed(ROWS, range(4)), collate(ROWS, range(4), 2)):
        loss, gradient = loss_and_gradient(model, [batch])
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("name", ["llama", "gemma2, capped"])
def test_losses_of_rows_are_those_of_each_row_alone(name: str) -> None:
    model = model_of(name).eval()
    batch = collate(ROWS, range(4), 2)
    with torch.no_grad():
        path = find_loss_path(model)
        found = path.nats_by_row(model, batch.token_ids, batch.labels)
        plain = LossPath(None, packs=False).nats_by_row(model, batch.token_ids, batch.labels)
        alone = [float(models_loss(model, row)) for row in ROWS]
    assert path.head is not None
    assert found == pytest.approx(alone, rel=1e-5)
    assert plain == pytest.approx(alone, rel=1e-5)


def test_checkpointed_layers_attend_to_packed_documents_when_they_are_computed_again() -> None:
    model = model_of("llama")
    wanted = loss_and_gradient(model, [collate_packed(ROWS, range(4))])
    for policy in ("selective", "full", "none"):
        set_checkpointing(model, policy)  # type: ignore[arg-type]
        found = loss_and_gradient(model, [collate_packed(ROWS, range(4))])
        assert found[0] == wanted[0]
        assert torch.equal(found[1], wanted[1])


def test_a_document_does_not_see_what_stands_before_it() -> None:
    model = model_of("llama").eval()
    path = find_loss_path(model)
    losses = []
    for first in (0, 1):
        other = EncodedRow(ROWS[first].token_ids[:6], (IGNORE_INDEX,) * 6, (), "", "")
        batch = collate_packed([other, ROWS[2]], [0, 1])
        with torch.no_grad(), path.attending(model, is_packed=True):
            losses.append(path.summed_nats(model, batch.token_ids, batch.labels, boundaries=batch.boundaries))
    assert torch.equal(*losses)


def test_looking_for_the_path_changes_nothing() -> None:
    model = model_of("llama")
    random, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    find_loss_path(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_mixes_tokens_past_its_attention_is_not_packed() -> None:
    class Mixing(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.mlp(x + x.cumsum(dim=1))
            return output

    model = model_of("llama")
    layer: Any = model.get_submodule("model.layers.1")
    layer.mlp = Mixing(layer.mlp)
    path = find_loss_path(model)
    assert (path.packs, path.head is not None) == (False, True)
    assert path.why_not == "packed documents are not kept apart by its layers"
    loss, _ = loss_and_gradient(model, [collate(ROWS, range(4), 2)])
    assert loss == pytest.approx(models_own(model, ROWS)[0], rel=1e-5)


def test_a_model_with_another_output_layer_keeps_its_own_logits() -> None:
    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    model = model_of("llama")
    door: Any = model
    head = Halved(SIZES["hidden_size"], SIZES["vocab_size"], bias=False)
    head.weight = door.lm_head.weight
    door.lm_head = head
    path = find_loss_path(model)
    assert (path.packs, path.head) == (False, None)
    assert path.why_not == "its output head is no plain linear layer"
    loss, _ = loss_and_gradient(model, [collate(ROWS, range(4), 2)])
    assert loss == pytest.approx(models_own(model, ROWS)[0], rel=1e-5)


def test_another_runtime_behind_the_same_calls_is_scored_by_its_logits() -> None:
    class Other(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.place = nn.Parameter(torch.empty(0), requires_grad=False)
            self.answer = model.forward

        def forward(self, input_ids: Tensor, *, logits_to_keep: Tensor, use_cache: bool) -> Any:
            return self.answer(input_ids=input_ids, logits_to_keep=logits_to_keep, use_cache=use_cache)

    model = model_of("llama").eval()
    batch = collate(ROWS, range(4), 2)
    with torch.no_grad():
        path = find_loss_path(Other(model))
        found = path.nats_by_row(Other(model), batch.token_ids, batch.labels)
        wanted = find_loss_path(model).nats_by_row(model, batch.token_ids, batch.labels)
    assert (path.head, path.packs) == (None, False)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_layer_with_a_kind_of_attention_that_is_not_known_is_told() -> None:
    model = model_of("llama")
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    plain = attention.forward
    attention.forward = lambda *arguments, **settings: plain(*arguments, **settings, s_aux=torch.zeros(4))
    path = find_loss_path(model)
    assert not path.packs
    assert path.why_not == "LlamaAttention cannot attend to packed documents (s_aux)"


@contextmanager
def _counting(module: nn.Module) -> Iterator[list[int]]:
    seen: list[int] = []
    handle = module.register_forward_hook(lambda module, arguments, output: seen.append(output.shape[1]))
    yield seen
    handle.remove()


def test_padding_is_not_computed_when_rows_are_packed() -> None:
    model = model_of("llama")
    path = find_loss_path(model)
    batch = collate_packed(ROWS, range(4))
    with _counting(model.get_submodule("model.norm")) as seen, path.attending(model, is_packed=True):
        path.summed_nats(model, batch.token_ids, batch.labels, boundaries=batch.boundaries)
    assert seen == [sum(len(row.token_ids) for row in ROWS)]


def test_attention_is_put_back_after_an_error(llama_folder: Path) -> None:
    model = model_of("llama")
    with pytest.raises(KeyError), documents_attended(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
