"""How near is the predicted peak memory of training to the measured one?

    python scripts/bench_memory.py            # all cases; some minutes on two cores
    python scripts/bench_memory.py --only CASE [CASE ...]

Every case trains random weights on random rows by the functions of the stages (quantize, adapt, train with a
validation), in a process of its own, and its peak resident memory is set beside the prediction that ``check`` shows. A
process before it writes and quantizes the base, so that its memory does not count. Prints a table and writes
``scripts/results/bench_memory.json``; the figures of cases that are not run again stay.

On a machine with a CUDA device the same cases run there, and the measure is what torch's allocator handed out.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as library_logging

from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.numerics.footprint import Footprint, training_memory
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, round_to_nearest
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.preflight.prediction import model_shape, training_load
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import Cut, LinearLayers
from qlora_trainer.runtime.device import choose_device
from qlora_trainer.runtime.environment import describe_environment
from qlora_trainer.runtime.memory import release_freed, resident_bytes
from qlora_trainer.runtime.progress import Silent
from qlora_trainer.runtime.tracking import Tracker
from qlora_trainer.runtime.weight_files import copy_companions
from qlora_trainer.stages import base_model, evaluate, train
from qlora_trainer.stages.adapt import choose_layers, insert
from qlora_trainer.stages.quantize import Calibrated, open_base, quantize
from qlora_trainer.stages.train import TrainingInputs

ROOT: Final = Path(__file__).parents[1]
RESULT: Final = ROOT / "scripts/results/bench_memory.json"
STEPS: Final = 2
TOLERANCE: Final = 0.10

Json = dict[str, Any]

MODEL: Final[Json] = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
WIDE: Final[Json] = {
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 2816,
}
TRAINING: Final[Json] = {
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "checkpointing": "none",
    "optimizer": "paged_adamw_8bit",
}
CASES: Final[dict[str, Json]] = {
    "none": {},
    "selective": {"training": {"checkpointing": "selective"}},
    "full": {"training": {"checkpointing": "full"}},
    "wide, full": {"model": WIDE, "training": {"checkpointing": "full"}},
    "wide, rank 64, adamw": {"model": WIDE, "lora": {"rank": 64}, "training": {"optimizer": "adamw"}},
    "16 layers, window 256": {"model": {"num_hidden_layers": 16}, "window": 256},
    "vocabulary 128,256, untied": {"model": {"vocab_size": 128_256, "tie_word_embeddings": False}},
    "rank 128, adamw, full": {"lora": {"rank": 128}, "training": {"optimizer": "adamw", "checkpointing": "full"}},
    "1 row of 2,048": {"window": 2048, "training": {"micro_batch_size": 1}},
    "12 rows of 256, accumulated": {
        "window": 256,
        "training": {"micro_batch_size": 12, "gradient_accumulation_steps": 2},
    },
    "int8": {"quantization": {"data_type": "int8"}},
    "int8, full": {"quantization": {"data_type": "int8"}, "training": {"checkpointing": "full"}},
    "16-bit base": {"quantization": {"data_type": "none"}},
    "16-bit base, full": {"quantization": {"data_type": "none"}, "training": {"checkpointing": "full"}},
    "GPTQ int4 base": {"quantization": {"data_type": "gptq_int4"}},
    "GPTQ int4 base, wide, full": {
        "model": WIDE,
        "quantization": {"data_type": "gptq_int4"},
        "training": {"checkpointing": "full"},
    },
    "float32": {"quantization": {"compute_dtype": "float32"}},
    "float32, selective": {"quantization": {"compute_dtype": "float32"}, "training": {"checkpointing": "selective"}},
    "fp4, constants not quantized": {"quantization": {"data_type": "fp4", "double_quant": False}},
    "q and v alone": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "dropout": {"lora": {"dropout": 0.05}},
    "padded": {"training": {"batching": "padded"}},
    "Mistral": {"model": WIDE | {"model_type": "mistral", "tie_word_embeddings": False}},
    "Qwen2, full": {"model": WIDE | {"model_type": "qwen2"}, "training": {"checkpointing": "full"}},
    "Qwen3": {"model": WIDE | {"model_type": "qwen3", "head_dim": 128}},
    "Qwen3, selective": {
        "model": WIDE | {"model_type": "qwen3", "head_dim": 128},
        "training": {"checkpointing": "selective"},
    },
    "Gemma 3": {"model": WIDE | {"model_type": "gemma3_text", "head_dim": 128}},
    "Phi-3": {"model": WIDE | {"model_type": "phi3", "pad_token_id": 0}},
}
FITTED: Final = (
    *("none", "selective", "full", "wide, full", "vocabulary 128,256, untied", "rank 128, adamw, full"),
    *("1 row of 2,048", "int8", "float32", "q and v alone", "Phi-3"),
)
"""Cases whose peaks constants of the prediction were fitted to, or whose errors led to a term: of
``numerics.device_overhead`` the libraries and the heap, of ``numerics.activations`` the work space of attention and
what fused queries, keys and values keep (Phi-3, which no constant was fitted to). All others are held out: nothing was
changed for them."""


def recipe_of(case: Json, folder: Path) -> Recipe:
    """The case as a recipe."""
    return Recipe.model_validate(
        {
            "run": {"name": "memory", "folder": str(folder / "runs")},
            "base_model": {"path": str(folder / "model")},
            "quantization": {"cache_folder": str(folder / "quantized"), **case.get("quantization", {})},
            "lora": {"rank": 16, **case.get("lora", {})},
            "data": {"train": "random", "validation_rows": 1, "test_rows": 1, "window": case.get("window", 512)},
            "training": {**TRAINING, "max_steps": STEPS, "log_every_steps": 1, **case.get("training", {})},
        }
    )


def random_rows(recipe: Recipe, vocabulary: int) -> tuple[EncodedRow, ...]:
    """Enough rows for all steps: as many of each step as one pass takes fill the window, the second half trained."""
    random, window = Random(0), recipe.data.window
    count = (STEPS + 1) * recipe.training.batch_size
    rows = []
    for _ in range(count):
        tokens = tuple(random.randrange(10, vocabulary) for _ in range(window))
        labels = (-100,) * (window // 2) + tokens[window // 2 :]
        rows.append(EncodedRow(tokens, labels, tokens[: window // 2], "", ""))
    return tuple(rows)


def prepare(case: Json, folder: Path) -> None:
    """Writes the base and quantizes it; in a process of its own, which ends."""
    library_logging.disable_progress_bar()
    torch.manual_seed(0)
    settings = {**MODEL, **case.get("model", {})}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "model")
    copy_companions(ROOT / "recipes/quickstart/base", folder / "model")
    _quantized(recipe_of(case, folder))


def _quantized(recipe: Recipe) -> Any:
    base = base_model.resolve(recipe.base_model)
    layers = choose_layers(base, recipe.lora)
    # Integers to nearest: training holds as many bytes however they were chosen.
    calibrated = Calibrated("nearest", partial(_nearest, layers))
    settings = recipe.quantization
    made = quantize(base, settings, lora=recipe.lora, layers=layers, content_key="random", calibrated=calibrated)
    return made, layers, base


def _nearest(
    layers: LinearLayers, weights: Iterable[tuple[str, Tensor]], spec: GridSpec, _workplace: Path
) -> Iterator[tuple[str, Tensor | IntegerWeight]]:
    matrices = {f"{module}.weight" for module in layers.quantized}
    for name, weight in weights:
        yield name, round_to_nearest(weight, spec) if name in matrices else weight


def measure(case: Json, folder: Path) -> Json:
    """Trains, and sets the peak beside the prediction."""
    recipe = recipe_of(case, folder)
    quantized, layers, base = _quantized(recipe)
    shape = model_shape(base)
    rows = random_rows(recipe, shape.vocabulary)
    device = choose_device().type
    predicted = predicted_for(case, recipe, shape, rows, device)
    before = resident_bytes()
    settings = recipe.quantization
    opened = open_base(quantized, settings, layers=layers)
    model = insert(opened, recipe.lora, layers=layers, compute_dtype=settings.compute_dtype, seed=0)
    release_freed()
    loaded = resident_bytes()
    trained = train.train(model, recipe, _inputs(recipe, rows, folder))
    total = predicted.allocated if device == "cuda" else predicted.total
    return {
        "settings": case,
        "device": device,
        "parameters": shape.parameters,
        "predicted_bytes": total,
        "measured_bytes": trained.peak_bytes,
        "error": total / trained.peak_bytes - 1,
        "resident_before_loading": before,
        "resident_before_training": loaded,
        "seconds": trained.seconds,
        "items": predicted.items,
    }


def _inputs(recipe: Recipe, rows: tuple[EncodedRow, ...], folder: Path) -> TrainingInputs:
    return TrainingInputs(
        rows=rows,
        pad_id=0,
        checkpoints=folder / "checkpoints",
        adapter=folder / "adapter",
        base_name="random",
        recipe_key="memory",
        predicted_peak_bytes=0,
        validate=lambda model: evaluate.held_out_nats(model, [_short_answer(rows[0])], batch_size=1, pad_id=0),
        tracker=Tracker(folder),
        observer=Silent(),
    )


def _short_answer(row: EncodedRow) -> EncodedRow:
    """The row with 16 labels: validation holds the logits of all of a batch, and training is what is measured."""
    return replace(row, labels=(-100,) * (len(row.labels) - 16) + row.labels[-16:])


def run_case(name: str, threads: int) -> Json:
    """Both processes of a case."""
    with tempfile.TemporaryDirectory() as folder:
        for task in ("prepare", "measure"):
            command = [sys.executable, __file__, "--task", task, name, folder]
            settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
        found: Json = json.loads((Path(folder) / "result.json").read_text())
        return found


def refit(place: Path) -> None:
    """Sets the measured peaks beside what would be predicted now; changes the file."""
    result = json.loads(place.read_text())
    for name, found in result["cases"].items():
        case = found["settings"]
        recipe = recipe_of(case, Path())
        shape = ModelShape.from_config({**MODEL, **case.get("model", {})}, parameters=found["parameters"])
        need = predicted_for(case, recipe, shape, random_rows(recipe, shape.vocabulary), found["device"])
        total = need.allocated if found["device"] == "cuda" else need.total
        found |= {"predicted_bytes": total, "error": total / found["measured_bytes"] - 1, "items": need.items}
        print(line(name, found))
    result |= errors(result["cases"])
    place.write_text(json.dumps(result, indent=1) + "\n")


def predicted_for(
    case: Json, recipe: Recipe, shape: ModelShape, rows: tuple[EncodedRow, ...], device: str
) -> Footprint:
    """The prediction of a case."""
    cut = Cut(recipe.training.rows_at_a_time, case.get("training", {}).get("checkpointing", "none"))
    return training_memory(shape, training_load(recipe, rows, "cuda" if device == "cuda" else "cpu", cut))


def circumstances(threads: int) -> Json:
    """What the figures were measured with and on."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": shlex.join(["python", "scripts/bench_memory.py", *sys.argv[1:]]),
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "environment": describe_environment(),
        "threads": threads,
        "measure": "CUDA allocator" if torch.cuda.is_available() else "resident set of the process",
        "common": {"model": MODEL, "training": TRAINING, "steps": STEPS},
    }


