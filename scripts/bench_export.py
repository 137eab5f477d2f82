r"""Which way of making an int4 or int8 file keeps what was learned, and what does it cost?

Trains QLoRA adapters of two sizes on several bases and seeds, makes every file of the ladder from each, from both
merge bases, and beside them what others do: the library's merge into the 4-bit model (PEFT), and 16-bit LoRA followed
by GPTQ. Each file is written, loaded by transformers and measured on the same test rows.

    python scripts/pretrain_base.py --out runs/bench_base --work runs/bench_base_work --tokens 2.5e6 \
        --hidden 128 --ffn 384 --layers 4 --vocabulary 2048
    python scripts/bench_export.py            # all cases, one thread each, as many at a time as there are cores

Writes ``scripts/results/bench_export.json`` after each cell and prints the table of ``summary``. Cells that are in it,
measured under the settings of this file, are kept, so that an interrupted benchmark goes on, on another machine too.
``--case NAME`` and ``--seeds N`` limit what is measured, ``--jobs N`` how many cells at a time.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "scripts/results/bench_export.json"
WORK = ROOT / "runs/bench_export"
GRIDS = {
    "int4 g32": "compressed_tensors_w4a16_g32",
    "int4 g64": "compressed_tensors_w4a16_g64",
    "int8": "compressed_tensors_w8a16",
}
RUNGS = {"int4 g32": (0, 1, 2), "int4 g64": (0, 1, 2, 3, 4), "int8": (0, 1)}
SLOW_RUNGS = (3, 4)
SIZES = {"small": "|D|/|W| near 1 %", "large": "|D|/|W| near 10 %"}

# Learning rates that give the two sizes of delta, found on seed 0.
CASES: dict[str, dict[str, Any]] = {
    "quickstart": {
        "recipe": "recipes/quickstart.yaml",
        # The largest model: its slow rungs are measured on the first seed alone.
        "slow_rungs_on_seeds": 1,
        "rates": {"small": 6.0e-5, "large": 8.0e-4},
        "changes": {"training": {"max_steps": 100}, "run": {"threads": 1}},
    },
    "stories260k_e2e": {
        "recipe": "recipes/stories260k_e2e_cpu.yaml",
        "rates": {"small": 1.2e-4, "large": 1.5e-3},
        "changes": {"training": {"max_steps": 100}},
    },
    "bench_base_gsm8k": {
        "recipe": "recipes/embedded_gsm8k_cpu.yaml",
        "rates": {"small": 6.0e-5, "large": 8.0e-4},
        "changes": {
            "base_model": {"path": "runs/bench_base"},
            "quantization": {"data_type": "nf4", "compute_dtype": "float32"},
            "lora": {"use_rslora": False, "alpha": 32.0},
            "data": {"window": 320},
            "training": {"max_steps": 100, "micro_batch_size": 16, "gradient_accumulation_steps": 1,
                         "checkpointing": "none", "schedule": "cosine"},
            "run": {"threads": 1},
        },
    },
}  # fmt: skip
SHARED = {
    "data": {"validation_rows": 100, "test_rows": 150},
    "evaluation": {"metrics": [], "samples": 0, "batch_size": 25, "kl_tokens": 4000},
    "merge": {"into": "measured"},
    "export": {"formats": []},
    "calibration": {"rows": 32, "batch_size": 8},
    "rounding": {"learned_steps": 100},
    "tracking": {"wandb": "off"},
    "run": {"folder": str(WORK)},
}


@dataclass(frozen=True)
class Row:
    """One file, measured on the test rows; ``seconds`` are those of its making, measuring not counted."""

    grid: str
    method: str
    merged_into: str
    nats_per_token: float
    above_trained: float
    gain_kept: float | None
    interval: tuple[float, float] | None
    kl_to_trained: float
    top1_agreement: float
    seconds: float


def main() -> None:
    """Runs one case in this process, or every missing one in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    parser.add_argument("--cell", help="CASE/SIZE/SEED: this process measures one cell")
    asked = parser.parse_args()
    os.chdir(ROOT)
    if asked.cell:
        case, size, seed = asked.cell.split("/")
        measure_cell(case, size, int(seed))
        return
    cells = [(case, size, seed) for seed, case, size in product(range(asked.seeds), asked.case or CASES, SIZES)]
    done = known_cells(_result())
    writing = Lock()

    def measure(cell: tuple[str, str, int]) -> None:
        _in_a_process(cell)
        if _cell_file(*cell).exists():
            with writing:
                # Another process may have measured other cells meanwhile.
                done.update(known_cells(_result()))
                done[cell] = json.loads(_cell_file(*cell).read_text())
                RESULT.write_text(json.dumps(described(in_order(done)), indent=1) + "\n")

    with ThreadPoolExecutor(asked.jobs) as pool:
        list(pool.map(measure, [cell for cell in cells if cell not in done]))
    print(summary(in_order(done)))


