"""Are our rung 1 and rung 3 at least as good as llm-compressor's GPTQ and AutoRound, and how long do they take?

Both sides round the same model of a finished run, from the same calibration rows, onto the same grid: symmetric 4-bit
integers, one scale for 64 or 32 consecutive inputs, every linear layer but the output head.

    scripts/peer_environments                          # once: an environment for each peer
    python scripts/bench_export_peers.py RECIPE        # default: recipes/quickstart.yaml; a run that is missing is made

Prints a table and writes ``scripts/results/bench_export_peers.json``. The model is the merged one, into the dequantized
base, which is the trained function itself: peers read it as a float32 folder. Each side writes a compressed-tensors
file, stock transformers loads it, and the same measurement compares it with the trained model on the test rows, which
neither side has seen.

Seconds are those of rounding. Imports and the loading of peers' models do not count; what our side reads from disk
block by block does, and so does AutoRound's writing, which it does as it goes. AutoRound compiles its steps: a short
run goes before and fills the compiler's cache, so that most of compiling does not count either; what that run took
stands beside.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from qlora_trainer.errors import TrainerError
from qlora_trainer.export_formats import unfit_in_words
from qlora_trainer.pipeline.adapted import AdaptedModel
from qlora_trainer.pipeline.ground import prepare
from qlora_trainer.pipeline.journey import Journey
from qlora_trainer.recipe import ExportFormat, Recipe
from qlora_trainer.recipe_file import load
from qlora_trainer.records import LinearLayers
from qlora_trainer.runtime.device import seed_everything, set_threads
from qlora_trainer.runtime.environment import describe_environment
from qlora_trainer.runtime.progress import Silent
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.runtime.weight_headers import read_headers
from qlora_trainer.stages import evaluate, export, merge
from qlora_trainer.stages.evaluate import EncodedRow, Teacher
from qlora_trainer.stages.export import ExportInputs, Shelf, Way
from qlora_trainer.stages.export.blockwise import Bench, round_blocks
from qlora_trainer.stages.export.calibration import calibration_batches
from qlora_trainer.stages.export.learned import learned_method
from qlora_trainer.stages.export.rounded import RoundedModel
from qlora_trainer.stages.export.tuning import ScaleTuning

ROOT: Final = Path(__file__).parents[1]
RESULT: Final = ROOT / "scripts/results/bench_export_peers.json"
PEERS: Final = {
    "llm-compressor": (ROOT / ".venv-llmcompressor/bin/python", ROOT / "scripts/peers/llmcompressor_gptq.py"),
    "AutoRound": (ROOT / ".venv-auto-round/bin/python", ROOT / "scripts/peers/autoround.py"),
}
FORMATS: Final[dict[int, ExportFormat]] = {
    32: "compressed_tensors_w4a16_g32",
    64: "compressed_tensors_w4a16_g64",
}
NEAREST: Final = "ours: round to nearest"
GPTQ: Final = "ours: GPTQ (rung 1)"
LEARNED: Final = "ours: learned rounding (rung 3 before tuning)"
TUNED: Final = "ours: learned rounding + tuned scales (rung 3)"
PEER_GPTQ: Final = "llm-compressor: GPTQ"
PEER_LEARNED: Final = "AutoRound"
PEER_LEARNED_FLOAT32: Final = "AutoRound in float32"
COMPARED: Final = ((GPTQ, PEER_GPTQ), (LEARNED, PEER_LEARNED), (LEARNED, PEER_LEARNED_FLOAT32), (TUNED, PEER_LEARNED))
WARM_UP_STEPS: Final = 20
"""After so many steps AutoRound has compiled all that it compiles; after two it had not."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A trained model and what its files are measured with.

    Attributes:
        recipe: of the run.
        inputs: what files are made from.
        merged: the merged model as a float32 folder, for peers.
        teacher: the trained model on the test rows.
        test: these rows.
    """

    recipe: Recipe
    inputs: ExportInputs
    merged: Path
    teacher: Teacher
    test: Sequence[EncodedRow]

    def measured(self, model: nn.Module) -> Json:
        """A model's nearness to the trained one, and its loss, on the test rows."""
        options = {"batch_size": self.recipe.evaluation.batch_size, "pad_id": self.inputs.data.pad_id}
        fidelity = evaluate.fidelity(model, self.teacher, self.test, **options)
        return {
            "kl_to_trained": fidelity.kl_to_trained,
            "top1": fidelity.top1_agreement,
            "kl_tokens": fidelity.tokens,
            "nats_per_token": evaluate.held_out_nats(model, self.test, **options),
        }

    def open(self, folder: Path) -> nn.Module:
        """A folder as stock transformers loads it."""
        return evaluate.open_model(folder, self.inputs.compute_dtype, trust_remote_code=False)


