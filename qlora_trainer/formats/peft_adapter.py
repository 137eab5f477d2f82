"""Trained low-rank factors as files in PEFT's layout, and in and out of a PEFT model.

With ``stages.adapt`` this is the door to peft. Modules are named as in the base's checkpoint; peft's own prefixes
and adapter names stay in here. Which layers get an adapter, and how it is trained, is not known here.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# Before peft, which imports bitsandbytes: see the door's first lines.
from qlora_trainer.runtime import bnb  # noqa: F401
from qlora_trainer.runtime.weight_files import write_tensors

# isort: split
from peft import LoraConfig, PeftModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:lora_(?P<factor>[AB])\.weight|lora_(?P<magnitude>magnitude_vector))"
)


@dataclass(frozen=True)
class Factors:
    """The trained tensors of one adapted layer, float32.

    Attributes:
        lora_a: down-projection A, shape ``(r, in_features)``.
        lora_b: up-projection B, shape ``(out_features, r)``.
        magnitude: DoRA's norm of each output's weight, shape ``(out_features,)``; None without DoRA.
    """

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter's file says beside its tensors.

    Attributes:
        rank: r of the factors.
        alpha: numerator of the scale.
        dropout: on the adapter's input while training.
        use_rslora: the scale is ``alpha / sqrt(rank)`` (arXiv 2312.03732), else ``alpha / rank``.
        use_dora: magnitudes are trained too (arXiv 2402.09353).
        base_model: path or hub name of the base that the adapter belongs on.
    """

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    base_model: str

    @property
    def scale(self) -> float:
        """The factor s before B A, as PEFT computes it."""
        return float(self.alpha / (self.rank**0.5 if self.use_rslora else self.rank))


def write(folder: Path, factors: Mapping[str, Factors], settings: AdapterSettings) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into an existing folder.

    Raises:
        ValueError: no factors, or factors that contradict each other or the settings; names every module.
        OSError: the folder cannot be written.
    """
    _require_consistent(factors, settings)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=settings.base_model,
        inference_mode=True,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=sorted(factors),
    )
    # Sorted, because peft holds the modules as a set and would write them in another order every time.
    described = {**config.to_dict(), "target_modules": sorted(factors)}
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tensors(folder / WEIGHTS_FILE, {name: part.float() for name, part in _tensors(factors).items()})


def read(folder: Path) -> tuple[dict[str, Factors], AdapterSettings]:
    """What ``write`` wrote, or peft itself for plain LoRA, rsLoRA and DoRA of linear layers.

    Raises:
        ValueError: the adapter is of another kind, or has ranks or alphas of its own for some layers, or a tensor is
            missing or unknown.
    """
    described = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    own = [name for name in ("rank_pattern", "alpha_pattern") if described.get(name)]
    if described["peft_type"] != "LORA" or own:
        kind = " and ".join([described["peft_type"], *own])
        raise ValueError(f"{folder / CONFIG_FILE}: {kind} cannot be read; give a LORA adapter of one rank and alpha")
    settings = AdapterSettings(
        rank=described["r"],
        alpha=described["lora_alpha"],
        dropout=described["lora_dropout"],
        use_rslora=described["use_rslora"],
        use_dora=described["use_dora"],
        base_model=described["base_model_name_or_path"],
    )
    weights = folder / WEIGHTS_FILE
    return _grouped(load_file(weights), str(weights)), settings


def factors_of(model: nn.Module) -> dict[str, Factors]:
    """The factors in a PEFT model, as copies on the CPU that later training does not change.

    Raises:
        ValueError: the model has no adapter, or one that is no LoRA of linear layers.
    """
    held = {name: part.detach().to("cpu", copy=True) for name, part in _adapter_parameters(model).items()}
    if not held:
        raise ValueError("the model has no LoRA adapter; insert one first")
    return _grouped(held, "the model")


def load_factors(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Changes the adapter parameters of a PEFT model to the given factors, all or none of them.

    Raises:
        ValueError: model and factors do not have the same tensors and shapes; names every difference.
    """
    given = _tensors(factors)
    held = {_file_name(name): parameter for name, parameter in _adapter_parameters(model).items()}
    problems = [f"  {name}: only in the factors" for name in sorted(given.keys() - held.keys())]
    problems += [f"  {name}: only in the model" for name in sorted(held.keys() - given.keys())]
    problems += [
        f"  {name}: {tuple(given[name].shape)} given, {tuple(held[name].shape)} in the model"
        for name in sorted(given.keys() & held.keys())
        if given[name].shape != held[name].shape
    ]
    if problems:
        raise ValueError("\n".join(["factors and model do not fit:", *problems]))
    with torch.no_grad():
        for name, parameter in held.items():
            parameter.copy_(given[name])