def _result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    return found


def known_cells(result: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The cells of a result file that were measured under the settings of this file.

    Where the runs lie is no setting.
    """

    def settings(shared: dict[str, Any]) -> dict[str, Any]:
        return {section: fields for section, fields in shared.items() if section != "run"}

    if settings(result.get("shared", {})) != settings(SHARED):
        return {}
    return {
        (cell["case"], cell["size"], cell["seed"]): cell
        for cell in result["cells"]
        if result["cases"].get(cell["case"]) == CASES.get(cell["case"], {})
    }


def in_order(cells: dict[tuple[str, str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells by case and size, as in ``CASES`` and ``SIZES``, then seed."""
    cases, sizes = list(CASES), list(SIZES)
    return [cells[key] for key in sorted(cells, key=lambda key: (cases.index(key[0]), sizes.index(key[1]), key[2]))]


def _in_a_process(cell: tuple[str, str, int]) -> None:
    if _cell_file(*cell).exists():
        return
    name = "/".join(map(str, cell))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--cell", name],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{name}: {time.monotonic() - began:.0f} s, exit code {done.returncode}", flush=True)
    if done.returncode:
        print(done.stderr[-2000:], flush=True)


def _cell_file(case: str, size: str, seed: int) -> Path:
    return WORK / f"{case}-{size}-{seed}.json"


def measure_cell(case: str, size: str, seed: int) -> None:
    """Trains both ways, makes every file, writes the cell's figures."""
    from bench_export_cell import Cell  # noqa: PLC0415 - loads torch, which the driver does not need

    cell = Cell(CASES[case], SHARED, size=size, name=f"{case}-{size}-{seed}", seed=seed)
    is_whole = seed < CASES[case].get("slow_rungs_on_seeds", seed + 1)
    rungs = {grid: tuple(rung for rung in own if is_whole or rung not in SLOW_RUNGS) for grid, own in RUNGS.items()}
    rows = [asdict(Row(**row)) for row in cell.rows(GRIDS, rungs)]
    found = {"case": case, "size": size, "seed": seed, **cell.figures(), "rows": rows}
    _cell_file(case, size, seed).write_text(json.dumps(found) + "\n")


def described(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file: figures with what they were measured by."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "compressed-tensors")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, one thread a case",
        "versions": {name: version(name) for name in packages},
        "cases": CASES,
        "shared": SHARED,
        "cells": cells,
    }


def summary(cells: list[dict[str, Any]]) -> str:
    """Means over the seeds, one line for each case, size, grid, method and base."""
    lines = []
    for case, size in product(CASES, SIZES):
        own = [cell for cell in cells if (cell["case"], cell["size"]) == (case, size)]
        if not own:
            continue
        share, trained = (statistics.mean(cell[key] for cell in own) for key in ("delta_share", "trained_nats"))
        lines.append(f"\n{case}, {size} delta ({100 * share:.1f} % of the weights), trained {trained:.4f} nats/token")
        keys = dict.fromkeys((row["grid"], row["method"], row["merged_into"]) for cell in own for row in cell["rows"])
        for key in keys:
            rows = [
                row for cell in own for row in cell["rows"] if (row["grid"], row["method"], row["merged_into"]) == key
            ]
            lines.append(_line(key, rows))
    return "\n".join(lines)


def _line(key: tuple[str, str, str], rows: list[dict[str, Any]]) -> str:
    def mean(name: str) -> float:
        return statistics.mean(row[name] for row in rows)

    kept = [row["gain_kept"] for row in rows if row["gain_kept"] is not None]
    share = f"{100 * statistics.mean(kept):6.1f} % kept" if kept else "   no gain to keep"
    return (
        f"  {key[0]:9} {key[1]:42} {key[2]:12} {share}  {1000 * mean('above_trained'):+8.2f} mnats  "
        f"KL {mean('kl_to_trained'):.5f}  top-1 {100 * mean('top1_agreement'):5.1f} %  {mean('seconds'):6.1f} s"
    )


if __name__ == "__main__":
    main()