@contextmanager
def trained_case(recipe: Recipe, folder: Path) -> Iterator[Case]:
    """The recipe's trained model: read back where its run is finished, trained now where it is not."""
    seed_everything(recipe.run.seed)
    ground = prepare(recipe, trust_remote_code=False)
    root = Path(recipe.run.folder) / recipe.run.name
    with RunFolder.open(root, recipe.model_dump(mode="json"), shaping=recipe.shaping) as run:
        journey = Journey(recipe, ground, run, Silent(), trust_remote_code=False)
        try:
            quantized = journey.quantize()
            adapted = AdaptedModel(recipe, ground, quantized, trust_remote_code=False)
            trained = journey.train(quantized, adapted)
            teacher = journey.teacher(quantized, trained, adapted)
            adapted.forget()
            source = journey.merge_source(quantized, trained)
            inputs = journey.export_inputs(source, journey.merge(source, quantized), quantized, trained)
        finally:
            journey.end_tracking()
        rounding = inputs.rounding.model_copy(update={"method": "gptq"})
        merged = merge.merge(source.with_base("dequantized"), folder / "merged", data_type="float32")
        yield Case(recipe, replace(inputs, rounding=rounding), merged.folder, teacher, ground.rows.test)


def our_rows(case: Case, group: int, folder: Path) -> Iterator[Json]:
    """Our files on one grid, made and measured."""
    name, inputs = FORMATS[group], case.inputs
    spec = export.integer_format_of(name).spec
    folder.mkdir()

    def row(method: str, rounded: RoundedModel | None, seconds: float) -> Json:
        place = folder / f"file-{method.partition(': ')[2].replace(' ', '-')}"
        written = export.write(name, place, inputs, into="dequantized", rounded=rounded)
        return {"group": group, "method": method, **case.measured(case.open(written.folder)), "seconds": seconds}

    yield row(NEAREST, None, 0.0)
    began = time.perf_counter()
    gptq = Shelf(folder / "shelf", inputs).rounded(Way(1, "dequantized"), spec)
    yield row(GPTQ, gptq, time.perf_counter() - began)

    learned, tuned, scratch = (RoundedModel(folder / kind) for kind in ("learned", "tuned", "scratch"))
    for model in (learned, tuned, scratch):
        model.folder.mkdir()
    began = time.perf_counter()
    method = learned_method(spec, inputs.rounding, seed=inputs.data.seed)
    round_blocks(Bench(inputs, scratch.folder), "dequantized", spec, method, learned)
    learning = time.perf_counter() - began
    yield row(LEARNED, learned, learning)
    began = time.perf_counter()
    tuning = ScaleTuning(Bench(inputs, scratch.folder), "dequantized", spec, learned, scratch.folder)
    tuning.run(inputs.rounding)
    tuning.write(tuned)
    yield row(TUNED, tuned, learning + time.perf_counter() - began)


