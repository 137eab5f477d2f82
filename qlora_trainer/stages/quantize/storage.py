"""How a frozen base is stored, and that base in memory, ready to get adapters."""

import torch
from torch import nn

from qlora_trainer.errors import BaseModelError
from qlora_trainer.formats.bitsandbytes import Bitsandbytes
from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.formats.model_folder import read_integers
from qlora_trainer.formats.safetensors_16bit import Safetensors16bit
from qlora_trainer.recipe import Quantization
from qlora_trainer.records import LinearLayers, QuantizedModel
from qlora_trainer.runners import integer_linear
from qlora_trainer.runners import transformers as runner

BaseFormat = Bitsandbytes | CompressedTensors | Safetensors16bit


def weight_format_of(settings: Quantization) -> BaseFormat:
    """The format in which the frozen base is stored."""
    if settings.data_type == "none":
        return Safetensors16bit(getattr(torch, settings.compute_dtype))
    if settings.data_type == "gptq_int4":
        return CompressedTensors(4, settings.inputs_per_scale)
    return Bitsandbytes(
        data_type=settings.data_type,
        double_quant=settings.doubly_quantized,
        compute_dtype=settings.compute_dtype,
    )


def open_base(
    quantized: QuantizedModel, settings: Quantization, *, layers: LinearLayers, trust_remote_code: bool = False
) -> nn.Module:
    """The frozen base in evaluation mode, its matrices as they are stored: integers are not unpacked.

    Raises:
        BaseModelError: the folder cannot be read, or the base does not fit into the GPU's memory.
    """
    dtype: torch.dtype = getattr(torch, settings.compute_dtype)
    weight_format = weight_format_of(settings)
    if isinstance(weight_format, CompressedTensors):
        return integer_linear.load(
            quantized.folder,
            read_integers(quantized.folder, weight_format, linear_modules=layers.quantized),
            dtype=dtype,
            scale_dtype=weight_format.spec.scale_dtype,
            trust_remote_code=trust_remote_code,
        )
    model = runner.load(quantized.folder, dtype=dtype, trust_remote_code=trust_remote_code)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise BaseModelError(
            f"{quantized.folder}: this base is larger than the free memory of the GPU, so that it can be measured but "
            f"not trained on with quantization.data_type: {settings.data_type}. Set nf4 or gptq_int4"
        )
    return model
