"""The trained model as files that runtimes load: written, read back, opened by the runtime, judged.

Faithful and good are two questions. ``judge`` answers the first: the runtime's next-token distributions are
those of the very weights that were computed here. How good the file is, the evaluation says.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from qlora_trainer.errors import RecipeError, VerificationError
from qlora_trainer.formats.bitsandbytes import Bitsandbytes
from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.formats.model_folder import read_model, write_model
from qlora_trainer.formats.peft_adapter import attach
from qlora_trainer.formats.safetensors_16bit import Safetensors16bit
from qlora_trainer.formats.weight_format import WeightFormat
from qlora_trainer.recipe import ExportFormat, FloatType
from qlora_trainer.records import ExportedModel, LinearLayers
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runtime.atomic import sha256_of_files, writing_folder

RUNTIME = "transformers"
Weights = Iterator[tuple[str, Tensor]]

# Mean KL in nats between the runtime and the weights as computed here. 16-bit, NF4 and packed integers multiply the
# same weights by the same kernel, so all that may differ is the order of sums. int8 of bitsandbytes also rounds
# activations to 8 bits at run time, which no weight can show.
TOLERANCE_SAME_KERNEL = 1e-4
TOLERANCE_DYNAMIC_ACTIVATIONS = 1e-2


@dataclass(frozen=True)
class ExportInputs:
    """What files are made from.

    Attributes:
        base: folder of the 16-bit base; gives config.json and tokenizer.
        adapter_base: folder that the PEFT adapter belongs on.
        adapter: folder of the trained adapter in PEFT format.
        merged: folder of the merged 16-bit model.
        weights: a fresh stream of the merged weights in float32.
        layers: which layers are quantized.
        compute_dtype: type that runtimes compute in here.
        data_type: type of what is not quantized.
        trust_remote_code: allow code that comes with the model.
    """

    base: Path
    adapter_base: Path
    adapter: Path
    merged: Path
    weights: Callable[[], Weights]
    layers: LinearLayers
    compute_dtype: Literal["float32", "bfloat16"]
    data_type: FloatType
    trust_remote_code: bool = False


@dataclass(frozen=True)
class WrittenExport:
    """A file set that was written and read back, not yet opened by its runtime.

    Attributes:
        format: name of the format, as in the recipe.
        bits: of the quantized weights; 16 where nothing is quantized.
        folder: where it lies.
        tolerance: bound on the mean KL between runtime and computed weights.
    """

    format: ExportFormat
    bits: int
    folder: Path
    tolerance: float


def weight_format_of(name: ExportFormat, *, compute_dtype: Literal["float32", "bfloat16"]) -> WeightFormat:
    """The format behind a recipe's name for quantized files.

    Raises:
        ValueError: the name is not one of a quantized format.
    """
    match name:
        case "bitsandbytes_nf4":
            return Bitsandbytes(data_type="nf4", compute_dtype=compute_dtype)
        case "bitsandbytes_int8":
            return Bitsandbytes(data_type="int8", compute_dtype=compute_dtype)
        case "compressed_tensors_w8a16":
            return CompressedTensors(bits=8, group_size=None)
        case "compressed_tensors_w4a16_g32" | "compressed_tensors_w4a16_g64" | "compressed_tensors_w4a16_g128":
            return CompressedTensors(bits=4, group_size=int(name.rsplit("_g", 1)[1]))
    raise ValueError(f"{name} is no quantized format")


def unfit_layers(name: ExportFormat, layers: LinearLayers) -> str | None:
    """Why a format cannot hold these layers, naming them all; None where it can."""
    if not name.startswith("compressed_tensors_w4a16_g"):
        return None
    group = int(name.rsplit("_g", 1)[1])
    unfit = [f"{module} ({shape[1]} inputs)" for module, shape in layers.quantized.items() if shape[1] % group]
    if not unfit:
        return None
    fitting = [size for size in (32, 64, 128) if all(shape[1] % size == 0 for shape in layers.quantized.values())]
    offer = f"compressed_tensors_w4a16_g{max(fitting)} fits" if fitting else "compressed_tensors_w8a16 fits"
    shown = ", ".join(unfit[:3]) + (f" and {len(unfit) - 3} more" if len(unfit) > 3 else "")
    return f"export.formats: {name} needs inputs in multiples of {group}; {shown} are not. {offer}"


def require_fitting(names: tuple[ExportFormat, ...], layers: LinearLayers) -> None:
    """Refuses formats that cannot hold the model, before anything is trained.

    Raises:
        RecipeError: names every format that does not fit, with one that does.
    """
    problems = [problem for name in names if (problem := unfit_layers(name, layers)) is not None]
    if problems:
        raise RecipeError("\n".join(problems))


def write(name: ExportFormat, folder: Path, inputs: ExportInputs) -> WrittenExport:
    """Writes one format, wholly or not at all, and reads it back.

    ``merged_16bit`` is the merged folder itself and is not written twice.

    Raises:
        VerificationError: what was read back is not what was written.
    """
    if name == "merged_16bit":
        return WrittenExport(name, 16, inputs.merged, TOLERANCE_SAME_KERNEL)
    if name == "peft_adapter":
        with writing_folder(folder) as partial:
            shutil.copytree(inputs.adapter, partial, dirs_exist_ok=True)
        return WrittenExport(name, 16, folder, TOLERANCE_SAME_KERNEL)
    weight_format = weight_format_of(name, compute_dtype=inputs.compute_dtype)
    computed: dict[str, str] = {}

    def remember(module: str, _weight: Tensor, parts: Mapping[str, Tensor]) -> None:
        computed[module] = _digest(weight_format.decode(parts))

    with writing_folder(folder) as partial:
        write_model(
            partial,
            inputs.weights(),
            weight_format,
            linear_modules=inputs.layers.quantized,
            like=inputs.base,
            rest_dtype=getattr(torch, inputs.data_type),
            ignored=inputs.layers.ignored,
            on_encoded=remember,
        )
        _require_read_back(partial, weight_format, inputs.layers, computed)
    tolerance = TOLERANCE_DYNAMIC_ACTIVATIONS if name == "bitsandbytes_int8" else TOLERANCE_SAME_KERNEL
    return WrittenExport(name, weight_format.bits, folder, tolerance)


def reference_model(written: WrittenExport, inputs: ExportInputs) -> nn.Module | None:
    """A dense model of the weights in the file, decoded by our own reader; None for an adapter.

    An adapter has no decoded weights: its reference is the trained model itself.
    """
    if written.format == "peft_adapter":
        return None
    dtype = getattr(torch, inputs.compute_dtype)
    if written.format == "merged_16bit":
        plain = Safetensors16bit(getattr(torch, inputs.data_type))
        weights = read_model(written.folder, plain, linear_modules=inputs.layers.quantized)
    else:
        weight_format = weight_format_of(written.format, compute_dtype=inputs.compute_dtype)
        weights = read_model(written.folder, weight_format, linear_modules=inputs.layers.quantized)
    return runner.from_weights(inputs.base, weights, dtype=dtype)


def open_in_runtime(written: WrittenExport, inputs: ExportInputs) -> nn.Module:
    """The file as its runtime loads it, ready to be measured."""
    dtype = getattr(torch, inputs.compute_dtype)
    if written.format == "peft_adapter":
        base = runner.load(inputs.adapter_base, dtype=dtype, trust_remote_code=inputs.trust_remote_code)
        return attach(base, written.folder)
    return runner.load(written.folder, dtype=dtype, trust_remote_code=inputs.trust_remote_code)


def judge(written: WrittenExport, *, difference: float, tokens: int) -> ExportedModel:
    """The verdict on a file: faithful or not, with the figures it rests on.

    Args:
        written: the file.
        difference: mean KL(computed weights || runtime) in nats.
        tokens: label tokens that the mean was taken over.
    """
    verified = difference <= written.tolerance
    against = "the trained model" if written.format == "peft_adapter" else "the weights as computed"
    files = {path: digest for path, digest in sha256_of_files(written.folder).items() if path != "README.md"}
    return ExportedModel(
        format=written.format,
        bits=written.bits,
        folder=written.folder,
        bytes=sum((written.folder / path).stat().st_size for path in files),
        runtime=RUNTIME,
        rung=0,
        verified=verified,
        verification=(
            f"{RUNTIME} differs from {against} by a mean KL of {difference:.2g} nats over {tokens} tokens; "
            f"{'within' if verified else 'outside'} the tolerance of {written.tolerance:.0e}"
        ),
        difference=difference,
        tolerance=written.tolerance,
        sha256=files,
    )


def _require_read_back(
    folder: Path, weight_format: WeightFormat, layers: LinearLayers, computed: Mapping[str, str]
) -> None:
    """Every matrix in the file decodes to the bits that were computed."""
    found = {
        name.removesuffix(".weight"): _digest(tensor)
        for name, tensor in read_model(folder, weight_format, linear_modules=layers.quantized)
        if name.removesuffix(".weight") in computed
    }
    wrong = sorted(module for module, digest in computed.items() if found.get(module) != digest)
    if wrong:
        raise VerificationError(
            f"{weight_format.name}: {len(wrong)} matrices read back from the file differ from what was written, "
            f"the first is {wrong[0]}. The disk or the format's library is at fault; the file was not kept."
        )


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, its type and shape."""
    data = tensor.contiguous()
    head = f"{data.dtype}{tuple(data.shape)}".encode()
    return hashlib.sha256(head + data.view(torch.uint8).numpy().tobytes()).hexdigest()