def peer_rows(case: Case, group: int, folder: Path, *, threads: int) -> Iterator[Json]:
    """The peers' files on one grid, made and measured."""
    folder.mkdir()
    job = job_of(case.inputs, group)

    def row(method: str, peer: str, job: Json, **more: float) -> Json:
        told = run_peer(peer, case.merged, folder / method.replace(": ", "-"), job, threads=threads)
        file = Path(told["file"])
        require_same_grid(file, case.inputs.layers, group)
        figures = case.measured(case.open(file))
        return {"group": group, "method": method, **figures, "seconds": told["seconds"], **more} | {
            "versions": told["versions"]
        }

    yield row(PEER_GPTQ, "llm-compressor", job)
    for method, amp in ((PEER_LEARNED, True), (PEER_LEARNED_FLOAT32, False)):
        own = job | {"amp": amp}
        quick = own | {"steps": WARM_UP_STEPS}
        warm_up = run_peer("AutoRound", case.merged, folder / f"warm-up-{amp}", quick, threads=threads)
        yield row(method, "AutoRound", own, seconds_of_warm_up=warm_up["seconds"])


def job_of(inputs: ExportInputs, group: int) -> Json:
    """What a peer is told: our calibration rows without padding, the grid, and the number of learned steps."""
    batches = calibration_batches(inputs.data, inputs.calibration, torch.device("cpu"))
    rows = [
        token_ids[real].tolist()
        for batch in batches
        for token_ids, real in zip(batch.token_ids, batch.real, strict=True)
    ]
    return {
        "token_ids": rows,
        "pad_id": inputs.data.pad_id,
        "group_size": group,
        "ignored": list(inputs.layers.ignored),
        "steps": inputs.rounding.learned_steps,
        "seed": inputs.data.seed,
    }


