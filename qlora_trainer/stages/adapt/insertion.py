"""Which layers get an adapter, and a base with adapters in it."""

from pathlib import Path

import torch
from torch import nn

from qlora_trainer.errors import RecipeError
from qlora_trainer.formats.peft_adapter import load_factors, quiet_peft, read
from qlora_trainer.recipe import Lora
from qlora_trainer.records import BaseCheckpoint, LinearLayers
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.causal_lm import make_lean
from qlora_trainer.stages.adapt.lean_linear import lean_layers

# isort: split
from peft import LoraConfig, PeftModel, get_peft_model


def choose_layers(base: BaseCheckpoint, lora: Lora, *, trust_remote_code: bool = False) -> LinearLayers:
    """Which linear layers of the base are quantized and which get an adapter.

    Every linear layer but the output head is quantized, as in the paper; the recipe says where adapters go.

    Raises:
        RecipeError: a named target module does not occur in the model; lists the names that do.
    """
    skeleton = runner.skeleton(base.folder, trust_remote_code=trust_remote_code)
    linears = runner.linear_modules(skeleton)
    head = runner.output_head_name(skeleton)
    if lora.target_modules == "all-linear":
        adapted = tuple(linears)
    else:
        unknown = lora.unknown_targets(name.rsplit(".", 1)[-1] for name in linears)
        if unknown:
            raise RecipeError("\n".join(f"lora.target_modules: {sentence}" for sentence in unknown))
        adapted = tuple(name for name in linears if name.rsplit(".", 1)[-1] in lora.target_modules)
    return LinearLayers(quantized=linears, adapted=adapted, ignored=(head,) if head else ())


def insert(
    model: nn.Module, lora: Lora, *, layers: LinearLayers, compute_dtype: str, seed: int, initial: Path | None = None
) -> PeftModel:
    """A base in memory, however it is stored, with float32 adapters; changed in place and given back.

    Nothing but the adapters is trainable.

    Args:
        model: the base.
        lora: rank, scale and kind of the adapters.
        layers: where they go.
        compute_dtype: type of the base's activations.
        seed: of A's random values, and of dropout: sets torch's generator.
        initial: folder of the first factors; None = fresh ones.
    """
    torch.manual_seed(seed)
    with quiet_peft():
        adapted: PeftModel = get_peft_model(model, _lora_config(lora, layers))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    if initial is not None:
        load_adapter(adapted, initial)
    adapted.eval()
    make_lean(adapted, getattr(torch, compute_dtype))
    return adapted


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Changes the model's adapter to the one in a folder, bit for bit."""
    factors, _ = read(folder)
    load_factors(model, factors)


def _lora_config(lora: Lora, layers: LinearLayers) -> LoraConfig:
    """The settings as peft spells them, with our forward for adapted layers."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=list(layers.adapted),
        bias="none",
        task_type="CAUSAL_LM",
    )
    config._register_custom_module(lean_layers())
    return config
