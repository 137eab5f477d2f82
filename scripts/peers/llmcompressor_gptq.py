"""GPTQ as llm-compressor does it: the peer of our rung 1. Started by ``bench_export_peers.py`` in .venv-llmcompressor.

    python scripts/peers/llmcompressor_gptq.py MODEL JOB.json FILE

Nothing of this package is imported here: what runs is what a user of llm-compressor writes. The scheme is the one that
our format has (symmetric 4-bit integers, groups); damping, order of columns and sweep over the blocks are its own.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def rounded(model: torch.nn.Module, tokenizer: Any, job: dict[str, Any]) -> float:
    """Rounds the model in place; gives the seconds that it took."""
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=job["group_size"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    rows = job["token_ids"]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    began = time.perf_counter()
    # One row in a batch, as it has by default: rows are of different lengths, and it would learn from padding too.
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=job["ignored"]),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
    )
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the merged model")
    parser.add_argument("job", type=Path, help="JSON file: token_ids, group_size, ignored")
    parser.add_argument("file", type=Path, help="folder to make: the file in compressed-tensors format, and peer.json")
    args = parser.parse_args()
    job = json.loads(args.job.read_text())
    torch.manual_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    seconds = rounded(model, tokenizer, job)
    model.save_pretrained(args.file, save_compressed=True)
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    told = {
        "file": str(args.file),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in names},
    }
    (args.file / "peer.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
