import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora_trainer.errors import BaseModelError
from qlora_trainer.numerics.loss import IGNORE_INDEX, summed_nats
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.blocks import BlockwiseModel, inputs_of, streamed_label_logits
from qlora_trainer.runners.causal_lm import label_logits
from tests.conftest import REPOSITORY
from tests.models import random_token_ids, tiny_llama

DTYPE = torch.float32

SIZES: dict[str, object] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Windows are shorter than the rows of the test, and differ from block to block where the architecture mixes them.
ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "gemma2": lambda: Gemma2Config(
        **SIZES, sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    # Its blocks give tuples, and its list of blocks is called transformer.h.
    "gptj": lambda: GPTJConfig(vocab_size=320, n_embd=64, n_layer=3, n_head=4, rotary_dim=8, initializer_range=0.2),
}


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # Norms begin as ones or zeros, which would hide a norm that was not loaded.
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "tied_llama", *ARCHITECTURES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param in ARCHITECTURES:
        return saved(ARCHITECTURES[request.param](), tmp_path_factory.mktemp(request.param))
    found: Path = request.getfixturevalue(f"{request.param}_folder")
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def blockwise(folder: Path, dtype: torch.dtype = DTYPE) -> BlockwiseModel:
    """A model with everything outside ``.<number>.`` in memory, told apart here without ``block_of``."""
    rest = {name: part for name, part in tensors_of(folder).items() if not any(p.isdigit() for p in name.split("."))}
    return BlockwiseModel(folder, rest.items(), dtype=dtype)


def reader(folder: Path) -> Callable[[str], Mapping[str, Tensor]]:
    weights = tensors_of(folder)
    return lambda block: {name: part for name, part in weights.items() if name.startswith(f"{block}.")}


def batches() -> list[tuple[Tensor, Tensor]]:
    """Two batches of different lengths; some positions carry labels in one row only."""
    found = []
    for seed, tokens in ((0, 24), (1, 17)):
        token_ids = random_token_ids(rows=2, tokens=tokens, seed=seed)
        labels = token_ids.clone()
        labels[0, :5] = IGNORE_INDEX
        labels[1, :9] = IGNORE_INDEX
        labels[1, -3:] = IGNORE_INDEX
        found.append((token_ids, labels))
    return found


def parts_in_memory(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_parameters() if not part.is_meta]


