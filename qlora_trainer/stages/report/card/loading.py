"""How the file of a card is loaded: text to copy."""

import json
import shlex
from collections.abc import Iterator

from qlora_trainer.export_formats import lora_rank_of_vllm
from qlora_trainer.stages.report.card.subject import CardSubject

Snippet = tuple[str, str, str]
"""Title, language, text."""


def snippets(subject: CardSubject) -> Iterator[Snippet]:
    """Commands for transformers, PEFT, vLLM and llama.cpp, as far as they load this file."""
    if subject.format == "peft_adapter":
        yield from _adapter(subject)
    elif subject.format == "gguf_adapter":
        yield _llama_cpp(subject, "llama-server -m BASE.gguf --lora {file}", "BASE.gguf: a GGUF file of the base")
    elif subject.format.startswith("gguf_"):
        yield _llama_cpp(subject, "llama-server -m {file}", "")
    else:
        needs = " (needs: pip install gptqmodel optimum)" if subject.format.startswith("gptq_") else ""
        yield f"transformers{needs}", "python", _transformers(json.dumps(subject.place))
        if subject.format != "bitsandbytes_int8":
            yield "vLLM (not started by this run)", "sh", f"vllm serve {shlex.quote(subject.place)}"


def base_name(subject: CardSubject) -> str:
    """What a command calls the base: its name on the hub, or a placeholder for a base that has none."""
    return subject.base.hub_name or "PATH-OR-NAME-OF-THE-BASE"


def _transformers(place: str) -> str:
    return "\n".join(
        (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained({place}, dtype="auto")',
            f"tokenizer = AutoTokenizer.from_pretrained({place})",
        )
    )


def _adapter(subject: CardSubject) -> Iterator[Snippet]:
    yield _peft(subject)
    rank = lora_rank_of_vllm(subject.recipe.lora.rank)
    if rank is not None and not subject.recipe.lora.use_dora:
        name = subject.recipe.run.name
        served = ["vllm", "serve", base_name(subject), "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules"]
        yield "vLLM (not started by this run)", "sh", shlex.join([*served, f"{name}={subject.place}"])


def _peft(subject: CardSubject) -> Snippet:
    """The adapter on the base as training had it; on the 16-bit base where no library makes that one."""
    base, place = json.dumps(base_name(subject)), json.dumps(subject.place)
    dtype, settings = f"torch.{subject.recipe.quantization.compute_dtype}", _base_settings(subject)
    title, names, loaded = "PEFT, on the 16-bit base", "", f"dtype={dtype}"
    lines: tuple[str, ...] = ()
    if settings is not None:
        title, names = "PEFT, on the base as it was quantized for training", ", BitsAndBytesConfig"
        lines, loaded = (f"settings = BitsAndBytesConfig({settings})",), "quantization_config=settings"
    parts = (
        "import torch",
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{names}",
        "",
        *lines,
        f"base = AutoModelForCausalLM.from_pretrained({base}, {loaded})",
        f"model = PeftModel.from_pretrained(base, {place})",
        f"tokenizer = AutoTokenizer.from_pretrained({base})",
    )
    return title, "python", "\n".join(parts)


def _base_settings(subject: CardSubject) -> str | None:
    """How bitsandbytes makes the base again; None for bases that it does not make."""
    settings = subject.recipe.quantization
    if settings.data_type in ("none", "gptq_int4"):
        return None
    if settings.data_type == "int8":
        return "load_in_8bit=True"
    return (
        f'load_in_4bit=True, bnb_4bit_quant_type="{settings.data_type}", '
        f"bnb_4bit_use_double_quant={settings.doubly_quantized}, bnb_4bit_compute_dtype=torch.{settings.compute_dtype}"
    )


def _llama_cpp(subject: CardSubject, command: str, note: str) -> Snippet:
    files = sorted(subject.export.sha256) if subject.export is not None else []
    file = next((name for name in files if name.endswith(".gguf")), "model.gguf")
    fetched = (
        "" if subject.place == "." else f"hf download {shlex.quote(subject.place)} {shlex.quote(file)} --local-dir ."
    )
    lines = [f"# {note}" if note else "", fetched, command.format(file=shlex.quote(file))]
    return "llama.cpp", "sh", "\n".join(line for line in lines if line)
