"""How to load each exported file: text to copy."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.export_formats import lora_rank_of_vllm
from qlora_trainer.records import ExportFigures

SERVED_BY_VLLM = ("merged_16bit", "bitsandbytes_nf4", "compressed_tensors_", "gptq_")
"""Formats, or their beginnings, that vLLM documents to load from a folder as it stands."""

UNTRIED = " (not started by this run)"


@dataclass(frozen=True)
class Snippet:
    """Text to copy, and what it is for."""

    title: str
    text: str


def snippets(
    export: ExportFigures, *, quantized_base: str, served_rank: int = 0, unpacks_base: bool = False
) -> tuple[Snippet, ...]:
    """How to load one export with transformers, PEFT, vLLM or llama.cpp; a command that serves it stands last.

    Args:
        export: the file set.
        quantized_base: folder of the base that a ``peft_adapter`` was trained on.
        served_rank: rank of the adapter where vLLM can serve it beside its base, else 0.
        unpacks_base: whether that base holds integers that PEFT knows nothing of.
    """
    if export.format == "peft_adapter":
        return tuple(_adapter(export.path, quantized_base, served_rank, unpacks_base=unpacks_base))
    if export.format.startswith("gguf_"):
        return tuple(_llama_cpp(export))
    needs = " (needs: pip install gptqmodel optimum)" if export.format.startswith("gptq_") else ""
    found = [Snippet(f"transformers{needs}", _transformers(export.path))]
    if export.format.startswith(SERVED_BY_VLLM):
        found.append(Snippet(f"vLLM{UNTRIED}", f"vllm serve {shlex.quote(export.path)}"))
    return tuple(found)


def _adapter(path: str, quantized_base: str, served_rank: int, *, unpacks_base: bool) -> Iterator[Snippet]:
    """PEFT puts an adapter onto its base; vLLM serves both side by side, with room for the rank that it is told."""
    yield Snippet("PEFT", _peft(path, quantized_base, unpacks_base=unpacks_base))
    rank = lora_rank_of_vllm(served_rank)
    if served_rank and rank:
        modules = shlex.quote(f"adapter={path}")
        command = (
            f"vllm serve {shlex.quote(quantized_base)} --enable-lora --max-lora-rank {rank} --lora-modules {modules}"
        )
        yield Snippet(f"vLLM{UNTRIED}", command)


def _llama_cpp(export: ExportFigures) -> Iterator[Snippet]:
    """A GGUF file is named; a folder is nothing that llama.cpp opens."""
    named = next((name for name in sorted(export.sha256) if name.endswith(".gguf")), "")
    file = str(Path(export.path) / named)
    title = "llama-cpp-python (needs: pip install llama-cpp-python)"
    if export.format == "gguf_adapter":
        base = '# A GGUF file of the base that the adapter was trained on.\nbase = "base.gguf"\n'
        yield Snippet(title, _llama(f"model_path=base, lora_path={json.dumps(file)}", before=base))
        yield Snippet(f"llama.cpp{UNTRIED}", f"llama-server --model base.gguf --lora {shlex.quote(file)}")
        return
    yield Snippet(title, _llama(f"model_path={json.dumps(file)}"))
    yield Snippet(f"llama.cpp{UNTRIED}", f"llama-server --model {shlex.quote(file)}")


def _llama(arguments: str, *, before: str = "") -> str:
    return f"from llama_cpp import Llama\n\n{before}model = Llama({arguments})"


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


def _peft(path: str, quantized_base: str, *, unpacks_base: bool) -> str:
    # The library's switch for this (CompressedTensorsConfig) would round the weights to bfloat16, whatever the type.
    unpacked = ("model.hf_quantizer.compressor.decompress_model(model)",) if unpacks_base else ()
    return "\n".join(
        (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = {json.dumps(quantized_base)}",
            'model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")',
            *unpacked,
            f"model = PeftModel.from_pretrained(model, {json.dumps(path)})",
            "tokenizer = AutoTokenizer.from_pretrained(base)",
        )
    )
