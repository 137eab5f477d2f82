"""llama.cpp's own quantizer, for the mixtures of K-quants that only it writes."""

import ctypes
from pathlib import Path
from typing import Literal

import torch

from qlora_trainer.errors import VerificationError
from qlora_trainer.runners.llama_cpp.library import library, metadata, open_model
from qlora_trainer.runtime.atomic import writing_file
from qlora_trainer.runtime.progress import working

KQuant = Literal["q4_k_m", "q5_k_m", "q6_k"]

K_BLOCK = 256


def requantize(source: Path, target: Path, kind: KQuant) -> None:
    """Writes ``source`` again in one of llama.cpp's K-quants, by its own quantizer.

    Args:
        source: a GGUF file in float16.
        target: is replaced whole or not at all.
        kind: which mixture of blocks.

    Raises:
        MissingPackageError: llama-cpp-python is not installed.
        ValueError: rows that blocks of 256 do not divide, for which llama.cpp would take other types in silence.
        VerificationError: llama.cpp could not do it.
        RunFolderError: the place cannot be written.
    """
    llama = library()
    _require_k_blocks(source, kind)
    settings = llama.door.llama_model_quantize_default_params()
    settings.ftype = {
        "q4_k_m": llama.door.LLAMA_FTYPE_MOSTLY_Q4_K_M,
        "q5_k_m": llama.door.LLAMA_FTYPE_MOSTLY_Q5_K_M,
        "q6_k": llama.door.LLAMA_FTYPE_MOSTLY_Q6_K,
    }[kind]
    settings.nthread = torch.get_num_threads()
    with writing_file(target) as partial:
        with working("llama.cpp is rounding"):
            code = llama.door.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(settings))
        if code != 0:
            raise VerificationError(f"{source}: llama.cpp cannot quantize this file to {kind}: {llama.said()}")


def _require_k_blocks(source: Path, kind: KQuant) -> None:
    door = library().door
    model = open_model(source, vocab_only=True)
    try:
        name = metadata(model, "general.architecture")
        hidden, feed_forward, heads, head_dim = (
            int(metadata(model, f"{name}.{key}") or 0)
            for key in ("embedding_length", "feed_forward_length", "attention.head_count", "attention.key_length")
        )
    finally:
        door.llama_model_free(model)
    rows = {"embeddings and projections": hidden, "attention outputs": heads * head_dim, "down_proj": feed_forward}
    unfit = [f"{what} ({inputs} inputs)" for what, inputs in rows.items() if inputs % K_BLOCK]
    if unfit:
        raise ValueError(
            f"gguf_{kind} stores blocks of {K_BLOCK} weights, which do not divide {', '.join(unfit)}; llama.cpp would "
            "store those in another type. Choose a format of blocks of 32, such as gguf_q4_1 or gguf_q8_0"
        )