def attach(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapter of a folder, loaded by stock PEFT, in evaluation mode; ``model`` itself is changed.

    The factors are float32, whatever the model computes in.

    Raises:
        ValueError: what peft loaded is not what the file holds.
    """
    with quiet_peft():
        attached: nn.Module = PeftModel.from_pretrained(model, folder).eval()
    loaded, (written, _) = factors_of(attached), read(folder)
    # peft only warns of tensors that it finds no place for.
    astray = sorted(set(loaded) ^ set(written))
    if astray:
        raise ValueError(f"{folder}: peft did not load these layers: {', '.join(astray)}. Is this the adapter's base?")
    return attached


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silences a notice of transformers that peft 0.21.2 causes at every insertion and nobody here can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of the factors by their names in a file."""
    tensors: dict[str, Tensor] = {}
    for module, parts in factors.items():
        start = f"base_model.model.{module}.lora"
        tensors[f"{start}_A.weight"] = parts.lora_a
        tensors[f"{start}_B.weight"] = parts.lora_b
        if parts.magnitude is not None:
            tensors[f"{start}_magnitude_vector"] = parts.magnitude
    return tensors


def _adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def _file_name(parameter_name: str) -> str:
    """A parameter's name in a file, where the adapter has no name and the magnitude is no module."""
    start = parameter_name.removesuffix(".default.weight")
    return start if start == parameter_name or start.endswith("_magnitude_vector") else f"{start}.weight"


def _grouped(tensors: Mapping[str, Tensor], where: str) -> dict[str, Factors]:
    """Factors by module from tensors by their names, in the order of the modules' names."""
    parts: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        place = _TENSOR.fullmatch(_file_name(name))
        if place is None:
            problems.append(f"  {name}: no part of a linear layer's LoRA")
        else:
            parts.setdefault(place["module"], {})[place["factor"] or place["magnitude"]] = tensor
    problems += [f"  {module}: lacks A or B" for module, found in parts.items() if not found.keys() >= {"A", "B"}]
    if problems:
        raise ValueError("\n".join([f"{where}: these adapter tensors cannot be read:", *sorted(problems)]))
    return {
        module: Factors(lora_a=found["A"], lora_b=found["B"], magnitude=found.get("magnitude_vector"))
        for module, found in sorted(parts.items())
    }


def _require_consistent(factors: Mapping[str, Factors], settings: AdapterSettings) -> None:
    if not factors:
        raise ValueError("no factors to write; an adapter has at least one layer")
    problems = []
    for module, parts in factors.items():
        ranks = (parts.lora_a.shape[0], parts.lora_b.shape[1])
        if ranks != (settings.rank, settings.rank):
            problems.append(f"  {module}: A and B of ranks {ranks}, the settings say {settings.rank}")
        if (parts.magnitude is not None) != settings.use_dora:
            state = "no magnitude" if parts.magnitude is None else "a magnitude"
            problems.append(f"  {module}: {state}, the settings say use_dora: {settings.use_dora}")
    if problems:
        raise ValueError("\n".join(["factors and settings contradict each other:", *problems]))
