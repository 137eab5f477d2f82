"""How much memory do merging and exporting take, and does it grow with the number of blocks?

Llamas of random weights are written that have the same blocks, but not as many, each with a random adapter, and are
quantized as for training. Then each way to make a file runs in a process of its own, on one and on the other.

    python scripts/bench_streaming.py --folder /a/disk/with/room

Prints a table and writes ``scripts/results/bench_streaming.json``, work by work: run again with the same folder, it
goes on with what is missing. The folder's ``checkpoints`` are removed at the end. The peak is the kernel's high-water
mark of the resident memory of the process that does the work, imports and all; nothing is subtracted. (It is not
``ru_maxrss``, which a process takes over from the one that starts it.) Memory that grows with the number of blocks
makes the program end with 1 (``LARGEST_GROWTH``).
"""

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.formats.peft_adapter import AdapterSettings, Factors
from qlora_trainer.formats.peft_adapter import write as write_adapter
from qlora_trainer.recipe import Calibration, ExportFormat, Lora, Quantization, Rounding
from qlora_trainer.records import BaseCheckpoint, LinearLayers
from qlora_trainer.runtime.environment import describe_environment
from qlora_trainer.runtime.memory import PeakMemory, resident_bytes
from qlora_trainer.runtime.weight_files import copy_companions, write_shards
from qlora_trainer.stages import export
from qlora_trainer.stages.adapt import choose_layers
from qlora_trainer.stages.export import AdapterFactors, ExportInputs, Shelf, TaskData, Way
from qlora_trainer.stages.merge import MergeSource, merge
from qlora_trainer.stages.merge import read as read_adapter
from qlora_trainer.stages.quantize import quantize, weight_format_of

ROOT: Final = Path(__file__).parents[1]
RESULT: Final = ROOT / "scripts/results/bench_streaming.json"

Json = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

