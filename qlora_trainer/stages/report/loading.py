"""How to load each exported file: text to copy."""

import json
import shlex
from dataclasses import dataclass

from qlora_trainer.records import ExportFigures

SERVED_BY_VLLM = ("merged_16bit", "bitsandbytes_nf4", "compressed_tensors_")
"""Formats, or their beginnings, that vLLM documents to load from a folder as it stands."""


@dataclass(frozen=True)
class Snippet:
    """Text to copy, and what it is for."""

    title: str
    text: str


def snippets(export: ExportFigures, *, quantized_base: str) -> tuple[Snippet, ...]:
    """How to load one export with transformers, PEFT or vLLM.

    Args:
        export: the file set.
        quantized_base: folder of the base that a ``peft_adapter`` was trained on.
    """
    if export.format == "peft_adapter":
        return (Snippet("PEFT", _peft(export.path, quantized_base)),)
    found = [Snippet("transformers", _transformers(export.path))]
    if export.format.startswith(SERVED_BY_VLLM):
        found.append(Snippet("vLLM (not started by this run)", f"vllm serve {shlex.quote(export.path)}"))
    return tuple(found)


def _transformers(path: str) -> str:
    return "\n".join(
        (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"folder = {json.dumps(path)}",
            'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        )
    )


def _peft(path: str, quantized_base: str) -> str:
    return "\n".join(
        (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = {json.dumps(quantized_base)}",
            'model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")',
            f"model = PeftModel.from_pretrained(model, {json.dumps(path)})",
            "tokenizer = AutoTokenizer.from_pretrained(base)",
        )
    )
