"""How much of what a base loses in quantization does LoRA training win back, base by base, for the same budget?

    python scripts/bench_recovery.py                    # the quickstart's model and task, three seeds
    python scripts/bench_recovery.py --steps 500

Bases: every ``quantization.data_type`` of a recipe: 16 bit (``none``), int8, NF4, FP4, and GPTQ int4 in groups of 64.
Gap before: nats per token above the untuned 16-bit base; gap after: above the 16-bit base that was tuned alike, seed by
seed. Each base runs in a process of its own, so that its peak memory is its own. Finished bases are kept in
``runs/bench_recovery``. Writes
``scripts/results/bench_recovery.json``.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

from torch import nn
from tuned_bases import ROOT, Bases, Json, Losses, bases_of, changed, gap, score, write_result

from qlora_trainer.recipe import DataType
from qlora_trainer.records import LinearLayers
from qlora_trainer.runtime.atomic import write_text
from qlora_trainer.runtime.memory import release_freed
from qlora_trainer.stages.compare.quantizing import stored_bytes

RECIPE: Final = "recipes/quickstart.yaml"
WORK: Final = ROOT / "runs/bench_recovery"
REFERENCE: Final = "16bit"
BASES: Final[dict[str, DataType]] = {
    REFERENCE: "none",
    "int8": "int8",
    "nf4": "nf4",
    "fp4": "fp4",
    "gptq_int4": "gptq_int4",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of 16 rows")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each base")
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--turn", choices=BASES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn is not None:
        measure(args.turn, args.seed, steps=args.steps, test_rows=args.test_rows)
        return
    turns = {
        base: [_turn(base, seed, steps=args.steps, test_rows=args.test_rows) for seed in range(args.seeds)]
        for base in BASES
    }
    write_result("bench_recovery.json", f"python {shlex.join(sys.argv)}", summary(turns, steps=args.steps))


def _turn(base: str, seed: int, *, steps: int, test_rows: int) -> Json:
    """One training of a base, read back or made now in a process of its own."""
    file = _file(base, seed, steps, test_rows)
    if not file.exists():
        settings = {"turn": base, "seed": seed, "steps": steps, "test-rows": test_rows}
        options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        subprocess.run([sys.executable, __file__, *options], cwd=ROOT, check=True)
    found: Json = json.loads(file.read_text(encoding="utf-8"))
    return found


def _file(base: str, seed: int, steps: int, test_rows: int) -> Path:
    return WORK / f"{base}-{steps}-{test_rows}-{seed}.json"


def measure(base: str, seed: int, *, steps: int, test_rows: int) -> None:
    """One training of a base, into a file."""
    changes = [
        f"run.name=bench_recovery_{base}",
        "run.threads=1",
        f"training.max_steps={steps}",
        f"training.checkpoint_every_steps={steps}",
        "training.warmup_steps=5",
        "data.validation_rows=20",
        f"data.test_rows={test_rows}",
        "evaluation.metrics=[]",
        "calibration.rows=48",
    ]
    with bases_of(changed(RECIPE, changes)) as bases:
        model, size = opened(bases, base)
        before = bases.losses(model)
        release_freed()
        tuned = bases.tuned(model, base, seed=seed)
    found = {
        "bytes": size,
        "before": asdict(before),
        "after": asdict(tuned.losses),
        "seconds": tuned.trained.seconds,
        "peak_bytes": tuned.trained.peak_bytes,
        "trainable_parameters": tuned.trained.trainable_parameters,
        "tokens": tuned.trained.tokens,
    }
    WORK.mkdir(parents=True, exist_ok=True)
    write_text(_file(base, seed, steps, test_rows), json.dumps(found))
    print(f"{base} seed {seed}: {before.value:.4f} -> {tuned.losses.value:.4f}", flush=True)


def opened(bases: Bases, base: str) -> tuple[nn.Module, int]:
    """A base ready to be tuned, and the bytes of its stored weights, two for each that is not quantized."""
    layers = bases.ground.layers
    plain = LinearLayers(quantized={}, adapted=layers.adapted, ignored=layers.ignored)
    model, made = bases.stored(BASES[base])
    matrices = sum(rows * columns for rows, columns in layers.quantized.values())
    whole = stored_bytes(bases.ground.base.folder, plain, None)
    return model, round(whole - 2 * matrices + matrices * made.bits_per_parameter / 8)


def summary(turns: dict[str, list[Json]], *, steps: int) -> Json:
    """The table: gaps before and after, with intervals over test rows, and by seed."""
    before = {base: Losses(**turn[0]["before"]) for base, turn in turns.items()}
    after = {base: [Losses(**each["after"]) for each in turn] for base, turn in turns.items()}
    rows = [
        {
            "base": base,
            "bytes": turn[0]["bytes"],
            "before": score([before[base]]),
            "gap_before": gap([before[base]], [before[REFERENCE]]),
            "after": score(after[base]),
            "gap_after": gap(after[base], after[REFERENCE]),
            "seconds": [each["seconds"] for each in turn],
            "peak_bytes": [each["peak_bytes"] for each in turn],
        }
        for base, turn in turns.items()
    ]
    first = turns[REFERENCE][0]
    return {
        "recipe": RECIPE,
        "steps": steps,
        "seeds": len(turns[REFERENCE]),
        "tokens": first["tokens"],
        "trainable_parameters": first["trainable_parameters"],
        "test_rows": len(before[REFERENCE].nats),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
