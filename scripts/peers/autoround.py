"""Learned rounding as AutoRound does it: the peer of our rung 3. Started by ``bench_export_peers.py``.

    python scripts/peers/autoround.py MODEL JOB.json FILE          # in .venv-auto-round

Nothing of this package is imported here: what runs is what a user of AutoRound writes. The scheme is the one that our
format has (symmetric 4-bit integers, groups) and the number of iterations is ours; rates, batches and the rest are its
own.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound, SignRoundConfig
from transformers import AutoModelForCausalLM, AutoTokenizer


def batches_of(rows: list[list[int]], pad_id: int) -> list[dict[str, torch.Tensor]]:
    """One row a batch, all of one length, since AutoRound stacks them and skips those shorter than ``seqlen``.

    It never learns from the last position, so that one is padding in every row.
    """
    length = max(map(len, rows)) + 1
    return [
        {
            "input_ids": torch.tensor([row + [pad_id] * (length - len(row))]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row))]),
        }
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the merged model")
    parser.add_argument("job", type=Path, help="JSON file: token_ids, pad_id, group_size, steps, amp, seed")
    parser.add_argument("file", type=Path, help="folder to make: the file in compressed-tensors format, and peer.json")
    args = parser.parse_args()
    job: dict[str, Any] = json.loads(args.job.read_text())
    batches = batches_of(job["token_ids"], job["pad_id"])
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(args.model),
        scheme="W4A16",
        alg_configs=SignRoundConfig(iters=job["steps"], sym=True, group_size=job["group_size"]),
        nsamples=len(batches),
        seqlen=batches[0]["input_ids"].shape[1],
        dataset=batches,
        amp=job["amp"],
        seed=job["seed"],
        device_map="cpu",
    )
    began = time.perf_counter()
    # It packs and writes each block as soon as that is rounded, so that writing cannot be left out of the time.
    _, folder = rounding.quantize_and_save(str(args.file), format="llm_compressor")
    seconds = time.perf_counter() - began
    names = ("auto-round", "compressed-tensors", "transformers", "torch")
    told = {
        # It makes a folder of its own inside the one that it is given.
        "file": str(folder if isinstance(folder, str) else folder[0]),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in names},
    }
    (args.file / "peer.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
