"""How long does one optimizer step take here, and how much memory, against TRL + PEFT + bitsandbytes?

Both sides train the same Llama with random weights on the same rows of gsm8k, on the processor, with as many threads.
They take turns, and each turn is a process of its own: ours in this file, the peer's in ``bench_peer.py``.

    python scripts/bench_step.py          # needs: pip install -e '.[bench]'

Prints a table and writes ``scripts/results/bench_step.json``. Every batch has one row that fills the window, or nearly,
and others as they come: all steps multiply matrices of about one size, and padding has its usual share. Both sides
pad a batch to its longest row. A comparison of different work is refused: the sides must see the same tokens and find
the same losses and gradient norms, within ``TOLERANCES``.
"""

import argparse
import importlib.util
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as library_logging

from qlora_trainer.data.batches import collate
from qlora_trainer.data.encode import EncodedRow, encode_chat
from qlora_trainer.data.examples import prompt_completion_examples
from qlora_trainer.data.sources import read_rows
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.recipe import Lora, Quantization
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.runners.causal_lm import set_checkpointing
from qlora_trainer.runtime import bnb
from qlora_trainer.runtime.device import World
from qlora_trainer.runtime.environment import describe_environment
from qlora_trainer.runtime.memory import PeakMemory
from qlora_trainer.runtime.weight_files import copy_companions
from qlora_trainer.stages.adapt import adapt, choose_layers
from qlora_trainer.stages.quantize import quantize
from qlora_trainer.stages.train.step import optimizer_step

ROOT: Final = Path(__file__).parents[1]
COMMANDS: Final = {
    "ours": [sys.executable, __file__, "--our-turn"],
    "peer": [sys.executable, str(Path(__file__).with_name("bench_peer.py"))],
}
RESULT: Final = ROOT / "scripts/results/bench_step.json"
WARM_UP_STEPS: Final = 1
TOLERANCES: Final = {"nats_before_training": 1e-4, "nats_while_training": 5e-3, "gradient_norm": 0.01}
"""By how much the sides may differ in a step: nats per label token, and a share of the norm.

Before the first update only rounding tells the sides apart; 1e-5 nats were measured. After it the peer's adapters are
rounded to bfloat16 and ours are not. After two steps, in which the loss fell by 0.29 nats, the sides were 2.2e-3 apart;
with our adapters rounded as well, 1.0e-3. The peer gives its gradient norm in bfloat16.
"""
QUIET_SPREAD: Final = 0.15
"""Step times that differ by more than this share of their median are pointed out: the machine was not quiet."""
CONFIGURATIONS: Final = {"with_checkpointing": True, "without_checkpointing": False}
TOKEN_KINDS: Final = ("padded_tokens", "tokens", "label_tokens")

Json = dict[str, Any]

SHAPE: Final = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
}
QUICK_SHAPE: Final = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 4096,
}
JOB: Final[Json] = {
    "window": 512,
    "micro_batch_size": 4,
    "rank": 16,
    "alpha": 32.0,
    "learning_rate": 2e-4,
    "max_gradient_norm": 0.3,
    "optimizer": "paged_adamw_8bit",
    "seed": 0,
}
PEER: Final = (
    "trl.SFTTrainer on a transformers model loaded with BitsAndBytesConfig (NF4, double quantization, bfloat16), "
    "LoraConfig on all linear layers, dataset of input_ids and labels read in order; all else as TRL has it: bfloat16 "
    "autocast, bfloat16 adapters, sdpa with a padding mask, non-reentrant checkpointing, loss 'nll' in chunks (on a "
    "processor over all positions, not only the labelled ones)"
)


def prepare(folder: Path, args: argparse.Namespace) -> Json:
    """Writes what both sides read, ``model/`` (bfloat16, random weights, tokenizer) and ``job.json``; gives the job."""
    library_logging.disable_progress_bar()
    torch.manual_seed(JOB["seed"])
    config = LlamaConfig(**(QUICK_SHAPE if args.quick else SHAPE), tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "model")
    copy_companions(args.tokenizer, folder / "model")
    tokenizer = TextTokenizer.load(args.tokenizer)
    examples = prompt_completion_examples(
        read_rows(args.data), prompt_column="question", completion_column="answer", group_column=None
    )
    rows = choose_rows(encode_chat(examples, tokenizer), steps=WARM_UP_STEPS + args.steps)
    tokens = {"token_ids": [row.token_ids for row in rows], "labels": [row.labels for row in rows]}
    job = JOB | {"pad_id": tokenizer.pad_id} | tokens
    (folder / "job.json").write_text(json.dumps(job))
    return job


