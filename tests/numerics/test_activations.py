"""What a layer keeps for the backward pass: counted in a real model, packed rows, as training runs it."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_trainer.data.batches import collate_packed
from qlora_trainer.numerics import activations
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.numerics.training_load import POLICIES, Checkpointing, TrainingLoad
from qlora_trainer.runners.causal_lm import find_loss_path, set_checkpointing
from qlora_trainer.runtime.weight_files import copy_companions
from tests.numerics.shapes import SMALL
from tests.stages.workbench import bench_for, random_rows, recipe_for

RANK = 8


class Made(TorchDispatchMode):
    """Storages made while it lasts, and still there: also what autograd's hooks do not see, as a closure's tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def bytes(self) -> int:
        """Of what is still there, each storage once."""
        return sum(storage.nbytes() for storage in self._alive)

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        taken = {each.untyped_storage() for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and each.untyped_storage() not in taken:
                self._alive.add(each.untyped_storage())
        return made


def kept_bytes(
    base: Path, folder: Path, dtype: str, policy: Checkpointing, *, data_type: str = "nf4", **lora: object
) -> tuple[int, int]:
    """Tokens of a packed micro-batch, and bytes that autograd keeps of it; weights not counted."""
    quantization = {"compute_dtype": dtype, "data_type": data_type}
    recipe = recipe_for(base, folder, quantization=quantization, lora={"rank": RANK, **lora})
    model = bench_for(recipe).adapted().train()
    set_checkpointing(model, policy)
    path = find_loss_path(model)
    assert path.packs
    rows = random_rows(12)
    batch = collate_packed(rows, range(12))
    with path.attending(model, is_packed=True), Made() as made:
        loss = path.summed_nats(model, batch.token_ids, batch.labels, boundaries=batch.boundaries)
    assert loss.requires_grad
    return batch.token_ids.numel(), made.bytes()


@pytest.mark.parametrize("data_type", ["nf4", "none", "gptq_int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("policy", POLICIES)
def test_layers_keep_what_was_predicted(
    policy: Checkpointing, dtype: str, data_type: Any, wide_llama_folder: Path, tmp_path: Path
) -> None:
    tokens, kept = kept_bytes(wide_llama_folder, tmp_path, dtype, policy, data_type=data_type)
    size = 4 if dtype == "float32" else 2
    load = TrainingLoad(rank=RANK, compute_bytes=size, tokens=tokens, checkpointing=policy, data_type=data_type)
    # Beside the layers: the last norm's input and its reciprocal, and the gradient of the label tokens' states.
    beside = tokens * (size * SMALL.hidden + 4) + tokens * size * SMALL.hidden
    predicted = activations.kept(SMALL, load)
    assert predicted <= kept + beside
    # Rotary tables, boundaries and label places are small and not predicted.
    assert kept == pytest.approx(predicted + beside, rel=0.15)


# An int8 base in float32 is not packed (``find_loss_path``), and so not counted here.
@pytest.mark.parametrize(
    ("lora", "data_type", "dtype"),
    [
        ({"dropout": 0.1}, "nf4", "bfloat16"),
        ({"dropout": 0.1}, "nf4", "float32"),
        ({"use_dora": True}, "nf4", "bfloat16"),
        ({"use_dora": True}, "nf4", "float32"),
        ({"use_dora": True, "dropout": 0.1}, "nf4", "bfloat16"),
        ({"use_dora": True, "dropout": 0.1}, "nf4", "float32"),
        ({}, "int8", "bfloat16"),
        ({"dropout": 0.1}, "int8", "bfloat16"),
        ({"dropout": 0.1}, "none", "bfloat16"),
        ({"use_dora": True}, "none", "bfloat16"),
        ({"dropout": 0.1}, "gptq_int4", "bfloat16"),
        ({"use_dora": True}, "gptq_int4", "bfloat16"),
        ({"use_dora": True}, "int8", "bfloat16"),
        ({"use_dora": True, "dropout": 0.1}, "int8", "bfloat16"),
    ],
)
@pytest.mark.parametrize("policy", ["none", "full"])
def test_what_goes_its_own_way_keeps_what_was_predicted(
    policy: Checkpointing, lora: dict[str, Any], data_type: Any, dtype: str, wide_llama_folder: Path, tmp_path: Path
) -> None:
    tokens, kept = kept_bytes(wide_llama_folder, tmp_path, dtype, policy, data_type=data_type, **lora)
    size = 4 if dtype == "float32" else 2
    load = TrainingLoad(
        rank=RANK,
        compute_bytes=size,
        tokens=tokens,
        checkpointing=policy,
        data_type=data_type,
        has_dropout="dropout" in lora,
        use_dora="use_dora" in lora,
    )
    beside = tokens * (size * SMALL.hidden + 4) + tokens * size * SMALL.hidden
    assert kept == pytest.approx(activations.kept(SMALL, load) + beside, rel=0.15)


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 64}),
        ("gemma3_text", {"head_dim": 64}),
        ("phi3", {"pad_token_id": 0}),
    ],
)
def test_other_architectures_keep_what_was_predicted(
    architecture: str, more: dict[str, int], wide_llama_folder: Path, tmp_path: Path
) -> None:
    settings = {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 320,
        **more,
    }
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    copy_companions(wide_llama_folder, tmp_path / "model")
    tokens, kept = kept_bytes(tmp_path / "model", tmp_path, "bfloat16", "none")
    shape = ModelShape.from_config({**settings, "model_type": architecture})
    load = TrainingLoad(rank=RANK, compute_bytes=2, tokens=tokens, checkpointing="none")
    beside = tokens * (2 * 2 * shape.hidden + 4)
    assert kept == pytest.approx(activations.kept(shape, load) + beside, rel=0.06)


def test_layers_that_share_an_input_keep_it_once() -> None:
    load = TrainingLoad(target_modules=("q_proj",))
    more = replace(load, target_modules=("q_proj", "k_proj", "v_proj"))
    one, three = (activations.kept_by_layer(SMALL, each)["adapter inputs"] for each in (load, more))
    assert one == three > 0


def test_the_loss_holds_one_chunk_however_many_labels_there_are() -> None:
    load = TrainingLoad(tokens=4096, label_tokens=2048)
    more = replace(load, label_tokens=4096)
    states = 2 * 2048 * SMALL.hidden * load.compute_bytes
    few = 4096 * SMALL.vocabulary < activations.LOSS_CHUNK_VALUES
    assert few
    difference = activations.of_loss(SMALL, more) - activations.of_loss(SMALL, load)
    assert difference >= states
    wide = replace(SMALL, vocabulary=128_256)
    assert activations.of_loss(wide, more) - activations.of_loss(wide, load) == states
