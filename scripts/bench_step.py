"""How long does one optimizer step take here, and how much memory, against TRL + PEFT + bitsandbytes?

Both sides train the same Llama with random weights on the same rows of gsm8k, on the processor, with as many threads.
They take turns, and each turn is a process of its own: ours in ``bench_step_turn.py``, on each rung of its ladder, the
peer's in ``bench_peer.py``, with and without gradient checkpointing.

    python scripts/bench_step.py                  # needs: pip install -e '.[bench]'
    python scripts/bench_step.py --device cuda    # a 7B shape on the first GPU; peaks are those of torch's allocator

Prints a table and writes ``scripts/results/bench_step.json`` (``bench_step_cuda.json``). Every batch has one row that
fills the window, or nearly, and others as they come: all steps multiply matrices of about one size, and padding has its
usual share. The peer pads a batch to its longest row. A comparison of different work is refused: every turn must see
the same tokens and find the same losses and gradient norms, within ``TOLERANCES``.
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
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from bench_step_turn import RUNGS
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as library_logging

from qlora_trainer.data.encode import EncodedRow, encode_chat
from qlora_trainer.data.examples import prompt_completion_examples
from qlora_trainer.data.sources import read_rows
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.runtime.environment import describe_environment
from qlora_trainer.runtime.weight_files import copy_companions

ROOT: Final = Path(__file__).parents[1]
OURS: Final = [sys.executable, str(Path(__file__).with_name("bench_step_turn.py"))]
PEERS: Final = [sys.executable, str(Path(__file__).with_name("bench_peer.py"))]
TURNS: Final = {
    "peer": PEERS,
    "peer_checkpointed": [*PEERS, "--gradient-checkpointing"],
    **{rung: [*OURS, "--rung", rung] for rung in RUNGS},
}
"""Command of each turn, less its folder and result. The peers come first: the others are compared with them."""
RESULTS: Final = {
    "cpu": ROOT / "scripts/results/bench_step.json",
    "cuda": ROOT / "scripts/results/bench_step_cuda.json",
}
WARM_UP_STEPS: Final = 1
TOLERANCES: Final = {"nats_before_training": 1e-3, "nats_while_training": 5e-3, "gradient_norm": 0.01}
"""By how much a turn may differ from the peer's in a step: nats per label token, and a share of the norm.

