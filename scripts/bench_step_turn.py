"""How long does our optimizer step take on one rung of the ladder of optimizations, and how much memory?

Our side of ``bench_step.py``, which prepares the folder and starts this in a process of its own.

    python scripts/bench_step_turn.py FOLDER RESULT.json --rung packed

A rung is what every rung before it is, and one thing more. The lower rungs are not part of the package any more; here
they are put together again by leaving out what the package has.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_trainer.data.batches import Batch, collate, collate_packed
from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.numerics import document_attention
from qlora_trainer.recipe import Lora, Quantization
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.runners.causal_lm import Checkpointing, LossPath, find_loss_path, set_checkpointing
from qlora_trainer.runtime import bnb
from qlora_trainer.runtime.device import World, choose_device, peak_allocated_bytes, reset_peak_allocated
from qlora_trainer.runtime.memory import PeakMemory
from qlora_trainer.stages.adapt import choose_layers, insertion
from qlora_trainer.stages.quantize import open_base, quantize
from qlora_trainer.stages.train.step import optimizer_step

Json = dict[str, Any]


@dataclass(frozen=True)
class Rung:
    """What a turn trains with.

    Attributes:
        does: in words, for tables.
        checkpointing: decoder layers that are computed again.
        has_lean_adapters: adapted layers keep their input alone and cast nothing to float32.
        has_lean_modules: norms and gated parts keep their inputs alone.
        has_chunked_loss: logits of label tokens alone, a few at a time.
        is_packed: no padding; attention by document.
        has_own_attention: its backward pass in large blocks.
    """

    does: str
    checkpointing: Checkpointing = "none"
    has_lean_adapters: bool = True
    has_lean_modules: bool = True
    has_chunked_loss: bool = True
    is_packed: bool = True
    has_own_attention: bool = True


RUNGS: Final = {
    "libraries": Rung(
        "the libraries' modules, logits at the positions of labels",
        has_lean_adapters=False,
        has_lean_modules=False,
        has_chunked_loss=False,
        is_packed=False,
        has_own_attention=False,
    ),
    "lean_adapters": Rung(
        "+ adapted layers differentiated by hand",
        has_lean_modules=False,
        has_chunked_loss=False,
        is_packed=False,
        has_own_attention=False,
    ),
    "lean_modules": Rung(
        "+ norms and gated parts too", has_chunked_loss=False, is_packed=False, has_own_attention=False
    ),
    "chunked_loss": Rung("+ loss in chunks of label tokens", is_packed=False, has_own_attention=False),
    "packed": Rung("+ rows packed, attention by document", has_own_attention=False),
    "none": Rung("+ attention's backward pass in large blocks (checkpointing: none)"),
    "selective": Rung("the same, checkpointing: selective", checkpointing="selective"),
    "full": Rung("the same, checkpointing: full", checkpointing="full"),
}


def run(folder: Path, rung: Rung) -> Json:
    """Trains on the prepared rows, one step a batch."""
    job = json.loads((folder / "job.json").read_text())
    device = choose_device()
    rate = matrix_rate(device)
    reset_peak_allocated(device)
    with PeakMemory() as memory:
        model = adapted_model(folder, job, rung)
        set_checkpointing(model, rung.checkpointing)
        steps = train(model, job, rung)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "threads": torch.get_num_threads(),
        "trainable_parameters": trainable,
        "peak_bytes": peak_allocated_bytes(device) or memory.peak_bytes(),
        "matrix_flops_per_second": max(rate, matrix_rate(device)),
        "steps": steps,
    }


def matrix_rate(device: torch.device, repeats: int = 5) -> float:
    """Floating-point operations a second of square bfloat16 matrix products, the median of ``repeats``."""
    size = 2048 if device.type == "cpu" else 8192
    one, other = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        began = settled_time(device)
        torch.mm(one, other)
        seconds.append(settled_time(device) - began)
    return 2 * size**3 / statistics.median(seconds[1:])


def settled_time(device: torch.device) -> float:
    """Seconds of the clock, once the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_flops(model: nn.Module, batch: Batch, lengths: list[int]) -> int:
    """Floating-point operations of a step's matrix products, none of them done twice: forward pass, gradients of
    activations and of the factors, and causal attention (half of the squares).
    """
    door: Any = model
    config = door.config
    linear = sum(module.in_features * module.out_features for module in _linears(model, "base_layer"))
    factors = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tokens = sum(lengths)
    head = 4 * batch.label_tokens * config.vocab_size * config.hidden_size
    attention = 6 * config.hidden_size * config.num_hidden_layers * sum(length**2 for length in lengths)
    return 4 * tokens * linear + 6 * tokens * factors + head + attention