def run_peer(peer: str, merged: Path, place: Path, job: Json, *, threads: int) -> Json:
    """One peer in its own environment; gives what it tells: its file, seconds, threads and versions.

    Raises:
        ValueError: it computed with another number of threads.
    """
    python, script = PEERS[peer]
    place.mkdir()
    (place / "job.json").write_text(json.dumps(job))
    command = [str(python), str(script), str(merged), str(place / "job.json"), str(place / "made")]
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(place.parent / "compiled"),
    }
    # In a folder of its own: peers leave logs where they are started.
    done = subprocess.run(command, env=os.environ | settings, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
    told: Json = json.loads((place / "made/peer.json").read_text())
    if told["threads"] != threads:
        raise ValueError(f"{peer} computed with {told['threads']} threads, not {threads}; the times do not compare")
    return told


def require_same_grid(file: Path, layers: LinearLayers, group: int) -> None:
    """Refuses a compressed-tensors folder that is not what our format holds.

    Raises:
        ValueError: other layers, bits, groups or activations; names the first that differs.
    """
    config = json.loads((file / "config.json").read_text())["quantization_config"]
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    for scheme in config["config_groups"].values():
        found = {key: scheme["weights"][key] for key in wanted}
        if found != wanted or scheme.get("input_activations") is not None:
            raise ValueError(f"{file}: not the grid that was asked for: {found} instead of {wanted}, or activations")
    headers = read_headers(file)
    grids = {
        name.removesuffix(".weight_scale"): tuple(info.shape)
        for name, info in headers.items()
        if name.endswith(".weight_scale")
    }
    expected = {module: (rows, inputs // group) for module, (rows, inputs) in layers.quantized.items()}
    differing = sorted(module for module in grids.keys() | expected.keys() if grids.get(module) != expected.get(module))
    if differing:
        first = differing[0]
        raise ValueError(
            f"{file}: {len(differing)} layers have other grids, the first is {first}: scales of shape "
            f"{grids.get(first)} instead of {expected.get(first)}"
        )
    if any(name.endswith(".weight_g_idx") for name in headers):
        raise ValueError(f"{file}: groups of its own (weight_g_idx); ours are consecutive inputs")


def verdicts(rows: Sequence[Json]) -> list[Json]:
    """Each method of ours beside its peer, for each grid.

    ``kl_share`` is our KL over the peer's: at most 1 = ours is at least as near to the trained model. ``times_as_fast``
    is the peer's seconds over ours.
    """
    by_method = {(row["group"], row["method"]): row for row in rows}
    compared = []
    for group in sorted({row["group"] for row in rows}):
        for own, peer in COMPARED:
            ours, other = by_method.get((group, own)), by_method.get((group, peer))
            if ours is None or other is None:
                continue
            share = ours["kl_to_trained"] / other["kl_to_trained"]
            compared.append(
                {
                    "group": group,
                    "ours": own,
                    "peer": peer,
                    "kl_share": share,
                    "is_at_least_as_good": share <= 1,
                    "times_as_fast": other["seconds"] / ours["seconds"],
                }
            )
    return compared


def circumstances(case: Case, args: argparse.Namespace) -> Json:
    """What the figures were measured with and on."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    recipe = case.recipe
    return {
        "command": shlex.join(["python", "scripts/bench_export_peers.py", *sys.argv[1:]]),
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "environment": describe_environment(),
        "threads": args.threads,
        "load_average_before": os.getloadavg()[0],
        "model": recipe.run.name,
        "test_rows": len(case.test),
        "calibration": recipe.calibration.model_dump(mode="json"),
        "rounding": case.inputs.rounding.model_dump(mode="json"),
    }


def table(result: Json) -> str:
    """The figures as text: a line for each file, then one for each comparison."""
    lines = [f"{'grid':6}{'method':48}{'KL to trained':>15}{'nats/token':>12}{'top-1':>8}{'seconds':>9}"]
    for row in result["rows"]:
        lines.append(
            f"{'g' + str(row['group']) if row['group'] else '':6}{row['method']:48}{row['kl_to_trained']:>15.6f}"
            f"{row['nats_per_token']:>12.4f}{row['top1']:>8.2%}{row['seconds']:>9.1f}"
        )
    for each in result["verdicts"]:
        lines.append(
            f"g{each['group']}: {each['ours']} has {each['kl_share']:.2f} times the KL of {each['peer']} and is "
            f"{each['times_as_fast']:.2f} times as fast"
        )
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=ROOT / "recipes/quickstart.yaml")
    parser.add_argument("--run-name", help="of the run, where it is not the recipe's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--groups", type=int, nargs="+", choices=sorted(FORMATS), default=[64, 32])
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.run_name:
        args.set.append(f"run.name={args.run_name}")
    return args


def require_possible(case: Case, groups: Sequence[int]) -> None:
    """Stops before anything is measured where the model does not fit a grid."""
    unfit = [unfit_in_words(FORMATS[group], case.inputs.layers.quantized) for group in groups]
    if any(unfit):
        raise SystemExit("\n".join(problem for problem in unfit if problem) + "\nGive other --groups.")


def main() -> None:
    args = read_arguments()
    missing = [str(python) for python, _ in PEERS.values() if not python.exists()]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: not there. Make the peers' environments: scripts/peer_environments")
    if torch.cuda.is_available():
        raise SystemExit("both sides are measured on the processor: set CUDA_VISIBLE_DEVICES= (empty)")
    recipe = load(args.recipe, [*args.set, f"run.threads={args.threads}"])
    set_threads(args.threads)
    with tempfile.TemporaryDirectory() as place, trained_case(recipe, Path(place)) as case:
        require_possible(case, args.groups)
        result = circumstances(case, args)
        unrounded = {"group": None, "method": "merged, float32, not rounded", "seconds": 0.0}
        rows = [unrounded | case.measured(case.open(case.merged))]
        for group in args.groups:
            for row in our_rows(case, group, Path(place) / f"ours-{group}"):
                print(f"g{group} {row['method']}: {row['seconds']:.1f} s", flush=True)
                rows.append(row)
            for row in peer_rows(case, group, Path(place) / f"peers-{group}", threads=args.threads):
                print(f"g{group} {row['method']}: {row['seconds']:.1f} s", flush=True)
                rows.append(row)
    result |= {"rows": rows, "verdicts": verdicts([row for row in rows if row["group"]])}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    try:
        main()
    except TrainerError as error:
        raise SystemExit(str(error)) from error
