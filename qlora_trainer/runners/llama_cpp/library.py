"""The door to llama.cpp's Python package, which belongs to the extra ``gguf`` and is imported when it is first needed.

llama.cpp's own notices are kept off the terminal; its errors become part of ours.
"""

import ctypes
import importlib
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qlora_trainer.errors import MissingPackageError, VerificationError

_ERROR_LEVEL = 4


@dataclass(frozen=True)
class Library:
    """llama.cpp's Python package, and the last errors that it logged."""

    door: Any
    errors: deque[str]
    listener: object

    def said(self) -> str:
        """The errors since the last time, as one line."""
        text = " ".join("".join(self.errors).split())
        self.errors.clear()
        return text or "it gave no reason"


@cache
def library() -> Library:
    """The package, silenced.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        door: Any = importlib.import_module("llama_cpp")
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "llama-cpp-python is not installed, so GGUF files cannot be run. Install: "
            "pip install 'qlora-trainer[gguf]' (it is compiled on the way: needs a C++ compiler and cmake)"
        ) from error
    errors: deque[str] = deque(maxlen=8)

    def listen(level: int, text: bytes, _unused: object) -> None:
        if level == _ERROR_LEVEL:
            errors.append(text.decode(errors="replace"))

    # llama.cpp keeps a bare pointer to the listener: whoever drops it crashes the process.
    listener = door.llama_log_callback(listen)
    door.llama_log_set(listener, ctypes.c_void_p(0))
    door.llama_backend_init()
    return Library(door, errors, listener)


def open_model(path: Path, *, vocab_only: bool) -> Any:
    """llama.cpp's handle of a file, which the caller frees.

    Raises:
        VerificationError: llama.cpp does not load it; says why.
    """
    llama = library()
    settings = llama.door.llama_model_default_params()
    settings.vocab_only = vocab_only
    model = llama.door.llama_model_load_from_file(str(path).encode(), settings) if path.is_file() else None
    if model is None:
        reason = llama.said() if path.is_file() else "there is no such file"
        raise VerificationError(f"{path}: llama.cpp does not load this file: {reason}")
    return model


def metadata(model: Any, key: str) -> str | None:
    """Value of a key of an open file as text; None where it has none."""
    door = library().door
    size: int = door.llama_model_meta_val_str(model, key.encode(), None, 0)
    if size < 0:
        return None
    room = ctypes.create_string_buffer(size + 1)
    door.llama_model_meta_val_str(model, key.encode(), room, size + 1)
    return room.value.decode()
