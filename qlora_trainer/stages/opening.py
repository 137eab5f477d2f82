"""A model of a run, opened in its runtime: llama.cpp for a GGUF file, transformers otherwise."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from qlora_trainer.formats.peft_adapter import attach
from qlora_trainer.runners import llama_cpp
from qlora_trainer.runners import transformers as runner


@dataclass(frozen=True)
class ModelFiles:
    """A model as it lies on the disk.

    Attributes:
        model: folder in Hugging Face layout, or a GGUF file.
        adapter: folder of an adapter on top of it; None = none.
    """

    model: Path
    adapter: Path | None = None

    @property
    def runtime(self) -> Literal["llama_cpp", "transformers"]:
        """What runs it."""
        return "llama_cpp" if self.model.suffix == ".gguf" else "transformers"


def open_model(
    files: ModelFiles, *, compute_dtype: str, window: int, threads: int | None, trust_remote_code: bool
) -> nn.Module:
    """The model, in evaluation mode.

    Args:
        files: the model.
        compute_dtype: of transformers; llama.cpp chooses its own.
        window: longest row, new tokens included, that llama.cpp makes room for; transformers' room grows by itself.
        threads: of llama.cpp; None = as many as torch uses.
        trust_remote_code: allow Python code that comes with the model.

    Raises:
        MissingPackageError: its runtime is not installed.
        BaseModelError: its files do not fit together.
        VerificationError: llama.cpp does not load the file; says why.
    """
    if files.runtime == "llama_cpp":
        return llama_cpp.load(files.model, threads=threads, window=window)
    model = runner.load(files.model, dtype=getattr(torch, compute_dtype), trust_remote_code=trust_remote_code)
    return model if files.adapter is None else attach(model, files.adapter)
