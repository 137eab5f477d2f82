"""A written file in the runtime that serves it, and beside it the weights that it should hold."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from qlora_trainer.export_formats import FACTS, missing_modules
from qlora_trainer.formats import gguf
from qlora_trainer.formats.peft_adapter import attach
from qlora_trainer.recipe import ExportFormat
from qlora_trainer.records import ExportedModel
from qlora_trainer.runners import llama_cpp
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runtime.atomic import sha256_of_files
from qlora_trainer.stages.export.inputs import ExportInputs, TaskData, WrittenExport
from qlora_trainer.stages.export.writing import GGUF_ADAPTER_FILE, GGUF_FILE, decoded

BASE_RUNTIME = "transformers"
PARITY_ROWS = 50
"""Training rows whose texts are tokenized and rendered in both worlds."""


@dataclass(frozen=True)
class Opened:
    """A file ready to be measured.

    Attributes:
        model: answers forward passes and generates like a transformers model.
        runtime: what runs it.
        why_not_verified: why this is not the file's own runtime, with the mend; None where it is.
    """

    model: nn.Module
    runtime: str
    why_not_verified: str | None = None


def why_no_runtime(name: ExportFormat) -> str | None:
    """Why a format's runtime cannot be opened here, and how to install it; None where it can."""
    package, missing = FACTS[name].package, missing_modules(name)
    if package is None or not missing:
        return None
    return (
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed, so the file was not opened in "
        f"its runtime; its figures are those of its weights as decoded here. Install: {package.install}"
    )


def reference_model(written: WrittenExport, inputs: ExportInputs) -> nn.Module | None:
    """A dense model of the weights in the file, decoded by our own reader; None where the file decodes to no weights.

    An adapter is compared with the trained model itself, and a file of a library's own quantizer is read by that
    library alone: there is nothing that was computed here to compare it with.
    """
    facts = FACTS[written.format]
    if facts.kind == "adapter" or (facts.kind == "library" and facts.runtime == "llama_cpp"):
        return None
    dtype = getattr(torch, inputs.compute_dtype)
    if facts.runtime == "llama_cpp":
        dtype = torch.float32
    model = runner.from_weights(inputs.base, decoded(written, inputs), dtype=dtype)
    if written.format == "compressed_tensors_w8a8":
        return runner.with_dynamic_activations(model, inputs.layers.quantized)
    return model


def open_in_runtime(written: WrittenExport, inputs: ExportInputs) -> Opened:
    """The file as its runtime loads it; where the runtime is not installed, its weights as decoded here."""
    why = why_no_runtime(written.format)
    if why is not None:
        model = reference_model(written, inputs)
        if model is None:
            raise ModuleNotFoundError(why)
        return Opened(model, "none", why)
    dtype = getattr(torch, inputs.compute_dtype)
    if FACTS[written.format].runtime == "llama_cpp":
        return Opened(_in_llama_cpp(written, inputs), "llama_cpp")
    if written.format == "peft_adapter":
        base = runner.load(inputs.adapter_base, dtype=dtype, trust_remote_code=inputs.trust_remote_code)
        return Opened(attach(base, written.folder), BASE_RUNTIME)
    model = runner.load(written.folder, dtype=dtype, trust_remote_code=inputs.trust_remote_code)
    return Opened(model, BASE_RUNTIME)


def judge(
    written: WrittenExport, opened: Opened, data: TaskData, *, difference: float | None, tokens: int, rung: int
) -> ExportedModel:
    """The verdict on a file: faithful or not, with the figures it rests on.

    Args:
        written: the file.
        opened: the file in its runtime.
        data: rows whose texts a runtime's own tokenizer and chat template are tried on.
        difference: mean KL(computed weights || runtime) in nats; None where there is nothing to compare with.
        tokens: label tokens that the mean was taken over.
        rung: how its matrices were rounded.
    """
    problems = _parity_problems(opened, data)
    is_near = difference is None or difference <= written.tolerance
    files = {path: digest for path, digest in sha256_of_files(written.folder).items() if path != "README.md"}
    return ExportedModel(
        format=written.format,
        bits=written.bits,
        folder=written.folder,
        bytes=sum((written.folder / path).stat().st_size for path in files),
        runtime=opened.runtime,
        rung=rung,
        verified=opened.why_not_verified is None and is_near and not problems,
        verification=_verdict(written, opened, difference, tokens, problems),
        difference=difference,
        tolerance=written.tolerance,
        sha256=files,
        merged_into=written.merged_into,
        survived=written.survived,
        layers_16bit=written.layers_16bit,
        layers_raised=written.layers_raised,
    )


def _in_llama_cpp(written: WrittenExport, inputs: ExportInputs) -> nn.Module:
    if written.format != "gguf_adapter":
        return llama_cpp.load(written.folder / GGUF_FILE, threads=inputs.threads, window=inputs.window)
    # The adapter is tried on the base that it was trained on; on a serving machine it goes onto a base of choice.
    with TemporaryDirectory(dir=written.folder.parent) as place:
        base = Path(place) / GGUF_FILE
        linears = inputs.layers.quantized
        gguf.write_gguf(
            base, inputs.base_weights("dequantized"), gguf.GgufBlocks("f16"), linear_modules=linears, like=inputs.base
        )
        adapter = written.folder / GGUF_ADAPTER_FILE
        return llama_cpp.load(base, adapter=adapter, threads=inputs.threads, window=inputs.window)


def _parity_problems(opened: Opened, data: TaskData) -> tuple[str, ...]:
    """What a runtime with a tokenizer and a template of its own does otherwise than training did."""
    if opened.runtime != "llama_cpp":
        return ()
    tokenizer, rows = data.tokenizer, data.rows[:PARITY_ROWS]
    chats: list[tuple[list[dict[str, str]], str]] = []
    if tokenizer.has_chat_template:
        for row in rows:
            messages = [{"role": "user", "content": row.prompt}]
            chats.append((messages, tokenizer.render_chat(messages, add_generation_prompt=True).text))
    return llama_cpp.parity_problems(
        opened.model,
        texts=[text for row in rows for text in (row.prompt, row.completion)],
        token_ids_of=tokenizer.encode,
        stop_ids=data.stop_ids,
        chat=chats,
    )


def _verdict(
    written: WrittenExport, opened: Opened, difference: float | None, tokens: int, problems: tuple[str, ...]
) -> str:
    """One sentence or more on what was compared."""
    if opened.why_not_verified is not None:
        return opened.why_not_verified
    if difference is None:
        compared = f"{opened.runtime} rounded and read this file itself; there are no other weights to compare it with"
    else:
        against = "the trained model" if FACTS[written.format].kind == "adapter" else "the weights as computed"
        place = "within" if difference <= written.tolerance else "outside"
        compared = (
            f"{opened.runtime} differs from {against} by a mean KL of {difference:.2g} nats over {tokens} tokens; "
            f"{place} the tolerance of {written.tolerance:.0e}"
        )
    if opened.runtime != "llama_cpp":
        return compared
    if problems:
        return f"{compared}. Not the same: {'; '.join(problems)}"
    return f"{compared}; its tokenizer, chat template and stop tokens are those of training"
