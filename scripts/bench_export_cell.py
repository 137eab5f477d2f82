"""One cell of ``bench_export.py``: one base, one size of delta, one seed."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from qlora_trainer.formats.peft_adapter import read
from qlora_trainer.numerics.bootstrap import Resampling
from qlora_trainer.pipeline.adapted import AdaptedModel
from qlora_trainer.pipeline.ground import prepare
from qlora_trainer.pipeline.journey import Journey
from qlora_trainer.recipe import Recipe
from qlora_trainer.recipe_file import load
from qlora_trainer.records import QuantizedModel, TrainedAdapter
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runtime.device import seed_everything, set_threads
from qlora_trainer.runtime.progress import Silent
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.stages import adapt, evaluate, export, quantize, train
from qlora_trainer.stages.evaluate import Teacher
from qlora_trainer.stages.export import ExportInputs, HeldOut, Shelf, Way

METHODS = {
    0: "nearest",
    1: "GPTQ",
    2: "GPTQ + scales",
    3: "learned rounding + scales",
    4: "quantization-aware + scales",
}


class Cell:
    """A trained model and everything that is measured against it."""

    def __init__(self, case: dict[str, Any], shared: dict[str, Any], *, size: str, name: str, seed: int) -> None:
        self.recipe = recipe_of(case, shared, rate=case["rates"][size], name=name, seed=seed)
        set_threads(1)
        seed_everything(seed)
        self.ground = prepare(self.recipe, trust_remote_code=False)
        root = Path(self.recipe.run.folder) / name
        self._open = RunFolder.open(root, self.recipe.model_dump(mode="json"), shaping=self.recipe.shaping)
        self.journey = Journey(self.recipe, self.ground, self._open.__enter__(), Silent(), trust_remote_code=False)
        self.quantized = self.journey.quantize()
        adapted = AdaptedModel(self.recipe, self.ground, self.quantized, trust_remote_code=False)
        self.start = self._test(adapted.fresh())
        self.trained = self.journey.train(self.quantized, adapted)
        model = adapted.trained(self.trained.folder)
        self.end = self._test(model)
        self.teacher = self._teacher(model)
        adapted.forget()
        source = self.journey.merge_source(self.quantized, self.trained)
        merged = self.journey.merge(source, self.quantized)
        self.inputs = self.journey.export_inputs(source, merged, self.quantized, self.trained)
        self.place = root / "files"
        self._seconds_of_rung_1: dict[tuple[Path, str], float] = {}

    def figures(self) -> dict[str, float]:
        """What all files of the cell are compared with."""
        changed = whole = 0.0

        def note(_module: str, merged: Tensor, base: Tensor) -> None:
            nonlocal changed, whole
            changed += float((merged - base).double().square().sum())
            whole += float(base.double().square().sum())

        for _ in self.inputs.weights("dequantized", on_merged=note):
            pass
        return {
            "delta_share": (changed / whole) ** 0.5,
            "quantized_nats": self.start.nats_per_token,
            "trained_nats": self.end.nats_per_token,
        }

    def rows(self, grids: dict[str, Any], rungs: dict[str, tuple[int, ...]]) -> Iterator[dict[str, Any]]:
        """Every file of the cell."""
        yield self._library_merge()
        dense = self._dense_lora()
        for grid, name in grids.items():
            inputs = replace(self.inputs, layers=export.layers_of(name, self.inputs.layers))
            shelf = Shelf(self.place / grid.replace(" ", "-"), inputs)
            for rung in rungs[grid]:
                for into in ("dequantized", "original"):
                    yield self._file(grid, name, inputs, shelf, Way(rung, into), METHODS[rung])
            fitting = replace(dense, layers=inputs.layers)
            for rung in rungs[grid][1:3]:
                other = Shelf(self.place / f"{grid}-dense".replace(" ", "-"), fitting)
                method = f"16-bit LoRA, then {METHODS[rung]}"
                yield self._file(grid, name, fitting, other, Way(rung, "original"), method)
        shutil.rmtree(self.place)

    def _file(self, grid: str, name: Any, inputs: ExportInputs, shelf: Shelf, way: Way, method: str) -> dict[str, Any]:
        began = time.monotonic()
        rounded = shelf.rounded(way, export.integer_format_of(name).spec)
        written = export.write(name, self.place / "file", inputs, into=way.into, rounded=rounded)
        seconds = time.monotonic() - began
        # Rung 2 starts from rung 1, which lies on the shelf by now.
        place = (shelf.folder, way.into)
        if way.rung == 1:
            self._seconds_of_rung_1[place] = seconds
        elif way.rung == 2:
            seconds += self._seconds_of_rung_1[place]
        row = self._row(grid, method, way.into, export.open_in_runtime(written, inputs).model, seconds)
        shutil.rmtree(written.folder)
        return row

    def _library_merge(self) -> dict[str, Any]:
        """PEFT's merge into the 4-bit model: dequantize, add, quantize again onto the same grid."""
        base = runner.load(self.quantized.folder, dtype=torch.float32)
        began = time.monotonic()
        merged: nn.Module = PeftModel.from_pretrained(base, str(self.trained.folder)).merge_and_unload()
        return self._row("nf4", "PEFT merge into the NF4 model", "dequantized", merged, time.monotonic() - began)

    def _dense_lora(self) -> ExportInputs:
        """The same training on the 16-bit base, as inputs whose trained function is that model."""
        journey, recipe = self.journey, self.recipe
        dense: QuantizedModel = replace(self.quantized, folder=self.ground.base.folder, initial_factors=None)
        base = quantize.open_base(dense, recipe.quantization, layers=self.ground.layers)
        model = adapt.insert(
            base, recipe.lora, layers=self.ground.layers, compute_dtype="float32", seed=recipe.run.seed
        )
        training = replace(
            journey.training_inputs(f"dense {journey.training_key(self.quantized)}", self.quantized),
            checkpoints=journey.folder.root / "dense-checkpoints",
            adapter=journey.folder.root / "dense-adapter",
        )
        trained: TrainedAdapter = train.train(model, recipe, training)
        factors, _ = read(trained.folder)
        source = replace(journey.merge_source(self.quantized, trained), factors=factors, into="original")
        return replace(
            self.inputs,
            # Trained function and merged model are one here: the original base with this adapter.
            weights=lambda into, wanted=None, on_merged=None: source.weights(on_merged, wanted),
        )

    def _row(self, grid: str, method: str, into: str, model: nn.Module, seconds: float) -> dict[str, Any]:
        found = self._test(model)
        plan, rows = self.recipe.evaluation, self.ground.rows
        nearness = evaluate.fidelity(model, self.teacher, rows.test, batch_size=plan.batch_size, pad_id=rows.pad_id)
        standing = export.standing(
            found,
            nearness,
            quantized=self.start,
            trained=self.end,
            bar=None,
            ladder=self.recipe.ladder,
            resampling=Resampling(seed=self.recipe.run.seed),
        )
        return {
            "grid": grid,
            "method": method,
            "merged_into": into,
            "nats_per_token": found.nats_per_token,
            "above_trained": found.nats_per_token - self.end.nats_per_token,
            "gain_kept": standing.gain_kept,
            "interval": standing.interval if standing.gain_kept is not None else None,
            "kl_to_trained": nearness.kl_to_trained,
            "top1_agreement": nearness.top1_agreement,
            "seconds": seconds,
        }

    def _test(self, model: nn.Module) -> HeldOut:
        plan, rows = self.recipe.evaluation, self.ground.rows
        losses = evaluate.row_losses(model, rows.test, batch_size=plan.batch_size, pad_id=rows.pad_id)
        return HeldOut(losses.nats, losses.labels)

    def _teacher(self, model: nn.Module) -> Teacher:
        plan, rows = self.recipe.evaluation, self.ground.rows
        return evaluate.teach(model, rows.test, tokens=plan.kl_tokens, batch_size=plan.batch_size, pad_id=rows.pad_id)


def recipe_of(case: dict[str, Any], shared: dict[str, Any], *, rate: float, name: str, seed: int) -> Recipe:
    """The case's recipe with what all cases share, one rate and one seed."""
    values = load(Path(case["recipe"])).model_dump(mode="json")
    values["expected"] = None
    for changes in (
        shared,
        case["changes"],
        {"training": {"learning_rate": rate}, "run": {"name": name, "seed": seed}},
    ):
        for section, settings in changes.items():
            values[section] = {**values[section], **settings}
    return Recipe.model_validate(values)
