"""Bases of one model at several bits, and the same LoRA training on each: what two measuring scripts share.

``bench_recovery.py`` and ``study_size_vs_bits.py`` are the commands.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from qlora_trainer.numerics.bootstrap import Resampling, difference_interval, ratio_interval
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, round_to_nearest
from qlora_trainer.pipeline.comparing import Comparing
from qlora_trainer.pipeline.ground import prepare
from qlora_trainer.pipeline.journey import Journey
from qlora_trainer.pipeline.quantizing import quantized_base
from qlora_trainer.recipe import DataType, Recipe
from qlora_trainer.recipe_file import load
from qlora_trainer.records import QuantizedModel, TrainedAdapter
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.integer_linear import with_integer_layers
from qlora_trainer.runtime.device import set_threads
from qlora_trainer.runtime.environment import describe_environment
from qlora_trainer.runtime.progress import Silent
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.runtime.weight_files import read_tensors
from qlora_trainer.stages import adapt, quantize, train
from qlora_trainer.stages.evaluate import row_losses
from qlora_trainer.stages.train import TrainingInputs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts/results"
Method = Literal["rtn", "gptq"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Losses:
    """Of each test row: nats summed over its label tokens, and how many those are."""

    nats: tuple[float, ...]
    labels: tuple[int, ...]

    @property
    def value(self) -> float:
        """Nats per label token."""
        return sum(self.nats) / sum(self.labels)


@dataclass(frozen=True)
class Tuned:
    """A base after LoRA training."""

    losses: Losses
    trained: TrainedAdapter


class Bases:
    """The bases that follow from one recipe, measured on its test rows.

    Args:
        journey: gives the model, the rows and the run folder.
    """

    def __init__(self, journey: Journey) -> None:
        self.journey, self.recipe, self.ground = journey, journey.recipe, journey.ground
        self.comparing = Comparing(journey)
        self.comparing.workplace.mkdir(parents=True, exist_ok=True)

    def sixteen_bit(self) -> nn.Module:
        """The base as it is, computing in the recipe's type."""
        return runner.load(self.ground.base.folder, dtype=self._dtype)

    def stored(self, data_type: DataType) -> tuple[nn.Module, QuantizedModel]:
        """The base as a recipe with this data type has it, ready to get adapters."""
        settings = self.recipe.quantization.model_copy(update={"data_type": data_type, "double_quant": None})
        made = quantized_base(
            self.recipe.model_copy(update={"quantization": settings}),
            self.ground.base,
            layers=self.ground.layers,
            content_key=self.ground.content_key,
            rows=lambda: self.ground.rows,
            trust_remote_code=False,
        )
        return quantize.open_base(made, settings, layers=self.ground.layers), made

    def integers(self, method: Method, spec: GridSpec) -> nn.Module:
        """The base with layers that hold integers and dequantize them at each use."""
        return with_integer_layers(self.sixteen_bit(), self._matrices(method, spec))

    def losses(self, model: nn.Module) -> Losses:
        """Of every test row."""
        rows, plan = self.ground.rows, self.recipe.evaluation
        found = row_losses(model, rows.test, batch_size=plan.batch_size, pad_id=rows.pad_id)
        return Losses(found.nats, found.labels)

    def tuned(self, model: nn.Module, name: str, *, seed: int) -> Tuned:
        """The base after the recipe's LoRA training with a seed of its own; the model is changed."""
        recipe = self.recipe.model_copy(update={"run": self.recipe.run.model_copy(update={"seed": seed})})
        dtype = recipe.quantization.compute_dtype
        adapted = adapt.insert(model, recipe.lora, layers=self.ground.layers, compute_dtype=dtype, seed=seed)
        folder = self.journey.folder.root / "tuned" / f"{name}-{seed}"
        # What a broken run left would be gone on with, on another model object.
        shutil.rmtree(folder, ignore_errors=True)
        trained = train.train(adapted, recipe, self._training_inputs(folder))
        found = Tuned(self.losses(adapted), trained)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.recipe.quantization.compute_dtype == "float32" else torch.bfloat16

    def _matrices(self, method: Method, spec: GridSpec) -> dict[str, IntegerWeight]:
        layers = self.ground.layers
        if method == "gptq":
            workplace = self.comparing.workplace / "gptq_int4"
            return dict(self.comparing.rounding.rounded("gptq_int4", spec, layers, workplace).matrices())
        named = ((name.removesuffix(".weight"), tensor) for name, tensor in read_tensors(self.ground.base.folder))
        return {module: round_to_nearest(tensor, spec) for module, tensor in named if module in layers.quantized}

    def _training_inputs(self, folder: Path) -> TrainingInputs:
        rows = self.ground.rows
        return TrainingInputs(
            rows=rows.train,
            pad_id=rows.pad_id,
            checkpoints=folder / "checkpoints",
            adapter=folder / "adapter",
            base_name=str(self.ground.base.folder),
            recipe_key=folder.name,
            predicted_peak_bytes=0,
            validate=self.journey.measuring.validation_nats,
            tracker=self.journey.telling.tracker,
            observer=Silent(),
        )


def changed(recipe_file: str, changes: Sequence[str]) -> Recipe:
    """A recipe with changes as ``--set`` has them, for measuring its base."""
    return load(ROOT / recipe_file, [*changes, "compare.model=base", "tracking.wandb=off"])


@contextmanager
def bases_of(recipe: Recipe) -> Iterator[Bases]:
    """The bases of a recipe, while its run folder is held."""
    set_threads(recipe.run.threads)
    ground = prepare(recipe, trust_remote_code=False)
    root = Path(recipe.run.folder) / recipe.run.name
    with RunFolder.open(root, recipe.model_dump(mode="json"), shaping=recipe.shaping) as folder:
        journey = Journey(recipe, ground, folder, Silent(), trust_remote_code=False)
        try:
            yield Bases(journey)
        finally:
            journey.telling.end()


RESAMPLING = Resampling(resamples=1000, confidence=0.95, seed=0)


def score(losses: Sequence[Losses]) -> Json:
    """Nats per token over seeds, each row's nats averaged first, with a 95 % interval over rows."""
    mean = averaged(losses)
    interval = ratio_interval(mean.nats, mean.labels, resampling=RESAMPLING)
    return {"value": mean.value, "interval": list(interval), "by_seed": [each.value for each in losses]}


def gap(losses: Sequence[Losses], reference: Sequence[Losses]) -> Json:
    """Nats per token above a reference on the same rows; paired by row, and by seed where both have as many."""
    own, other = averaged(losses), averaged(reference)
    interval = difference_interval(own.nats, other.nats, own.labels, resampling=RESAMPLING)
    by_seed = [a.value - b.value for a, b in zip(losses, reference, strict=True)]
    return {"value": own.value - other.value, "interval": list(interval), "by_seed": by_seed}


def averaged(losses: Sequence[Losses]) -> Losses:
    """Each row's nats, the mean over seeds."""
    nats = tuple(sum(each) / len(losses) for each in zip(*(one.nats for one in losses), strict=True))
    return replace(losses[0], nats=nats)


def write_result(name: str, command: str, found: Json) -> None:
    """A result file beside the others, with what it was measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    result = {
        "command": command,
        "commit": commit.stdout.strip() or "unknown",
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": describe_environment(),
        **found,
    }
    path = RESULTS / name
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path, flush=True)