SHAPE: Final = {
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
QUICK_SHAPE: Final = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MEGABYTES: Final = (1000, 4000)
QUICK_MEGABYTES: Final = (2, 8)
LORA: Final = Lora(rank=8, alpha=16.0)
DELTA_SHARE: Final = 0.01
"""Size of the random delta as a share of the weights: what training leaves (QUANTIZATION, section 4)."""
ROWS: Final = 8
ROW_TOKENS: Final = 64
CALIBRATION: Final = Calibration(rows=ROWS, batch_size=4)
ROUNDING: Final = Rounding(scale_epochs=1, scale_learning_rate=0.01)
"""Two steps of tuning, of a rate large enough for scales in bfloat16 to change."""
INT4: Final[ExportFormat] = "compressed_tensors_w4a16_g64"
LARGEST_GROWTH: Final = 0.15
"""Growth of a peak, as a share of the growth of the checkpoint, that is refused. What may stay in memory for each block
is the adapter, 4 % of a block in these models, and names, headers and modules without weights."""


@dataclass(frozen=True)
class Place:
    """Where one checkpoint and all that is made of it lie."""

    folder: Path

    @property
    def base(self) -> Path:
        """The 16-bit model."""
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        """The random adapter."""
        return self.folder / "adapter"

    def inputs(self) -> ExportInputs:
        """What is exported; reads the adapter and no weights."""
        source, settings = self.source(), Quantization()
        tokenizer = TextTokenizer.load(self.base)
        return ExportInputs(
            base=self.base,
            adapter_base=source.quantized,
            adapter=self.adapter,
            merged=self.folder / "merged",
            merged_into="dequantized",
            weights=lambda into, wanted=None, on_merged=None: source.with_base(into).weights(on_merged, wanted),
            base_weights=lambda into: source.with_base(into).base_weights(),
            factors=AdapterFactors(
                lora_a={module: each.lora_a for module, each in source.factors.items()},
                lora_b={module: each.lora_b for module, each in source.factors.items()},
                scale=source.scale,
                has_magnitudes=False,
            ),
            layers=source.layers,
            data=TaskData(
                rows=random_rows(tokenizer.vocabulary_size),
                pad_id=tokenizer.pad_id,
                stop_ids=(),
                tokenizer=tokenizer,
                seed=0,
                learning_rate=1e-4,
                steps=1,
                batch_size=1,
            ),
            calibration=CALIBRATION,
            rounding=ROUNDING,
            compute_dtype=settings.compute_dtype,
            data_type="bfloat16",
            window=ROW_TOKENS,
            threads=1,
        )

    def layers(self) -> LinearLayers:
        """The layers that are quantized and adapted: all linear ones."""
        return choose_layers(BaseCheckpoint(self.base, parameters=0, bytes=0), LORA)

    def source(self) -> MergeSource:
        """What is merged; reads the adapter and no weights."""
        factors, settings = read_adapter(self.adapter)
        return MergeSource(
            base=self.base,
            quantized=next((self.folder / "quantized").iterdir()),
            weight_format=weight_format_of(Quantization()),
            compute_dtype=torch.bfloat16,
            layers=self.layers(),
            factors=factors,
            scale=settings.scale,
            into="dequantized",
            initial={},
        )


def random_rows(vocabulary: int) -> tuple[EncodedRow, ...]:
    """Rows of random tokens, the second half of each trained."""
    draw = random.Random(0)
    half = ROW_TOKENS // 2
    rows = [tuple(draw.randrange(10, vocabulary) for _ in range(ROW_TOKENS)) for _ in range(ROWS)]
    return tuple(EncodedRow(row, (IGNORE_INDEX,) * half + row[half:], row[:half], "", "") for row in rows)


def block_shapes(shape: Json, index: int) -> Shapes:
    """Shapes of a block's tensors by checkpoint name."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    heads, shared = (shape["head_dim"] * shape[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (shared, hidden),
        "self_attn.v_proj": (shared, hidden),
        "self_attn.o_proj": (hidden, heads),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    return {f"model.layers.{index}.{name}.weight": each for name, each in shapes.items()}


def blocks_for(megabytes: int, shape: Json) -> int:
    """So many blocks that their bfloat16 weights come nearest to a size."""
    block = 2 * sum(prod(each) for each in block_shapes(shape, 0).values())
    return max(1, round(megabytes * 1e6 / block))


def write_base(place: Place, shape: Json, *, blocks: int, tokenizer: Path) -> int:
    """Writes a bfloat16 Llama of random weights with tied embeddings, a shard at a time; gives its bytes."""
    place.base.mkdir(parents=True)
    vocabulary = TextTokenizer.load(tokenizer).vocabulary_size
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        hidden = shape["hidden_size"]
        shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
        for index in range(blocks):
            shapes |= block_shapes(shape, index)
        for name, each in shapes.items():
            # A matrix's outputs are of about the size of its inputs, whatever its width.
            values = (
                torch.randn(each, generator=generator).mul_(each[-1] ** -0.5) if len(each) == 2 else torch.ones(each)
            )
            yield name, values.bfloat16()
        yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)

    size = write_shards(place.base, tensors())
    config = {
        **shape,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": blocks,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (place.base / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    copy_companions(tokenizer, place.base)
    return size


def write_factors(place: Place, shape: Json, *, blocks: int) -> None:
    """Writes a random adapter on every linear layer whose delta is ``DELTA_SHARE`` of the weights."""
    generator = torch.Generator().manual_seed(1)
    # Entries of s B A have deviation s sqrt(r) a b, those of the weights 1 / sqrt(inputs), as A's here.
    deviation = DELTA_SHARE / (LORA.scale * LORA.rank**0.5)
    factors = {}
    for index in range(blocks):
        for name, each in block_shapes(shape, index).items():
            if len(each) == 2:
                factors[name.removesuffix(".weight")] = Factors(
                    lora_a=torch.randn(LORA.rank, each[1], generator=generator).mul_(each[1] ** -0.5),
                    lora_b=torch.randn(each[0], LORA.rank, generator=generator).mul_(deviation),
                )
    place.adapter.mkdir()
    settings = AdapterSettings(LORA.rank, LORA.alpha, 0.0, use_rslora=False, use_dora=False, base_model=str(place.base))
    write_adapter(place.adapter, factors, settings)


def quantize_base(place: Place) -> None:
    """NF4, as for training."""
    settings = Quantization(cache_folder=str(place.folder / "quantized"))
    base = BaseCheckpoint(place.base, parameters=0, bytes=0)
    quantize(base, settings, lora=LORA, layers=place.layers(), content_key="random weights")


def merge_16bit(place: Place) -> None:
    """The merged 16-bit folder."""
    merge(place.source(), place.folder / "file", data_type="bfloat16")


def written(name: ExportFormat, rung: int) -> Callable[[Place], None]:
    """Makes a file on a rung; what the rungs before it left on the shelf is taken from there."""

    def make(place: Place) -> None:
        inputs = place.inputs()
        rounded = None
        if rung:
            spec = export.integer_format_of(name).spec
            rounded = Shelf(place.folder / "shelf", inputs).rounded(Way(rung, "dequantized"), spec)
        export.write(name, place.folder / "file", inputs, into="dequantized", rounded=rounded)

    return make


WORK: Final[dict[str, Callable[[Place], None]]] = {
    "imports only": lambda _place: None,
    "quantize to NF4": quantize_base,
    "merge to 16 bit": merge_16bit,
    "int4, rung 0 (nearest)": written(INT4, 0),
    "GGUF Q8_0": written("gguf_q8_0", 0),
    "int4, rung 1 (GPTQ)": written(INT4, 1),
    "int4, rung 2 (tuned scales)": written(INT4, 2),
}


def measured(work: str, place: Place) -> Json:
    """One work in this process."""
    before = resident_bytes()
    began = time.perf_counter()
    with PeakMemory() as memory:
        WORK[work](place)
    return {
        "resident_before": before,
        "peak_bytes": memory.peak_bytes(),
        "seconds": time.perf_counter() - began,
        "threads": torch.get_num_threads(),
    }


def in_own_process(work: str, place: Place, *, threads: int) -> Json:
    """One work in a process of its own; removes the file set that it made, or an interrupted one left."""
    shutil.rmtree(place.folder / "file", ignore_errors=True)
    result = place.folder / "result.json"
    command = [sys.executable, __file__, "--work", work, "--folder", str(place.folder), "--out", str(result)]
    settings = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
    shutil.rmtree(place.folder / "file", ignore_errors=True)
    found: Json = json.loads(result.read_text())
    print(f"{work}: {found['peak_bytes'] / 1e6:,.0f} MB, {found['seconds']:.0f} s", flush=True)
    return found


def prepared(place: Place, megabytes: int, args: argparse.Namespace) -> Json:
    """Writes one checkpoint and its adapter; one that is there is described as it was."""
    note = place.folder / "checkpoint.json"
    if note.exists():
        known: Json = json.loads(note.read_text())
        return known
    shutil.rmtree(place.folder, ignore_errors=True)
    blocks = blocks_for(megabytes, args.shape)
    size = write_base(place, args.shape, blocks=blocks, tokenizer=args.tokenizer)
    write_factors(place, args.shape, blocks=blocks)
    adapter = sum(file.stat().st_size for file in place.adapter.iterdir())
    print(f"{blocks} blocks, {size / 1e6:,.0f} MB", flush=True)
    found = {"blocks": blocks, "checkpoint_bytes": size, "adapter_bytes": adapter, "work": {}}
    note.write_text(json.dumps(found))
    return found


def measure(folder: Path, args: argparse.Namespace) -> Iterator[list[Json]]:
    """All works on both checkpoints; gives what is known after each."""
    places = [Place(folder / str(size)) for size in args.megabytes]
    found = [prepared(place, size, args) for place, size in zip(places, args.megabytes, strict=True)]
    for work in WORK:
        for place, checkpoint in zip(places, found, strict=True):
            if work not in checkpoint["work"]:
                checkpoint["work"][work] = in_own_process(work, place, threads=args.threads)
                (place.folder / "checkpoint.json").write_text(json.dumps(checkpoint))
        yield found


def growths(small: Json, large: Json) -> dict[str, float]:
    """By how many bytes each peak grows for each byte that the checkpoint grows."""
    more = large["checkpoint_bytes"] - small["checkpoint_bytes"]
    return {
        work: (large["work"][work]["peak_bytes"] - small["work"][work]["peak_bytes"]) / more
        for work in small["work"]
        if work in large["work"]
    }


def circumstances(args: argparse.Namespace) -> Json:
    """What the figures were measured with and on."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": shlex.join(["python", "scripts/bench_streaming.py", *sys.argv[1:]]),
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "environment": describe_environment(),
        "threads": args.threads,
        "shape": args.shape,
        "block_bytes": 2 * sum(prod(each) for each in block_shapes(args.shape, 0).values()),
        "calibration": {"rows": ROWS, "tokens": ROW_TOKENS, "batch_size": CALIBRATION.batch_size},
        "rank": LORA.rank,
    }