def choose_rows(rows: list[EncodedRow], *, steps: int) -> list[EncodedRow]:
    """Rows of all batches, one behind the other: one of the longest of the window, then others in a seeded order."""
    fitting = sorted((row for row in rows if len(row.token_ids) <= JOB["window"]), key=lambda row: -len(row.token_ids))
    others, per_batch = fitting[steps:], JOB["micro_batch_size"] - 1
    random.Random(JOB["seed"]).shuffle(others)
    return [row for n in range(steps) for row in (fitting[n], *others[n * per_batch : (n + 1) * per_batch])]


def run_ours(folder: Path, *, gradient_checkpointing: bool) -> Json:
    """Our side, by the functions of which the stages are made."""
    job = json.loads((folder / "job.json").read_text())
    with PeakMemory() as memory:
        model = adapted_model(folder, job)
        set_checkpointing(model, wanted=gradient_checkpointing)
        steps = train(model, job)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "threads": torch.get_num_threads(),
        "trainable_parameters": trainable,
        "peak_bytes": memory.peak_bytes(),
        "steps": steps,
    }


def adapted_model(folder: Path, job: Json) -> nn.Module:
    """The folder's model in NF4 with double quantization and adapters on all linear layers; quantizes it once."""
    lora = Lora(rank=job["rank"], alpha=job["alpha"])
    settings = Quantization(cache_folder=str(folder / "quantized"))
    base = BaseCheckpoint(folder=folder / "model", parameters=0, bytes=0)
    layers = choose_layers(base, lora)
    quantized = quantize(base, settings, lora=lora, layers=layers, content_key="random weights")
    model: nn.Module = adapt(quantized, lora, layers=layers, compute_dtype=settings.compute_dtype, seed=job["seed"])
    return model.train()


def train(model: nn.Module, job: Json) -> list[Json]:
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
    steps = []
    for start in range(0, len(rows), job["micro_batch_size"]):
        began = time.perf_counter(), time.process_time()
        batch = collate(rows, range(start, start + job["micro_batch_size"]), job["pad_id"])
        result = optimizer_step(
            model,
            [batch],
            optimizer,
            max_gradient_norm=job["max_gradient_norm"],
            world=World.current(),
            name_rows=str,
        )
        steps.append(
            {
                "seconds": time.perf_counter() - began[0],
                "cpu_seconds": time.process_time() - began[1],
                "padded_tokens": batch.token_ids.numel(),
                "tokens": sum(len(rows[index].token_ids) for index in batch.row_indexes),
                "label_tokens": result.label_tokens,
                "token_id_sum": int(batch.token_ids.sum()),
                "nats_per_token": float(result.nats) / result.label_tokens,
                "gradient_norm": result.gradient_norm,
            }
        )
    return steps


def take_turn(side: str, folder: Path, *, gradient_checkpointing: bool, threads: int) -> Json:
    """One run of one side in a process of its own."""
    result = folder / f"{side}.json"
    command = [*COMMANDS[side], str(folder), str(result), *["--gradient-checkpointing"] * gradient_checkpointing]
    settings = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
    turn: Json = json.loads(result.read_text())
    return turn


def figures(turns: list[Json]) -> Json:
    """What one side needed in one configuration, over the measured steps of all its turns."""
    measured = [step for turn in turns for step in turn["steps"][WARM_UP_STEPS:]]
    seconds = [step["seconds"] for step in measured]
    step_seconds = statistics.median(seconds)
    rates = {
        f"{kind}_per_second": statistics.mean(step[kind] for step in measured) / step_seconds for kind in TOKEN_KINDS
    }
    return {
        "step_seconds": step_seconds,
        "spread": (max(seconds) - min(seconds)) / step_seconds,
        "cores_busy": statistics.median(step["cpu_seconds"] / step["seconds"] for step in measured),
        **rates,
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
        "turns": turns,
    }


def differences(ours: Json, peer: Json) -> dict[str, float]:
    """The largest differences of losses and gradient norms in one turn of each side.

    Raises:
        ValueError: in some step the sides saw other tokens, or differ by more than rounding explains.
    """
    largest = dict.fromkeys(TOLERANCES, 0.0)
    for number, (own, other) in enumerate(zip(ours["steps"], peer["steps"], strict=True)):
        nats = "nats_while_training" if number else "nats_before_training"
        apart = {
            nats: abs(own["nats_per_token"] - other["nats_per_token"]),
            "gradient_norm": abs(own["gradient_norm"] / other["gradient_norm"] - 1),
        }
        unequal = [kind for kind in (*TOKEN_KINDS, "token_id_sum") if own[kind] != other[kind]]
        # Not "difference > tolerance", which is false where a side has NaN.
        unequal += [name for name, difference in apart.items() if not difference <= TOLERANCES[name]]
        if unequal:
            raise ValueError(f"the sides did not do the same work, see {', '.join(unequal)}: ours {own}, peer {other}")
        largest |= {name: max(largest[name], difference) for name, difference in apart.items()}
    return largest