def errors(cases: Json) -> dict[str, float]:
    """The largest error of all cases, and of those that nothing was fitted to; says of each which it is."""
    for name, found in cases.items():
        found["is_held_out"] = name not in FITTED
    held_out = [abs(found["error"]) for found in cases.values() if found["is_held_out"]]
    return {
        "largest_error": max(abs(found["error"]) for found in cases.values()),
        "largest_error_held_out": max(held_out, default=0.0),
    }


def line(name: str, found: Json) -> str:
    """One case as text."""
    predicted, measured = (found[key] / 2**20 for key in ("predicted_bytes", "measured_bytes"))
    return f"{name:30}{predicted:>12,.0f}{measured:>12,.0f}{found['error']:>+9.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs=3, metavar=("TASK", "CASE", "FOLDER"), help="what the processes of a case run")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help="these cases alone")
    parser.add_argument("--refit", action="store_true", help="predict the cases of the result again, measure nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.task:
        task, name, folder = args.task
        if task == "prepare":
            prepare(CASES[name], Path(folder))
        else:
            (Path(folder) / "result.json").write_text(json.dumps(measure(CASES[name], Path(folder))))
        return
    if args.refit:
        refit(args.out)
        return
    kept = json.loads(args.out.read_text())["cases"] if args.only and args.out.is_file() else {}
    print(f"{'case':30}{'predicted':>12}{'measured':>12}{'error':>9}   (MiB)")
    for name in args.only or CASES:
        measured = circumstances(args.threads)
        kept[name] = run_case(name, args.threads) | {key: measured[key] for key in ("commit", "date")}
        print(line(name, kept[name]), flush=True)
        cases = {each: kept[each] for each in CASES if each in kept}
        result = circumstances(args.threads) | errors(cases) | {"cases": cases}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{', '.join(f'{key} {value:.1%}' for key, value in errors(cases).items())}; promised: {TOLERANCE:.0%}")


if __name__ == "__main__":
    main()