@torch.no_grad()
def expected_logits(folder: Path, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    model = runner.load(folder, dtype=dtype)
    return [label_logits(model, *batch) for batch in batches()]


def assert_same_bits(folder: Path, dtype: torch.dtype) -> None:
    expected = expected_logits(folder, dtype)
    found = list(streamed_label_logits(blockwise(folder, dtype), reader(folder), batches()))
    for (logits, labels), (wanted, wanted_labels) in zip(found, expected, strict=True):
        assert logits.dtype == dtype
        assert torch.equal(logits, wanted)
        assert torch.equal(labels, wanted_labels)


# --- the same model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bit_for_bit_those_of_the_whole_model(dtype: torch.dtype, folder: Path) -> None:
    assert_same_bits(folder, dtype)


def test_the_quickstarts_base_gives_its_own_logits() -> None:
    assert_same_bits(REPOSITORY / "recipes" / "quickstart" / "base", torch.float32)


def test_gradients_are_those_of_the_whole_model(folder: Path) -> None:
    token_ids, labels = batches()[0]
    whole = runner.load(folder, dtype=DTYPE)
    model = blockwise(folder)
    last = len(model.block_names) - 1
    name = model.block_names[last]
    wanted = whole.get_submodule(name)
    whole.requires_grad_(requires_grad=False)
    wanted.requires_grad_()
    summed_nats(*label_logits(whole, token_ids, labels)).backward()

    start = model.start(token_ids)
    hidden = start.hidden
    read = reader(folder)
    with torch.no_grad():
        for index in range(last):
            with model.block(index, read(model.block_names[index])) as block:
                hidden = model.run(block, index, hidden, start)
    hidden = hidden.requires_grad_()
    positions = (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().flatten()
    with model.block(last, read(name)) as block:
        assert not any(parameter.requires_grad for parameter in block.parameters())
        block.requires_grad_()
        logits = model.logits(model.run(block, last, hidden, start), token_ids, positions)
        summed_nats(logits, labels[:, 1:][:, positions]).backward()
        for (part, found), (other, expected) in zip(block.named_parameters(), wanted.named_parameters(), strict=True):
            assert part == other
            assert found.grad is not None
            assert expected.grad is not None
            assert torch.equal(found.grad, expected.grad), part
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


def test_blocks_of_one_model_may_be_called_differently(tmp_path: Path) -> None:
    model = blockwise(saved(ARCHITECTURES["gemma3"](), tmp_path))
    masks = [call.kwargs["attention_mask"] for call in model.start(batches()[0][0]).calls]
    assert masks[0] is not None
    assert masks[1] is None


def test_blocks_keep_no_cache_whatever_the_model_passes(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = blockwise(llama_folder)
    inner = model._model.get_submodule("model")
    plain = inner.forward

    def forward(**settings: object) -> object:
        return plain(**{**settings, "use_cache": True})

    monkeypatch.setattr(inner, "forward", forward)
    for call in model.start(random_token_ids()).calls:
        assert call.kwargs["past_key_values"] is None
        assert not call.kwargs.get("use_cache")


def test_a_new_batch_finds_the_model_as_it_was(llama_folder: Path) -> None:
    model = blockwise(llama_folder)
    first = [logits for logits, _ in streamed_label_logits(model, reader(llama_folder), batches())]
    again = [logits for logits, _ in streamed_label_logits(model, reader(llama_folder), batches()[::-1])]
    assert all(torch.equal(one, other) for one, other in zip(first, again[::-1], strict=True))


def test_streaming_remembers_nothing_for_gradients(llama_folder: Path) -> None:
    for logits, _ in streamed_label_logits(blockwise(llama_folder), reader(llama_folder), batches()):
        assert torch.is_grad_enabled()
        assert not logits.requires_grad


# --- memory


def test_only_one_block_is_ever_in_memory(llama_folder: Path) -> None:
    model, read = blockwise(llama_folder), reader(llama_folder)
    outside = parts_in_memory(model._model)
    assert not [name for name in outside if model.block_of(name)]
    for index, name in enumerate(model.block_names):
        with model.block(index, read(name)) as block:
            inside = set(parts_in_memory(model._model)) - set(outside)
            assert inside == {f"{name}.{part}" for part, _ in block.named_parameters()}
            assert {part.dtype for part in block.parameters()} == {DTYPE}
            block.requires_grad_()
        assert parts_in_memory(model._model) == outside
        assert not any(part.requires_grad for part in block.parameters())


def test_a_block_is_emptied_where_its_user_fails(llama_folder: Path) -> None:
    model = blockwise(llama_folder)
    with pytest.raises(KeyError), model.block(0, reader(llama_folder)("model.layers.0")) as block:
        raise KeyError
    assert parts_in_memory(block) == []


def test_blocks_are_read_once_each(llama_folder: Path) -> None:
    asked = []

    def read(name: str) -> Mapping[str, Tensor]:
        asked.append(name)
        return reader(llama_folder)(name)

    assert len(list(streamed_label_logits(blockwise(llama_folder), read, batches()))) == 2
    assert asked == ["model.layers.0", "model.layers.1"]


# --- names


@pytest.mark.parametrize(
    ("tensor_name", "block"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0"),
        ("model.layers.1.input_layernorm.weight", "model.layers.1"),
        ("model.layers.2.input_layernorm.weight", None),
        ("model.layers.10.input_layernorm.weight", None),
        ("model.layers.1", None),
        ("0.weight", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_a_tensor_belongs_to_its_block(tensor_name: str, block: str | None, llama_folder: Path) -> None:
    assert blockwise(llama_folder).block_of(tensor_name) == block


def test_blocks_are_found_under_another_name(tmp_path: Path) -> None:
    model = blockwise(saved(ARCHITECTURES["gptj"](), tmp_path))
    assert model.block_names == ("transformer.h.0", "transformer.h.1", "transformer.h.2")


def test_experts_inside_a_block_are_not_blocks(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256)
    config.save_pretrained(tmp_path)
    skeleton = runner.skeleton(tmp_path)
    rest = {
        name: torch.zeros(part.shape) for name, part in skeleton.state_dict().items() if not name.startswith("model.la")
    }
    model = BlockwiseModel(tmp_path, rest.items(), dtype=DTYPE)
    assert model.block_names == ("model.layers.0", "model.layers.1", "model.layers.2")


# --- what layers are given


def test_inputs_are_those_of_the_whole_model(llama_folder: Path) -> None:
    token_ids = batches()[0][0]
    modules = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    whole = runner.load(llama_folder, dtype=DTYPE)
    with inputs_of(whole.get_submodule("model.layers.0"), "model.layers.0", modules) as wanted, torch.no_grad():
        whole(input_ids=token_ids, use_cache=False)
    model = blockwise(llama_folder)
    start = model.start(token_ids)
    with model.block(0, reader(llama_folder)("model.layers.0")) as block:
        block.requires_grad_()
        with inputs_of(block, "model.layers.0", modules) as seen:
            model.run(block, 0, start.hidden, start)
        model.run(block, 0, start.hidden, start)
    assert list(seen) == modules
    for name in modules:
        (found,), (expected,) = seen[name], wanted[name]
        assert torch.equal(found, expected)
        assert not found.requires_grad


def test_inputs_of_a_layer_elsewhere_are_refused(llama_folder: Path) -> None:
    model = blockwise(llama_folder)
    with (
        pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: not in the block model\.layers\.0"),
        inputs_of(model._blocks[0], "model.layers.0", ["model.layers.1.mlp.up_proj"]),
    ):
        pass


# --- refusals


def test_weights_that_do_not_fit_a_block_are_all_named(llama_folder: Path) -> None:
    weights = dict(reader(llama_folder)("model.layers.0"))
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(128, 64)
    weights["model.layers.0.input_layernorm.weight"] = torch.ones(63)
    model = blockwise(llama_folder)
    with pytest.raises(BaseModelError) as problem, model.block(0, weights):
        pass
    assert str(problem.value).splitlines() == [
        "model.layers.0: the weights do not fit the block",
        "  model.layers.0.mlp.up_proj.weight: missing",
        "  model.layers.0.self_attn.q_proj.bias: unexpected",
        "  model.layers.1.mlp.up_proj.weight: unexpected",
        "  model.layers.0.input_layernorm.weight: (63,) instead of (64,)",
    ]
    assert parts_in_memory(model._blocks[0]) == []


def test_rotary_frequencies_of_an_old_checkpoint_are_no_weights(llama_folder: Path) -> None:
    weights = dict(reader(llama_folder)("model.layers.0"))
    with blockwise(llama_folder).block(0, {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}):
        pass


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_what_is_missing_outside_the_blocks_is_named(name: str, llama_folder: Path) -> None:
    rest = {key: part for key, part in tensors_of(llama_folder).items() if "layers" not in key and key != name}
    with pytest.raises(BaseModelError, match=f"{name}: missing"):
        BlockwiseModel(llama_folder, rest.items(), dtype=DTYPE)


def test_what_is_misshapen_outside_the_blocks_is_named(llama_folder: Path) -> None:
    rest = {key: part for key, part in tensors_of(llama_folder).items() if "layers" not in key}
    rest["model.norm.weight"] = torch.ones(65)
    with pytest.raises(BaseModelError, match=r"model\.norm\.weight: \(65,\) instead of \(64,\)"):
        BlockwiseModel(llama_folder, rest.items(), dtype=DTYPE)


def test_unknown_tensors_outside_the_blocks_are_told_as_in_loading(
    llama_folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    rest = {key: part for key, part in tensors_of(llama_folder).items() if "layers" not in key}
    with caplog.at_level(logging.WARNING):
        BlockwiseModel(llama_folder, rest.items(), dtype=DTYPE)
        assert caplog.messages == []
        BlockwiseModel(llama_folder, {**rest, "model.other": torch.ones(1)}.items(), dtype=DTYPE)
    assert caplog.messages == [f"{llama_folder}: not part of the model, ignored: model.other"]
    assert capfd.readouterr() == ("", "")


def test_tensors_of_blocks_among_the_rest_take_no_memory(llama_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = BlockwiseModel(llama_folder, tensors_of(llama_folder).items(), dtype=DTYPE)
    assert set(parts_in_memory(model._model)) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert caplog.messages == []


def test_an_untied_head_that_is_given_is_kept_apart(tmp_path: Path) -> None:
    """As transformers loads a folder whose config.json wrongly says that the head is tied."""
    folder = tiny_llama(tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert_same_bits(folder, torch.float32)


def test_an_architecture_without_linear_layers_in_a_list_is_refused(tmp_path: Path) -> None:
    GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="GPT2LMHeadModel cannot be run block by block"):
        BlockwiseModel(tmp_path, [], dtype=DTYPE)


@pytest.mark.parametrize("change", ["skip", "twice", "between", "short"])
def test_blocks_that_do_not_hand_on_their_hidden_states_are_refused(
    change: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = blockwise(llama_folder)
    inner = model._model.get_submodule("model")

    def forward(input_ids: Tensor, **_settings: object) -> object:
        hidden = inner.embed_tokens(input_ids)
        first, second = inner.layers
        if change == "skip":
            first(hidden)
            hidden = second(hidden)
        elif change == "twice":
            hidden = first(first(second(hidden)))
        elif change == "between":
            hidden = second(2 * first(hidden))
        else:
            hidden = first(hidden)
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    monkeypatch.setattr(inner, "forward", forward)
    with pytest.raises(BaseModelError, match=r"LlamaForCausalLM cannot be run block by block: .* model\.layers\.0 to"):
        model.start(random_token_ids())
    monkeypatch.undo()
    assert "forward" not in vars(model._blocks[0])
    assert model.start(random_token_ids()).hidden.shape == (2, 24, 64)