def compare(turns: dict[str, list[Json]]) -> Json:
    """Both sides' figures in one configuration, and how they compare."""
    sides = {side: figures(taken) for side, taken in turns.items()}
    ours, peer = sides["ours"], sides["peer"]
    apart = [differences(*pair) for pair in zip(turns["ours"], turns["peer"], strict=True)]
    return {
        **sides,
        "largest_differences": {name: max(found[name] for found in apart) for name in TOLERANCES},
        "times_as_fast": peer["step_seconds"] / ours["step_seconds"],
        "share_of_peer_memory": ours["peak_bytes"] / peer["peak_bytes"],
    }


def measure(folder: Path, args: argparse.Namespace) -> Json:
    """Both sides in turns, with and without gradient checkpointing, ``args.rounds`` times over."""
    turns: dict[bool, dict[str, list[Json]]] = {wanted: {side: [] for side in COMMANDS} for wanted in (True, False)}
    for _, wanted, side in product(range(args.rounds), turns, COMMANDS):
        turn = take_turn(side, folder, gradient_checkpointing=wanted, threads=args.threads)
        print(f"{side}, checkpointing {wanted}: {[round(step['seconds'], 2) for step in turn['steps']]} s", flush=True)
        turns[wanted][side].append(turn)
        if side == "peer":
            # Now already, because the whole takes minutes.
            differences(turns[wanted]["ours"][-1], turn)
    result = {configuration: compare(turns[wanted]) for configuration, wanted in CONFIGURATIONS.items()}
    largest_spread = max(compared[side]["spread"] for compared in result.values() for side in COMMANDS)
    return {"was_quiet": largest_spread <= QUIET_SPREAD, "largest_spread": largest_spread} | result


def circumstances(job: Json, args: argparse.Namespace) -> Json:
    """What the figures were measured with and on."""
    lengths = [len(token_ids) for token_ids in job["token_ids"]]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": shlex.join(["python", "scripts/bench_step.py", *sys.argv[1:]]),
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "environment": describe_environment() | {name: version(name) for name in ("trl", "accelerate")},
        "threads": args.threads,
        "load_average_before": os.getloadavg()[0],
        "repeats": {"rounds": args.rounds, "warm_up_steps": WARM_UP_STEPS, "steps": args.steps},
        "shape": QUICK_SHAPE if args.quick else SHAPE,
        "job": JOB | {"row_tokens": lengths},
        "peer": PEER,
    }


def table(result: Json) -> str:
    """The figures as text, one line for each side and configuration."""
    lines = [
        f"{'side':6}{'checkpointing':>14}{'s/step':>8}{'spread':>8}{'peak GiB':>10}"
        + "".join(f"{kind + '/s':>16}" for kind in TOKEN_KINDS)
    ]
    for configuration, wanted in CONFIGURATIONS.items():
        compared = result[configuration]
        for side in COMMANDS:
            own = compared[side]
            rates = "".join(f"{own[f'{kind}_per_second']:>16.1f}" for kind in TOKEN_KINDS)
            numbers = f"{own['step_seconds']:>8.2f}{own['spread']:>8.1%}{own['peak_bytes'] / 2**30:>10.2f}"
            lines.append(f"{side:6}{'on' if wanted else 'off':>14}{numbers}{rates}")
        apart = ", ".join(f"{name} {value:.1e}" for name, value in compared["largest_differences"].items())
        lines.append(
            f"    ours is {compared['times_as_fast']:.2f} times as fast, in {compared['share_of_peer_memory']:.0%} of "
            f"the memory; the sides differ by at most: {apart}"
        )
    if not result["was_quiet"]:
        lines.append(f"The machine was not quiet: step times spread by up to {result['largest_spread']:.0%}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--our-turn", nargs=2, type=Path, metavar=("FOLDER", "RESULT"), help="what a turn of ours runs")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="with --our-turn")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/gsm8k/train.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "recipes/quickstart/base", help="its folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side in each configuration")
    parser.add_argument("--steps", type=int, default=3, help="measured steps in a turn")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script; needs --out")
    args = parser.parse_args()
    if args.our_turn:
        folder, result = args.our_turn
        turn = run_ours(folder, gradient_checkpointing=args.gradient_checkpointing)
        result.write_text(json.dumps(turn))
        return
    if args.quick and args.out == RESULT:
        parser.error("--quick measures a tiny model: give another file than the committed result with --out")
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("the peer needs trl: pip install -c constraints.txt -e '.[bench]'")
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), args)
        result = circumstances(job, args) | measure(Path(folder), args)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
