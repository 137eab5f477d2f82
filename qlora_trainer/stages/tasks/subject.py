"""A model of a run, opened in its runtime."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qlora_trainer.formats.peft_adapter import attach
from qlora_trainer.runners import llama_cpp
from qlora_trainer.runners import transformers as runner


@dataclass(frozen=True)
class TaskSubject:
    """What is asked, as files.

    Attributes:
        stage: its name, as in report.json.
        model: folder in Hugging Face layout, or a GGUF file.
        adapter: folder of an adapter on top of it; None = none.
        content: fingerprint of all its files.
    """

    stage: str
    model: Path
    adapter: Path | None
    content: str

    @property
    def runtime(self) -> str:
        """What runs it."""
        return "llama_cpp" if self.model.suffix == ".gguf" else "transformers"


def open_subject(
    subject: TaskSubject, *, compute_dtype: str, window: int, threads: int | None, trust_remote_code: bool
) -> nn.Module:
    """The model, in evaluation mode.

    Raises:
        MissingPackageError: its runtime is not installed.
        BaseModelError: its files do not fit together.
    """
    if subject.runtime == "llama_cpp":
        return llama_cpp.load(subject.model, threads=threads, window=window)
    model = runner.load(subject.model, dtype=getattr(torch, compute_dtype), trust_remote_code=trust_remote_code)
    return model if subject.adapter is None else attach(model, subject.adapter)
