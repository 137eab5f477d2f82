"""Which figures does the README show? Those of scripts/results/*.json; this writes them between its markers.

python scripts/update_readme.py           rewrites README.md
python scripts/update_readme.py --check   says whether it is up to date (exit code 1 if not)
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

from qlora_trainer.numerics.device_overhead import KEPT_BY_ALLOCATOR
from qlora_trainer.numerics.footprint import PAGED, training_memory
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.numerics.training_load import TrainingLoad

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results"
SHAPES = ROOT / "scripts" / "shapes"


def quickstart_table() -> str:
    """The gap table of the quickstart's report."""
    report = json.loads((RESULTS / "quickstart.json").read_text(encoding="utf-8"))
    kept = {f"export:{export['format']}": export for export in report["exports"]}
    lines = [
        "| stage | made by | nats per token [95 %] | exact match | KL to trained | gain kept [95 %] | MiB | verified |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage in report["stages"]:
        low, high = stage["interval"]
        export = kept.get(stage["name"])
        lines.append(
            f"| {stage['name']} | {_made_by(export)} | {stage['nats_per_token']:.4f} [{low:.4f}, {high:.4f}] "
            f"| {stage['metrics']['exact_match']:.1%} | {_kl(stage['kl_to_trained'])} | {_kept(export)} "
            f"| {stage['bytes'] / 2**20:.1f} | {_verified(export)} |"
        )
    hardware = f"{report['environment']['cores']} cores, {report['environment']['processor']}"
    peak = max(report["training"]["peak_bytes"], *(stage["peak_bytes"] for stage in report["stages"]))
    lines += ["", f"Measured on {hardware}: {report['seconds']:.0f} s, at most {peak / 2**30:.2f} GiB resident."]
    lines += ["", f"> {report['sentence']}"]
    return "\n".join(lines)


def step_table() -> str:
    """One optimizer step, rung by rung, beside the peer's."""
    result = json.loads((RESULTS / "bench_step.json").read_text(encoding="utf-8"))
    lines = [
        "| step | s | label tokens/s | peak GiB | times the peer | times the peer with checkpointing "
        "| share of the matrix rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in result["turns"].items():
        ratios = " |  | "
        if "share_of_matrix_rate" in found:
            times = (found["times_as_fast_as_peer"], found["times_as_fast_as_peer_checkpointed"])
            ratios = f"{times[0]:.2f} | {times[1]:.2f} | {found['share_of_matrix_rate']:.0%}"
        lines.append(
            f"| {result['does'][name]} | {found['step_seconds']:.2f} (spread {found['spread']:.0%}) "
            f"| {found['label_tokens_per_second']:.0f} | {found['peak_bytes'] / 2**30:.2f} | {ratios} |"
        )
    shape, steps = result["shape"], result["repeats"]["steps"] * result["repeats"]["rounds"]
    rate = median(turn["matrix_flops_per_second"] for turn in result["turns"]["none"]["turns"])
    lines += [
        "",
        f"Medians of {steps} steps on {result['threads']} threads; Llama shape with random weights, hidden "
        f"{shape['hidden_size']}, {shape['num_hidden_layers']} layers, vocabulary {shape['vocab_size']:,}; gsm8k rows "
        f"up to 512 tokens, 4 a step; losses and gradient norms of every line agree to bfloat16 rounding. The "
        f"processor multiplies bfloat16 matrices at {rate / 1e9:.0f} GFLOP/s. "
        f"Peer: TRL {result['environment']['trl']}.",
    ]
    return "\n".join(lines)


def export_table() -> str:
    """The ways to make a file side by side: share of the learned nats kept, and loss above the trained model."""
    result = json.loads((RESULTS / "bench_export.json").read_text(encoding="utf-8"))
    columns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        columns.setdefault((cell["case"], cell["size"]), []).append(cell)
    lines = []
    for grid, beside in (("int4 g64", {"nf4"}), ("int8", set[str]())):
        heads = [f"{case}, D {mean(cell['delta_share'] for cell in cells):.1%}" for (case, _), cells in columns.items()]
        lines += [f"| {grid} | into | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
        keys = dict.fromkeys(
            (row["method"], row["merged_into"])
            for cell in result["cells"]
            for row in cell["rows"]
            if row["grid"] in {grid, *beside}
        )
        for key in keys:
            shown = [_share_and_loss(cells, grid, key) for cells in columns.values()]
            lines.append(f"| {key[0]} | {key[1]} | {' | '.join(shown)} |")
        lines.append("")
    seeds = {f"{case} {size}": len(cells) for (case, size), cells in columns.items()}
    counts = ", ".join(f"{name} {count}" for name, count in seeds.items())
    lines.append(
        "Mean share of the learned nats that is kept, and in brackets thousandths of a nat per token above the trained "
        f"model, on test rows. Seeds: {counts}. D = size of the learned delta over that of the weights."
    )
    return "\n".join(lines)


def streaming_table() -> str:
    """Peak resident memory of each work on two checkpoints that differ in their number of blocks alone."""
    result = json.loads((RESULTS / "bench_streaming.json").read_text(encoding="utf-8"))
    small, large = result["checkpoints"]
    heads = [f"{each['checkpoint_bytes'] / 1e9:.1f} GB, {each['blocks']} blocks" for each in (small, large)]
    lines = [f"| peak resident MB | {heads[0]} | {heads[1]} | MB per GB more |", "|---|---|---|---|"]
    for work, growth in result["growth"].items():
        peaks = [each["work"][work]["peak_bytes"] / 1e6 for each in (small, large)]
        lines.append(f"| {work} | {peaks[0]:,.0f} | {peaks[1]:,.0f} | {1000 * growth:.0f} |")
    return "\n".join(lines)


def footprint_table() -> str:
    """Predicted memory of models that need a GPU: rank 64, one row of 512 tokens, everything computed again."""
    shapes = {
        path.stem: ModelShape.from_config(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(SHAPES.glob("*.json"), key=lambda path: int(re.findall(r"\d+", path.stem)[-1]))
    }
    loads = {
        name: TrainingLoad(rank=64, optimizer=name, accumulates=True, device="cuda")
        for name in ("paged_adamw", "paged_adamw_8bit")
    }
    lines = [
        "| GB, predicted | parameters | 16-bit weights | NF4 weights and constants | the rest in 16 bit "
        "| adapters, gradients | activations, workspace | context, allocator | on the card "
        "| paged state, 32 bit | 8 bit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, shape in shapes.items():
        full, small = (training_memory(shape, loads[each]) for each in ("paged_adamw", "paged_adamw_8bit"))
        items = full.items
        groups = (
            items["quantized weights"] + items["quantization constants"],
            items["embeddings, norms, head"],
            items["adapters (float32)"] + items["gradients (float32)"],
            sum(items[each] for each in ("kept for the backward pass", "layer at work", "dequantized weights")),
            sum(items[each] for each in ("CUDA context", "cuBLAS workspace", KEPT_BY_ALLOCATOR)),
            full.total - items[PAGED],
            items[PAGED],
            small.items[PAGED],
        )
        cells = " | ".join(f"{size / 1e9:.1f}" for size in (2 * shape.parameters, *groups))
        lines.append(f"| {name.replace('_', ' ')} | {shape.parameters / 1e9:.1f}B | {cells} |")
    lines += [
        "",
        "Predicted, not measured: no GPU was at hand. Rank 64 on every linear layer, one row of 512 tokens at a time, "
        "checkpointing full, NF4 with double quantization, bfloat16. `qlora-trainer check RECIPE --device cuda "
        "--memory 48GB` gives it for a recipe. The paper (QLoRA, arXiv 2305.14314, section 1) tells of more than "
        "780 GB for finetuning 65B parameters in 16 bit and of less than 48 GB with QLoRA.",
    ]
    return "\n".join(lines)


def memory_table() -> str:
    """Predicted peak memory of training beside the measured one."""
    result = json.loads((RESULTS / "bench_memory.json").read_text(encoding="utf-8"))
    lines = ["| case | predicted MiB | measured MiB | error | held out |", "|---|---|---|---|---|"]
    for name, case in result["cases"].items():
        lines.append(
            f"| {name} | {case['predicted_bytes'] / 2**20:,.0f} | {case['measured_bytes'] / 2**20:,.0f} "
            f"| {case['error']:+.1%} | {'yes' if case['is_held_out'] else 'no'} |"
        )
    common = result["common"]["model"]
    lines += [
        "",
        f"Measure: {result['measure']}. If not said otherwise: Llama, hidden {common['hidden_size']}, "
        f"{common['num_hidden_layers']} layers, vocabulary {common['vocab_size']:,}, NF4, bfloat16, rank 16, 4 rows of "
        f"512 tokens, checkpointing none. Largest error {result['largest_error']:.1%}; of the cases held out, which no "
        f"constant or term was fitted to, {result['largest_error_held_out']:.1%}.",
    ]
    return "\n".join(lines)


def _share_and_loss(cells: list[dict[str, Any]], grid: str, key: tuple[str, str]) -> str:
    rows = [
        row
        for cell in cells
        for row in cell["rows"]
        if row["grid"] in {grid, "nf4"} and (row["method"], row["merged_into"]) == key
    ]
    kept = [row["gain_kept"] for row in rows if row["gain_kept"] is not None]
    if not rows:
        return ""
    share = f"{mean(kept):.1%}" if kept else "-"
    return f"{share} ({1000 * mean(row['above_trained'] for row in rows):+.1f})"


def peers_table() -> str:
    """Our rounding beside llm-compressor's and AutoRound's on the same merged weights, rows and grid."""
    result = json.loads((RESULTS / "bench_export_peers.json").read_text(encoding="utf-8"))
    lines = ["| grid | method | KL to trained | nats per token | top-1 | seconds |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        grid = "" if row["group"] is None else f"int4 g{row['group']}"
        lines.append(
            f"| {grid} | {row['method']} | {row['kl_to_trained']:.5f} | {row['nats_per_token']:.4f} "
            f"| {row['top1']:.2%} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def _made_by(export: dict[str, Any] | None) -> str:
    if export is None or export.get("merged_into") is None:
        return ""
    return f"rung {export['rung']}, {export['merged_into']} base"


def _kl(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _kept(export: dict[str, Any] | None) -> str:
    if export is None:
        return ""
    if export["gain_kept"] is None:
        return "not divisible"
    return f"{export['gain_kept']:.1%} [{export['interval'][0]:.1%}, {export['interval'][1]:.1%}]"


def _verified(export: dict[str, Any] | None) -> str:
    return "" if export is None else "yes" if export["verified"] else "NO"


def resume_table() -> str:
    """The soak: kills, what they cost, and whether any run ended otherwise."""
    result = json.loads((RESULTS / "bench_resume.json").read_text(encoding="utf-8"))
    lost, damaged = result["steps_lost"], sum(result["checkpoints_damaged_on_purpose"].values())
    earlier = result["resumes_from_an_earlier_checkpoint"]
    every = result["checkpoint_every_steps"]
    rows = (
        ("kills (-9)", f"{result['kills']}, up to {result['most_kills_of_a_run']} of one run"),
        ("while a checkpoint was written", result["kills_while_writing_a_checkpoint"]),
        ("checkpoints broken by a kill", result["broken_checkpoints_after_kills"]),
        ("checkpoints damaged on purpose", f"{damaged}; starts that went on from an earlier one: {earlier}"),
        (
            "steps lost by a kill",
            f"{lost['p50']} in the median, {lost['max']} at most; a checkpoint every {every} steps",
        ),
        ("runs carried to their end", result["runs"]),
        ("runs that ended with other bits or metrics", len(result["divergent_runs"])),
    )
    lines = ["| soak on the quickstart's model and rows | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])


TABLES: dict[str, Callable[[], str]] = {
    "quickstart": quickstart_table,
    "bench_step": step_table,
    "bench_export": export_table,
    "bench_export_peers": peers_table,
    "bench_streaming": streaming_table,
    "bench_resume": resume_table,
    "footprint": footprint_table,
    "bench_memory": memory_table,
}


def updated(text: str) -> str:
    """The README with each table between its markers made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no markers <!-- {name} --> ... <!-- /{name} -->")
        table = make()
        text = pattern.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main() -> int:
    """Rewrites or checks README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if something would change")
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = updated(before)
    if parser.parse_args().check:
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