def table(result: Json) -> str:
    """The figures as text: a line for each work, the checkpoints side by side."""
    small, large = result["checkpoints"]
    heads = [f"{each['checkpoint_bytes'] / 1e9:.2f} GB, {each['blocks']} blocks" for each in (small, large)]
    lines = [
        f"{'peak resident memory':28}{heads[0]:>26}{heads[1]:>26}{'ratio':>8}{'bytes per byte more':>21}",
    ]
    for work, growth in result["growth"].items():
        peaks = [each["work"][work]["peak_bytes"] for each in (small, large)]
        cells = [
            f"{peak / 1e6:,.0f} MB = {peak / each['checkpoint_bytes']:.0%}"
            for peak, each in zip(peaks, (small, large), strict=True)
        ]
        lines.append(f"{work:28}{cells[0]:>26}{cells[1]:>26}{peaks[1] / peaks[0]:>8.2f}{growth:>21.3f}")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORK, help="what a process of its own runs, in --folder")
    parser.add_argument("--folder", type=Path, help="where checkpoints go, about three times the larger one's size")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "recipes/quickstart/base", help="its folder")
    parser.add_argument("--megabytes", type=int, nargs=2, metavar=("SMALL", "LARGE"), help="of the checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the script; needs --out")
    args = parser.parse_args()
    args.shape = QUICK_SHAPE if args.quick else SHAPE
    args.megabytes = args.megabytes or (QUICK_MEGABYTES if args.quick else MEGABYTES)
    if not args.work and args.out == RESULT and tuple(args.megabytes) != MEGABYTES:
        parser.error("other sizes than the committed result's: give another file with --out")
    return args


def main() -> None:
    args = parsed()
    if args.work:
        args.out.write_text(json.dumps(measured(args.work, Place(args.folder))))
        return
    folder = (args.folder or Path(tempfile.gettempdir())) / "checkpoints"
    for found in measure(folder, args):
        result = {**circumstances(args), "checkpoints": found, "growth": growths(*found)}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    print(table(result))
    grown = [work for work, growth in result["growth"].items() if growth > LARGEST_GROWTH]
    if grown and not args.quick:
        raise SystemExit(f"memory grows with the number of blocks: {', '.join(grown)}")


if __name__ == "__main__":
    main()
