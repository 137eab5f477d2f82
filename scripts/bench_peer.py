"""How long does one optimizer step of TRL's SFTTrainer with PEFT and bitsandbytes take, and how much memory?

The peer's side of ``bench_step.py``, which prepares the folder and starts this in a process of its own. Nothing of
this package is imported here, so that the memory is the peer's alone.

    python scripts/bench_peer.py FOLDER RESULT.json [--gradient-checkpointing]

What runs is what a user of TRL writes: a model loaded with a ``BitsAndBytesConfig`` (NF4, double quantization,
bfloat16), a ``LoraConfig`` on all linear layers, ``SFTTrainer`` with its own defaults for loss, collator, attention and
adapter type (it trains bfloat16 adapters). The dataset has the columns ``input_ids`` and ``labels``, which SFTTrainer
takes as they are, and is read in order, so that both sides see the same tokens.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Stopwatch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Times each step from after its batch was put together to after the optimizer has stepped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.began = (0.0, 0.0)

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Starts the clocks."""
        self.began = (time.perf_counter(), time.process_time())

    def on_step_end(self, *_: object, **__: object) -> None:
        """Stops the clocks."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        self.steps.append({"seconds": seconds, "cpu_seconds": cpu_seconds})


class CountingTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped
    """SFTTrainer that notes what each batch holds, as proof that both sides do the same work."""

    batches: list[dict[str, int]]

    def training_step(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *rest: Any, **named: Any) -> Any:
        """One micro-batch, noted and handed on."""
        token_ids, labels = inputs["input_ids"], inputs["labels"]
        self.batches.append(
            {
                "computed_tokens": token_ids.numel(),
                "tokens": int(inputs["attention_mask"].sum()),
                "label_tokens": int((labels[:, 1:] != -100).sum()),
                "token_id_sum": int((token_ids * inputs["attention_mask"]).sum()),
            }
        )
        return super().training_step(model, inputs, *rest, **named)


def make_trainer(folder: Path, job: dict[str, Any], *, gradient_checkpointing: bool) -> CountingTrainer:
    """The trainer over the folder's model and the job's rows."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    trainer = CountingTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=quantization, dtype=torch.bfloat16),
        args=SFTConfig(
            output_dir=str(folder / "peer"),
            per_device_train_batch_size=job["micro_batch_size"],
            max_steps=len(job["token_ids"]) // job["micro_batch_size"],
            max_length=job["window"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            max_grad_norm=job["max_gradient_norm"],
            optim=job["optimizer"],
            gradient_checkpointing=gradient_checkpointing,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=job["seed"],
            # Asked for by transformers before it takes bfloat16 on a processor; bfloat16 itself is TRL's default.
            use_cpu=job["device"] == "cpu",
        ),
        train_dataset=Dataset.from_dict({"input_ids": job["token_ids"], "labels": job["labels"]}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(
            r=job["rank"], lora_alpha=job["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.batches = []
    return trainer


def _peak_bytes() -> int | None:
    """Largest memory: torch's on a GPU, else resident.

    Not ru_maxrss: that one also holds what the parent process had before this program was loaded.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of bench_step.py: model/ and job.json")
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    job = json.loads((args.folder / "job.json").read_text())
    trainer = make_trainer(args.folder, job, gradient_checkpointing=args.gradient_checkpointing)
    stopwatch = Stopwatch()
    trainer.add_callback(stopwatch)
    trainer.train()
    logged = [
        {"nats_per_token": entry["loss"], "gradient_norm": entry["grad_norm"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    steps = zip(stopwatch.steps, trainer.batches, logged, strict=True)
    result = {
        "threads": torch.get_num_threads(),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "peak_bytes": _peak_bytes(),
        "steps": [times | batch | log for times, batch, log in steps],
    }
    args.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
