"""Models as stock transformers loads and runs them: 16 bit, bitsandbytes and compressed-tensors alike.

What comes out is a plain ``nn.Module`` in evaluation mode, guarded against bitsandbytes' repacking. transformers'
own notices are silenced here; what they would have told of missing or misfit weights is raised instead.
"""

import io
import json
import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import logging as library_logging

from qlora_trainer.errors import BaseModelError, MissingPackageError
from qlora_trainer.runners import placement
from qlora_trainer.runtime import bnb
from qlora_trainer.runtime.device import choose_device
from qlora_trainer.runtime.progress import working

logger = logging.getLogger(__name__)

LEFTOVER = "rotary_emb.inv_freq"
"""A constant that checkpoints of older versions hold in every block; transformers ignores it too."""


def load(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model in a folder, in evaluation mode, guarded (``runtime.bnb.guard``), on the device that work is done on.

    A model that is not quantized for its runtime may be larger than a GPU: see ``placement``.

    Args:
        folder: Hugging Face layout; a ``quantization_config`` in its config.json is honoured.
        dtype: of every weight that is not quantized.
        trust_remote_code: run code that comes with the model.

    Raises:
        BaseModelError: transformers cannot read the folder, or weights are missing or of another shape.
        MissingPackageError: the weights' format needs a package that is not installed, as GPTQ does.
    """
    return _loaded(AutoModelForCausalLM, folder, dtype=dtype, options={"trust_remote_code": trust_remote_code})


def skeleton(folder: Path, *, trust_remote_code: bool = False, buffers_for: torch.dtype | None = None) -> nn.Module:
    """The architecture of a folder's config.json on the meta device: shapes and names, no memory; never quantized.

    Args:
        folder: its config.json is read.
        trust_remote_code: run code that comes with the model.
        buffers_for: keep what no file holds, such as rotary frequencies, in the CPU's memory, as a model whose
            weights are of this type has it; None leaves that on the meta device too.

    Raises:
        BaseModelError: transformers does not know the architecture, or it needs code that is not trusted.
    """
    config = _config(folder, trust_remote_code=trust_remote_code)
    place = torch.device("meta") if buffers_for is None else init_empty_weights(include_buffers=False)
    options = {} if buffers_for is None else {"dtype": buffers_for}
    with place, _silenced():
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
    if buffers_for is not None:
        _fill_buffers(model)
    return model.eval()


def linear_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Shape ``(out_features, in_features)`` of each linear layer but the output head, by its name in the checkpoint.

    Args:
        model: of ``skeleton``. A loaded model serves where it is not quantized.
    """
    head = output_head_name(model)
    # Subclasses are left out, because transformers' bitsandbytes loader replaces exactly nn.Linear.
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name != head
    }


def output_head_name(model: nn.Module) -> str | None:
    """Name of the layer that gives the logits, such as ``lm_head``; None where the architecture has none."""
    door: Any = model
    head = door.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def from_weights(folder: Path, weights: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype) -> nn.Module:
    """A dense model in evaluation mode: architecture and settings of a folder, weights as given.

    A ``quantization_config`` of the folder is ignored; tied embeddings are tied. This is the reference that a loaded
    quantized file is compared with, so the whole model is in memory.

    Args:
        folder: its config.json is read, its weights are not.
        weights: every tensor of the model by checkpoint name.
        dtype: type that they are cast to.

    Raises:
        BaseModelError: weights are missing or of another shape.
    """
    config = _config(folder, trust_remote_code=False)
    return _loaded(type(skeleton(folder)), None, dtype=dtype, options={"config": config, "state_dict": dict(weights)})


