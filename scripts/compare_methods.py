"""What does each quantization method cost on four models and tasks, and which one does `compare` recommend?

    python scripts/compare_methods.py                 # all cases: half an hour on two idle cores
    python scripts/compare_methods.py quickstart      # one of them

Writes ``scripts/results/compare_<case>.json``. Finished methods are kept in ``runs/``, so that it goes on where it was
interrupted. The cases but the first need the models and data of ``../shared``. WikiText-2 is cut into its paragraphs:
the first eight words are the prompt, and perplexity is ``exp(nats per token)`` of the rest.
"""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts/results"
SHARED = ROOT.parent / "shared"
TEXT = ROOT / "runs/wikitext-2"
PROMPT_WORDS = 8
LEAST_WORDS = 40
ALL_METHODS = (
    "[rtn_int8, rtn_int4, gptq_int4, awq_int4, autoround_int4, obq_int4, nf4, fp4, llm_int8, rtn_w8a8, "
    "smoothquant_w8a8, zeroquant_w8a8, zeroquant_w4a8]"
)
WITH_CACHE = "[rtn_w8a8kv8, rtn_w4a8kv8, rtn_w4a8kv4, llm_qat_w8a8kv8, llm_qat_w4a8kv8, llm_qat_w4a8kv4]"
ON_WIKITEXT = (
    "compare.model=base",
    "data.train=runs/wikitext-2/train.jsonl",
    "data.test=runs/wikitext-2/test.jsonl",
    "data.prompt_column=prompt",
    "data.completion_column=completion",
    "data.split_by=prompt",
    "data.overlong=drop",
    "data.test_rows=80",
    "evaluation.metrics=[]",
    "evaluation.samples=0",
    "evaluation.batch_size=20",
    "calibration.rows=32",
    "compare.distillation_steps=20",
    "rounding.learned_steps=40",
)


@dataclass(frozen=True)
class Case:
    """A recipe and what is changed in it."""

    recipe: str
    changes: tuple[str, ...]
    is_wikitext: bool = False
    run: str = ""
    """Case whose run folder, and so whose trained model, is gone on with; empty = its own."""


CASES = {
    "quickstart": Case(
        "recipes/quickstart.yaml",
        # OBQ takes ten minutes at these widths, on two cores.
        (
            f"compare.methods={ALL_METHODS}",
            "training.max_steps=120",
            "evaluation.generation_rows=60",
            "calibration.rows=48",
        ),
    ),
    "stories260k_e2e": Case(
        "recipes/stories260k_e2e_cpu.yaml",
        # Rows of 172 inputs fit no group: those layers stay in 16 bit at 4 bits.
        (f"compare.methods={ALL_METHODS}", "compare.group_size=32", "compare.allow_16bit_layers=true"),
    ),
    "stories260k_wikitext2": Case(
        "recipes/stories260k_e2e_cpu.yaml",
        (f"compare.methods={ALL_METHODS}", "compare.group_size=32", "compare.allow_16bit_layers=true", *ON_WIKITEXT),
        is_wikitext=True,
    ),
    # The key-value cache too: untreated, and trained on what the model writes by itself.
    "stories260k_llm_qat": Case(
        "recipes/stories260k_e2e_cpu.yaml",
        (f"compare.methods={WITH_CACHE}", "compare.group_size=32", "compare.qat_steps=100"),
        run="stories260k_e2e",
    ),
    "bitllama3m_wikitext2": Case(
        "recipes/stories260k_e2e_cpu.yaml",
        (
            "base_model.path=../shared/models/bitllama-3M",
            "compare.group_size=32",
            *ON_WIKITEXT,
        ),
        is_wikitext=True,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="cases to measure; none = all")
    for name in parser.parse_args().cases or CASES:
        measure(name, CASES[name])


def measure(name: str, case: Case) -> None:
    """Runs ``compare`` on one case and keeps its result."""
    if case.is_wikitext:
        write_wikitext(TEXT)
    run = f"compare_{case.run or name}"
    changes = (f"run.name={run}", *case.changes)
    command = ["-m", "qlora_trainer", "compare", case.recipe, *(part for each in changes for part in ("--set", each))]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    found = json.loads((ROOT / f"runs/{run}/compare.json").read_text(encoding="utf-8"))
    if case.is_wikitext:
        for row in found["rows"]:
            row["perplexity"] = row["nats_per_token"] and math.exp(row["nats_per_token"]["value"])
    result = {
        "commit": _commit(),
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        **found,
    }
    path = RESULTS / f"compare_{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path}: {found['recommendation']['method']}, {found['recommendation']['why']}")


def write_wikitext(folder: Path) -> None:
    """Paragraphs of WikiText-2 as rows: train from the validation text, test from the test text."""
    folder.mkdir(parents=True, exist_ok=True)
    for target, source in (("train", "valid"), ("test", "test")):
        text = (SHARED / f"data/wikitext-2/{source}.txt").read_text(encoding="utf-8")
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in paragraphs(text))
        (folder / f"{target}.jsonl").write_text(rows, encoding="utf-8")


def paragraphs(text: str) -> list[dict[str, Any]]:
    """One row a paragraph of at least forty words, headings left out; the first eight words are the prompt."""
    rows = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= LEAST_WORDS and words[0] != "=":
            # 80 words are some 250 tokens of a vocabulary of 512.
            words = words[:80]
            rows.append({"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " ".join(words[PROMPT_WORDS:])})
    return rows


def _commit() -> str:
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
