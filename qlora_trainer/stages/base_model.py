"""A hub name or a local path -> a complete, safe base model on disk.

Knows file names and headers, not tensors: nothing here imports torch, so that ``check`` can use it.
"""

import hashlib
import json
import math
from pathlib import Path

from qlora_trainer.errors import BaseModelError
from qlora_trainer.recipe import BaseModelSource
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.runtime.weight_headers import read_headers, weight_files

_TEXT_PART = (
    ". It reads more than text; save its text part as a folder first, in the way that `qlora-trainer recipes show "
    "gemma3_4b_16gb` tells for Gemma 3"
)
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "*.py", "README.md")


def resolve(source: BaseModelSource, *, trust_remote_code: bool = False) -> BaseCheckpoint:
    """The base model's folder, found or downloaded, and checked without reading a tensor.

    Raises:
        BaseModelError: the folder is absent, is no causal language model, is quantized already, needs code of its
            own that was not allowed, lacks a tokenizer, or its weights are pickled, truncated or missing. All
            problems at once.
    """
    folder = Path(source.path) if source.path is not None else _download(source)
    return _checked(folder, trust_remote_code=trust_remote_code)


def resolve_local(source: BaseModelSource, *, trust_remote_code: bool = False) -> BaseCheckpoint | None:
    """The same without the network; None for a hub model that was not downloaded yet."""
    folder = Path(source.path) if source.path is not None else _cached(source)
    return None if folder is None else _checked(folder, trust_remote_code=trust_remote_code)


def _checked(folder: Path, *, trust_remote_code: bool) -> BaseCheckpoint:
    if not folder.is_dir():
        raise BaseModelError(
            f"base_model.path: there is no folder {folder} (looked in {folder.absolute().parent}). "
            "Name a folder in Hugging Face layout, or give base_model.name for a model on the hub."
        )
    problems = _config_problems(folder, trust_remote_code=trust_remote_code)
    if not (folder / "tokenizer.json").is_file():
        problems.append(
            "no tokenizer.json. Save the tokenizer beside the model: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    parameters = size = 0
    try:
        headers = read_headers(folder)
        parameters = sum(math.prod(info.shape) for info in headers.values())
        size = sum(path.stat().st_size for path in weight_files(folder))
    except BaseModelError as error:
        problems.append(str(error))
    if problems:
        raise BaseModelError("\n".join([f"base model {folder} cannot be used:", *(f"  {text}" for text in problems)]))
    return BaseCheckpoint(folder=folder, parameters=parameters, bytes=size)


def content_key(base: BaseCheckpoint) -> str:
    """SHA-256 over config and weights: equal for equal content, wherever it lies.

    Reads every byte: about a second per 1.5 GB where the processor has SHA instructions.
    """
    digest = hashlib.sha256()
    for path in [base.folder / "config.json", *weight_files(base.folder)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def longest_row(base: BaseCheckpoint) -> int | None:
    """Tokens that the model was made for, as its config.json says; None where it does not say."""
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    text_part = config.get("text_config") or {}
    found = config.get("max_position_embeddings") or text_part.get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _config_problems(folder: Path, *, trust_remote_code: bool) -> list[str]:
    path = folder / "config.json"
    if not path.is_file():
        return ["no config.json, so it is no model folder in Hugging Face layout"]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return [f"config.json is not readable JSON: {error}"]
    if not isinstance(config, dict):
        return [f"config.json holds a {type(config).__name__}, not an object"]
    problems = []
    architectures = config.get("architectures") or []
    if not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        hint = _TEXT_PART if "text_config" in config else ""
        problems.append(
            f"config.json names architectures {architectures}, none of which is a causal language model{hint}"
        )
    if "quantization_config" in config:
        problems.append(
            "it is quantized already (config.json has a quantization_config); name the 16-bit model instead"
        )
    if "auto_map" in config and not trust_remote_code:
        problems.append(
            "it needs Python code that comes with the model (config.json has an auto_map). Read that code; "
            "if you trust it, add --trust-remote-code to the command. A recipe cannot switch this on"
        )
    return problems


def _cached(source: BaseModelSource) -> Path | None:
    """Folder of a hub model in the local cache, None where it is not there or has no weights."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    try:
        found = Path(snapshot_download(f"{source.name}", revision=source.revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None
    # Looking at a model card or a tokenizer leaves a folder too.
    return found if any(found.glob("*.safetensors")) else None


def _download(source: BaseModelSource) -> Path:
    # Imported here because `check` of a local model must not pay for the hub client.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    place = f"{source.name}@{source.revision}" if source.revision else f"{source.name}"
    try:
        found = snapshot_download(f"{source.name}", revision=source.revision, allow_patterns=list(HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise BaseModelError(
            f"base_model.name: {place} is not in the local hub cache and the hub cannot be reached. "
            "Connect, or download the model elsewhere and give its folder as base_model.path."
        ) from error
    except (HfHubHTTPError, ValueError) as error:
        raise BaseModelError(
            f"base_model.name: the hub has no model {place} for this login ({error}). Check spelling, revision, "
            "and `hf auth whoami` for gated models."
        ) from error
    return Path(found)