def take_weights(
    model: nn.Module,
    expected: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    *,
    where: Path,
    what: str = "the weights",
) -> None:
    """Changes a skeleton: puts tensors into it, and ties whichever of a tied pair is missing to the one that is there.

    Args:
        model: of ``skeleton``.
        expected: its tensors that are to be filled, by checkpoint name.
        given: what they are filled with; what the model does not know is passed over with a warning.
        where: the folder whose model it is, for messages.
        what: is given, for messages.

    Raises:
        BaseModelError: tensors are missing or of another shape; names all of them.
    """
    problems = misshapen(expected, given)
    if not problems:
        fitting = {name: tensor for name, tensor in given.items() if name in expected}
        missing = set(expected.keys() - fitting)
        model.load_state_dict(fitting, strict=False, assign=True)
        door: Any = model
        door.tie_weights(missing_keys=missing, recompute_mapping=False)
        problems = [f"  {name}: missing" for name in sorted(missing)]
    if problems:
        raise BaseModelError("\n".join([f"{where}: {what} do not fit config.json", *problems]))
    unknown = sorted(name for name in given.keys() - expected if not name.endswith(LEFTOVER))
    if unknown:
        logger.warning("%s: not part of the model, ignored: %s", where, ", ".join(unknown))


def misshapen(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """A line for each tensor that has another shape than the model's."""
    return [
        f"  {name}: {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in sorted(given.items())
        if name in expected and tensor.shape != expected[name].shape
    ]


def with_dynamic_activations(model: nn.Module, linear_modules: Collection[str]) -> nn.Module:
    """Changes a dense model so that it rounds inputs as a W8A8 file's layers do, and gives it back.

    Each token's input of the named layers is rounded to int8 with a scale of its own, ``max |x| / 127.5`` in the
    input's type, as compressed-tensors does in stock transformers. With ``from_weights`` this is the reference for such
    a file: ``load`` dequantizes its weights, but keeps rounding inputs.

    Args:
        model: of ``from_weights``.
        linear_modules: names of the layers that the file quantizes.
    """
    for name in linear_modules:
        model.get_submodule(name).register_forward_pre_hook(_with_rounded_input)
    return model


@torch.no_grad()
def generate_greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
) -> list[list[int]]:
    """Most likely continuations of a batch of prompts, whatever the model's generation_config.json says.

    Args:
        model: in evaluation mode, with or without adapters.
        prompts: token ids of each prompt, none empty.
        max_new_tokens: longest continuation.
        stop_ids: tokens that end a continuation; without any, all are ``max_new_tokens`` long.
        pad_id: any valid id; it is never attended to.

    Returns:
        New ids of each prompt, without the stop token.

    Raises:
        ValueError: a prompt is empty, or the model is in training mode.
    """
    if not prompts:
        return []
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes what it says; call model.eval() first")
    token_ids, mask = _left_padded(prompts, pad_id=pad_id, device=next(model.parameters()).device)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=pad_id,
    )
    door: Any = model
    with _plain_generation(model), _silenced():
        output: Tensor = door.generate(input_ids=token_ids, attention_mask=mask, generation_config=settings)
    return [_until(row, frozenset(stop_ids)) for row in output[:, token_ids.shape[1] :].tolist()]


def _config(folder: Path, *, trust_remote_code: bool) -> Any:
    try:
        with _silenced():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{folder}: transformers cannot read config.json: {error}") from error
    vars(config).pop("quantization_config", None)
    return config


def _fill_buffers(model: Any) -> None:
    """Changes buffers to what loading a folder makes of them: reckoned in float32, rounded to the buffer's type.

    Building a model reckons in the model's type: GPT-J's sines and cosines in bfloat16 are other numbers then.
    """
    for module in model.modules():
        if any(not buffer.is_meta for buffer in module.buffers(recurse=False)):
            model._init_weights(module)


def _loaded(model_class: Any, folder: Path | None, *, dtype: torch.dtype, options: dict[str, Any]) -> nn.Module:
    where = folder or "the given weights"
    device = choose_device()
    place = placement.place_for(_dense_bytes(folder, dtype, options), device) if device.type == "cuda" else device
    try:
        with working("loading weights"), _silenced():
            # Shapes that do not fit are let through here so that all of them can be named below.
            model, found = model_class.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": place},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
            _unpack(model)
    except ImportError as error:
        raise MissingPackageError(f"{where}: transformers lacks a package for this model: {error}") from error
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{where}: transformers cannot load this model: {error}") from error
    problems = [f"  {name}: missing" for name in sorted(found["missing_keys"])]
    problems += [f"  {name}: {tuple(has)} instead of {tuple(wants)}" for name, has, wants in found["mismatched_keys"]]
    if problems:
        raise BaseModelError("\n".join([f"{where}: the weights do not fit config.json", *problems]))
    if found["unexpected_keys"]:
        logger.warning("%s: not part of the model, ignored: %s", where, ", ".join(sorted(found["unexpected_keys"])))
    guarded: nn.Module = bnb.guard(model)
    # transformers 5.23 leaves what is not quantized in the file's type where the rest is bitsandbytes'.
    bnb.cast_unquantized(guarded, dtype)
    return guarded.eval() if place == device else placement.spread(guarded.eval(), device)