def _linears(model: nn.Module, name: str) -> list[Any]:
    return [module for place, module in model.named_modules() if place.rsplit(".", 1)[-1] == name]


def adapted_model(folder: Path, job: Json, rung: Rung) -> nn.Module:
    """The folder's model in NF4 with double quantization and adapters on all linear layers; quantizes it once."""
    lora = Lora(rank=job["rank"], alpha=job["alpha"])
    settings = Quantization(cache_folder=str(folder / "quantized"))
    base = BaseCheckpoint(folder=folder / "model", parameters=0, bytes=0)
    layers = choose_layers(base, lora)
    quantized = quantize(base, settings, lora=lora, layers=layers, content_key="random weights")
    lean_layers = insertion.lean_layers if rung.has_lean_adapters else dict
    make_lean = insertion.make_lean if rung.has_lean_modules else lambda model, dtype: 0
    with patch.object(insertion, "lean_layers", lean_layers), patch.object(insertion, "make_lean", make_lean):
        opened = open_base(quantized, settings, layers=layers)
        dtype = settings.compute_dtype
        model: nn.Module = insertion.insert(opened, lora, layers=layers, compute_dtype=dtype, seed=job["seed"])
    return model.train()


def loss_path(model: nn.Module, rung: Rung) -> LossPath:
    """The path that the model allows, or the one that the rung stands on."""
    found = find_loss_path(model)
    if found.head is None or not found.packs:
        raise SystemExit(f"the model does not allow the leanest path: {found.why_not}")
    return found if rung.has_chunked_loss else LossPath(None, packs=False)


def train(model: nn.Module, job: Json, rung: Rung) -> list[Json]:
    """Takes one step on each batch; changes the model's adapters."""
    pairs = zip(job["token_ids"], job["labels"], strict=True)
    rows = [EncodedRow(tuple(token_ids), tuple(labels), (), "", "") for token_ids, labels in pairs]
    optimizer = bnb.make_optimizer(
        job["optimizer"],
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        learning_rate=job["learning_rate"],
        betas=(0.9, 0.999),
        weight_decay=0.0,
    )
    path, device = loss_path(model, rung), next(model.parameters()).device
    attention = document_attention.causal_attention if rung.has_own_attention else _torchs_attention
    steps = []
    for start in range(0, len(rows), job["micro_batch_size"]):
        indexes = range(start, start + job["micro_batch_size"])
        began = settled_time(device), time.process_time()
        batch = collate_packed(rows, indexes) if rung.is_packed else collate(rows, indexes, job["pad_id"])
        with patch.object(document_attention, "causal_attention", attention):
            result = optimizer_step(
                model,
                [batch],
                optimizer,
                path=path,
                max_gradient_norm=job["max_gradient_norm"],
                world=World.current(),
                name_rows=str,
            )
        seconds, cpu_seconds = settled_time(device) - began[0], time.process_time() - began[1]
        lengths = [len(rows[index].token_ids) for index in indexes]
        steps.append(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "computed_tokens": batch.token_ids.numel(),
                "tokens": sum(lengths),
                "label_tokens": result.label_tokens,
                "token_id_sum": sum(sum(rows[index].token_ids) for index in indexes),
                "nats_per_token": float(result.nats) / result.label_tokens,
                "gradient_norm": result.gradient_norm,
                "matrix_flops": matrix_flops(model, batch, lengths),
            }
        )
    return steps


def _torchs_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of bench_step.py: model/ and job.json")
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("--rung", choices=RUNGS, default="none")
    args = parser.parse_args()
    args.result.write_text(json.dumps(run(args.folder, RUNGS[args.rung])))


if __name__ == "__main__":
    main()
