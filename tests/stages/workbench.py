"""The stages by hand on a tiny model: what the pipeline does, without folders and records of a run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from qlora_trainer.data.audit import audit_masks
from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.formats.peft_adapter import AdapterSettings, factors_of, write
from qlora_trainer.pipeline.quantizing import quantized_base
from qlora_trainer.recipe import Lora, Quantization, Recipe
from qlora_trainer.records import BaseCheckpoint, LinearLayers, QuantizedModel
from qlora_trainer.stages import adapt, merge, quantize
from qlora_trainer.stages.dataset import TaskRows
from qlora_trainer.stages.export import AdapterFactors, ExportInputs, TaskData
from qlora_trainer.stages.merge import MergeSource
from tests.models import BOS_ID, EOS_ID, PAD_ID, VOCABULARY_SIZE


def recipe_for(base: Path, folder: Path, **sections: dict[str, object]) -> Recipe:
    """A recipe for a tiny base; ``sections`` update its sections."""
    values: dict[str, dict[str, object]] = {
        "run": {"name": "tiny", "folder": str(folder / "runs"), "threads": 1},
        "base_model": {"path": str(base)},
        "quantization": {"cache_folder": str(folder / "quantized"), "compute_dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0},
        "data": {"train": "none.jsonl", "validation_rows": 2, "test_rows": 2},
        "calibration": {"rows": 16, "batch_size": 8},
        "training": {
            "learning_rate": 0.01,
            "max_steps": 4,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "optimizer": "adamw",
            "checkpointing": "none",
            "log_every_steps": 1,
            "checkpoint_every_steps": 2,
        },
    }
    for name, updates in sections.items():
        values[name] = {**values.get(name, {}), **updates}
    return Recipe.model_validate(values)


def random_rows(count: int, *, seed: int = 0) -> tuple[EncodedRow, ...]:
    """Rows of 6 to 20 random tokens, the second half of each trained and ended by eos."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> EncodedRow:
        length = int(torch.randint(6, 20, (1,), generator=generator))
        middle = torch.randint(10, VOCABULARY_SIZE, (length,), generator=generator).tolist()
        token_ids = (BOS_ID, *middle, EOS_ID)
        start = len(token_ids) // 2
        labels = (IGNORE_INDEX,) * start + token_ids[start:]
        return EncodedRow(token_ids, labels, token_ids[:start], "prompt", "completion")

    return tuple(one() for _ in range(count))


@dataclass(frozen=True)
class Bench:
    """A quantized tiny base and what it was made from."""

    recipe: Recipe
    base: BaseCheckpoint
    layers: LinearLayers
    quantized: QuantizedModel

    def adapted(self, seed: int = 0) -> PeftModel:
        """A fresh adapted model."""
        settings = self.recipe.quantization
        return adapt.insert(
            quantize.open_base(self.quantized, settings, layers=self.layers),
            self.recipe.lora,
            layers=self.layers,
            compute_dtype=settings.compute_dtype,
            seed=seed,
            initial=self.quantized.initial_factors,
        )

    def merge_source(self, adapter: Path) -> MergeSource:
        """The merged weights of an adapter in a folder."""
        return merge.merge_source(
            self.recipe,
            base=self.base,
            quantized=self.quantized,
            weight_format=quantize.weight_format_of(self.recipe.quantization),
            layers=self.layers,
            adapter=adapter,
        )

    def written_adapter(self, model: PeftModel, folder: Path) -> Path:
        """The model's adapter in PEFT format."""
        folder.mkdir(parents=True)
        lora = self.recipe.lora
        settings = AdapterSettings(
            lora.rank, lora.alpha, lora.dropout, lora.use_rslora, lora.use_dora, str(self.base.folder)
        )
        write(folder, factors_of(model), settings)
        return folder


def export_inputs(bench: Bench, adapter: Path, folder: Path, *, rows: int = 24) -> ExportInputs:
    """What exporting works on, as the pipeline puts it together; writes the merged 16-bit folder."""
    recipe = bench.recipe
    source = bench.merge_source(adapter)
    merged = merge.merge(source, folder / "merged", data_type="bfloat16")
    return ExportInputs(
        base=bench.base.folder,
        adapter_base=bench.quantized.folder,
        adapter=adapter,
        merged=merged.folder,
        merged_into="dequantized",
        weights=lambda into, wanted=None, on_merged=None: source.with_base(into).weights(on_merged, wanted),
        base_weights=lambda into: source.with_base(into).base_weights(),
        factors=factors_in(source, has_magnitudes=recipe.lora.use_dora),
        layers=bench.layers,
        data=TaskData(
            rows=random_rows(rows),
            pad_id=PAD_ID,
            stop_ids=(EOS_ID,),
            tokenizer=TextTokenizer.load(bench.base.folder),
            seed=0,
            learning_rate=0.01,
            steps=8,
            batch_size=4,
        ),
        calibration=recipe.calibration,
        rounding=recipe.rounding,
        compute_dtype="float32",
        data_type="bfloat16",
        window=64,
        threads=1,
    )


def factors_in(source: MergeSource, *, has_magnitudes: bool = False) -> AdapterFactors:
    """A merge source's factors as exporting wants them."""
    return AdapterFactors(
        lora_a={module: each.lora_a for module, each in source.factors.items()},
        lora_b={module: each.lora_b for module, each in source.factors.items()},
        scale=source.scale,
        has_magnitudes=has_magnitudes,
    )


def bench_for(recipe: Recipe) -> Bench:
    """Quantizes the recipe's base."""
    folder = Path(str(recipe.base_model.path))
    base = BaseCheckpoint(folder=folder, parameters=0, bytes=(folder / "model.safetensors").stat().st_size)
    layers = adapt.choose_layers(base, recipe.lora)
    quantized = quantized_base(
        recipe,
        base,
        layers=layers,
        content_key="content",
        rows=lambda: task_rows(folder),
        trust_remote_code=False,
    )
    return Bench(recipe, base, layers, quantized)


def quantize_again(base: BaseCheckpoint, settings: Quantization, lora: Lora, layers: LinearLayers) -> QuantizedModel:
    """One call of the stage."""
    return quantize.quantize(base, settings, lora=lora, layers=layers, content_key="content")


def task_rows(base: Path, *, seed: int = 0) -> TaskRows:
    """Random training rows and no others."""
    rows = random_rows(24, seed=seed)
    audit = audit_masks(rows, [(row,) for row in rows], bos_id=BOS_ID, stop_ids=(EOS_ID,))
    return TaskRows(rows, (), (), audit, (EOS_ID,), PAD_ID, (), TextTokenizer.load(base))


def shake(model: PeftModel, *, size: float = 0.05) -> PeftModel:
    """Changes every adapter parameter by a little noise, as training would; gives the model back."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Logits on a fixed batch of random tokens, float32."""
    ids = torch.randint(0, VOCABULARY_SIZE, (2, 12), generator=torch.Generator().manual_seed(3))
    output: torch.Tensor = model(input_ids=ids).logits
    return output.float()