def _dense_bytes(folder: Path | None, dtype: torch.dtype, options: dict[str, Any]) -> int:
    """Bytes of all weights in memory; 0 where a quantizer keeps them packed: such a model stays in one place."""
    if folder is None:
        given: int = sum(tensor.numel() for tensor in options["state_dict"].values())
        return given * dtype.itemsize
    config = folder / "config.json"
    described = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if described.get("quantization_config", {}).get("quant_method") not in (None, "compressed-tensors"):
        return 0
    model = skeleton(folder, trust_remote_code=bool(options.get("trust_remote_code")))
    count: int = sum(parameter.numel() for parameter in model.parameters())
    return count * dtype.itemsize


@torch.no_grad()
def _with_rounded_input(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A layer's inputs with the first, of shape ``(rows, tokens, in_features)``, rounded to int8 and back."""
    values, *others = inputs
    # The library reduces all axes after the second: two axes, as some expert layers get, share a single scale.
    scale = values.abs().amax(dim=tuple(range(2, values.ndim)), keepdim=True) / 127.5
    scale = torch.where(scale == 0, 1.0, scale)
    return (torch.round((values / scale).clamp(-128, 127)) * scale, *others)


def _unpack(model: Any) -> None:
    """Unpacks compressed-tensors weights now, which the library would do at the first forward, drawing bars.

    Layers of W8A8 files keep the library's forward, which rounds each token's input to int8.
    """
    quantizer = vars(model).get("hf_quantizer")
    if isinstance(quantizer, CompressedTensorsHfQuantizer):
        quantizer.compressor.decompress_model(model)


def _left_padded(prompts: Sequence[Sequence[int]], *, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 of shape ``(prompts, longest)``, every prompt at the right edge."""
    empty = [row for row, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ValueError(f"prompts {empty} of the batch are empty; give each at least one token, such as bos")
    longest = max(len(prompt) for prompt in prompts)
    gaps = [longest - len(prompt) for prompt in prompts]
    token_ids = [[pad_id] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return torch.tensor(token_ids, device=device), torch.tensor(mask, device=device)


def _until(token_ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(token_ids) if token in stop_ids), len(token_ids))
    return token_ids[:end]


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """Takes the model's own generation settings away for a while.

    Generation fills what it was not told from them, so that a repetition penalty of the model's authors would make
    the search no longer greedy. A model with adapters holds them in more than one module.
    """
    holders: list[Any] = [module for module in model.modules() if "generation_config" in vars(module)]
    kept = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, settings in zip(holders, kept, strict=True):
            holder.generation_config = settings


class _WithoutBars(io.TextIOBase):
    """A text stream that passes everything on but what redraws a line: compressed-tensors' bars have no switch."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_drawing = False

    def write(self, text: str) -> int:
        """Passes text on, unless it goes back to the line's beginning or ends a line that did."""
        self.is_drawing = text.startswith("\r") or (self.is_drawing and text == "\n")
        if not self.is_drawing:
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes what was passed on."""
        self.stream.flush()


@contextmanager
def _silenced() -> Iterator[None]:
    """Keeps progress bars, and what transformers says below errors, off the terminal for a while."""
    verbosity = library_logging.get_verbosity()
    had_bars = library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        with redirect_stderr(_WithoutBars(sys.stderr)):
            yield
    finally:
        library_logging.set_verbosity(verbosity)
        if had_bars:
            library_logging.enable_progress_bar()