Before the first update only rounding tells them apart; 1.4e-4 nats were measured, between padded and packed rows, whose
matrix products bfloat16 rounds in another order. The peer gives its gradient norm in bfloat16.
"""
QUIET_SPREAD: Final = 0.15
"""Step times that differ by more than this share of their median are pointed out: the machine was not quiet."""
TOKEN_KINDS: Final = ("tokens", "label_tokens")

Json = dict[str, Any]

SHAPE: Final = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
}
CUDA_SHAPE: Final = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11_008,
    "vocab_size": 32_000,
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
    config = LlamaConfig(**shape_of(args), tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "model")
    copy_companions(args.tokenizer, folder / "model")
    tokenizer = TextTokenizer.load(args.tokenizer)
    examples = prompt_completion_examples(
        read_rows(args.data), prompt_column="question", completion_column="answer", group_column=None
    )
    rows = choose_rows(encode_chat(examples, tokenizer), steps=WARM_UP_STEPS + args.steps)
    tokens = {"token_ids": [row.token_ids for row in rows], "labels": [row.labels for row in rows]}
    job = JOB | {"pad_id": tokenizer.pad_id, "device": args.device} | tokens
    (folder / "job.json").write_text(json.dumps(job))
    return job


def shape_of(args: argparse.Namespace) -> dict[str, int]:
    """Sizes of the model that is trained."""
    if args.quick:
        return QUICK_SHAPE
    return CUDA_SHAPE if args.device == "cuda" else SHAPE


def choose_rows(rows: list[EncodedRow], *, steps: int) -> list[EncodedRow]:
    """Rows of all batches, one behind the other: one of the longest of the window, then others in a seeded order."""
    fitting = sorted((row for row in rows if len(row.token_ids) <= JOB["window"]), key=lambda row: -len(row.token_ids))
    others, per_batch = fitting[steps:], JOB["micro_batch_size"] - 1
    random.Random(JOB["seed"]).shuffle(others)
    return [row for n in range(steps) for row in (fitting[n], *others[n * per_batch : (n + 1) * per_batch])]


def take_turn(name: str, folder: Path, args: argparse.Namespace) -> Json:
    """One run of one turn in a process of its own."""
    result = folder / f"{name}.json"
    command = [*TURNS[name][:2], str(folder), str(result), *TURNS[name][2:]]
    settings = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    if args.device == "cpu":
        settings["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
    turn: Json = json.loads(result.read_text())
    return turn


def figures(turns: list[Json]) -> Json:
    """What one side needed on one rung, over the measured steps of all its turns."""
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
    """Every turn's figures, and how those on our rungs compare with the peer's."""
    found = {name: figures(taken) for name, taken in turns.items()}
    for rung in (name for name in turns if name in RUNGS):
        own = found[rung]
        apart = [differences(*pair) for pair in zip(turns[rung], turns["peer"], strict=True)]
        own["largest_differences"] = {name: max(one[name] for one in apart) for name in TOLERANCES}
        for peer in ("peer", "peer_checkpointed"):
            own[f"times_as_fast_as_{peer}"] = found[peer]["step_seconds"] / own["step_seconds"]
            own[f"share_of_memory_of_{peer}"] = own["peak_bytes"] / found[peer]["peak_bytes"]
        own["share_of_matrix_rate"] = share_of_matrix_rate(turns[rung])
    return found


def share_of_matrix_rate(turns: list[Json]) -> float:
    """Matrix work of a step over what the processor could have multiplied in that time, measured in the same turn."""
    return statistics.median(
        step["matrix_flops"] / (step["seconds"] * turn["matrix_flops_per_second"])
        for turn in turns
        for step in turn["steps"][WARM_UP_STEPS:]
    )


def measure(folder: Path, args: argparse.Namespace) -> Json:
    """All turns, ``args.rounds`` times over."""
    turns: dict[str, list[Json]] = {name: [] for name in TURNS}
    for _ in range(args.rounds):
        for name, taken in turns.items():
            turn = take_turn(name, folder, args)
            print(f"{name}: {[round(step['seconds'], 2) for step in turn['steps']]} s", flush=True)
            taken.append(turn)
            if name in RUNGS:
                # Now already, because the whole takes minutes.
                differences(turn, turns["peer"][-1])
    compared = compare(turns)
    largest_spread = max(found["spread"] for found in compared.values())
    return {"was_quiet": largest_spread <= QUIET_SPREAD, "largest_spread": largest_spread, "turns": compared}


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
        "device": args.device,
        "shape": shape_of(args),
        "job": JOB | {"row_tokens": lengths},
        "peer": PEER,
        "does": {
            "peer": "TRL + PEFT + bitsandbytes",
            "peer_checkpointed": "the same with gradient checkpointing",
            **{name: rung.does for name, rung in RUNGS.items()},
        },
    }


def table(result: Json) -> str:
    """The figures as text, one line a turn."""
    lines = [f"{'turn':18}{'s/step':>8}{'spread':>8}{'label tokens/s':>16}{'peak GiB':>10}{'times peer':>18}"]
    for name, own in result["turns"].items():
        numbers = f"{own['step_seconds']:>8.2f}{own['spread']:>8.1%}{own['label_tokens_per_second']:>16.1f}"
        line = f"{name:18}{numbers}{own['peak_bytes'] / 2**30:>10.2f}"
        if name in RUNGS:
            times = [own[f"times_as_fast_as_{peer}"] for peer in ("peer", "peer_checkpointed")]
            line += f"{times[0]:>9.2f}{times[1]:>9.2f}, {own['share_of_matrix_rate']:.0%} of the matrix rate"
        lines.append(line)
    if not result["was_quiet"]:
        lines.append(f"The machine was not quiet: step times spread by up to {result['largest_spread']:.0%}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/gsm8k/train.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "recipes/quickstart/base", help="its folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=1, help="times that every turn is taken")
    parser.add_argument("--steps", type=int, default=3, help="measured steps in a turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="default: the committed result of that device")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script; needs --out")
    args = parser.parse_args()
    if args.quick and args.out is None:
        parser.error("--quick measures a tiny model: give another file than the committed result with --out")
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("the peer needs trl: pip install -c constraints.txt -e '.[bench]'")
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), args)
        result = circumstances(job, args) | measure(Path(folder), args)
    out = args.out or RESULTS[args.device]
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
