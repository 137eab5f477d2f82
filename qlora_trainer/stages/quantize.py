"""The 16-bit base -> a quantized base on disk, with what that did to every layer.

Streams one matrix at a time, so a base larger than memory can be quantized. The result is kept in a
cache, keyed by the content of the weights and the settings, and shared by all runs that ask for the same.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from qlora_trainer.errors import BaseModelError
from qlora_trainer.formats.bitsandbytes import Bitsandbytes
from qlora_trainer.formats.model_folder import write_model
from qlora_trainer.formats.peft_adapter import AdapterSettings, Factors, write
from qlora_trainer.numerics.distortion import max_error, relative_error, sqnr_db
from qlora_trainer.numerics.low_rank import delta_weight, principal_factors
from qlora_trainer.recipe import Lora, Quantization
from qlora_trainer.records import BaseCheckpoint, LayerDistortion, LinearLayers, QuantizedModel
from qlora_trainer.runtime.atomic import write_text, writing_folder
from qlora_trainer.runtime.bnb import stored_bits
from qlora_trainer.runtime.progress import counted
from qlora_trainer.runtime.weight_files import read_tensors
from qlora_trainer.runtime.weight_headers import read_headers

logger = logging.getLogger(__name__)

RECORD_FILE = "quantized.json"
INITIAL_FACTORS = "initial_adapter"
# Raised whenever the written folder changes for equal settings, so that older caches are not mistaken for it.
LAYOUT = 1


def weight_format_of(settings: Quantization) -> Bitsandbytes:
    """The format in which the frozen base is stored."""
    return Bitsandbytes(
        data_type=settings.data_type,
        double_quant=settings.doubly_quantized,
        compute_dtype=settings.compute_dtype,
    )


def quantize(
    base: BaseCheckpoint, settings: Quantization, *, lora: Lora, layers: LinearLayers, content_key: str
) -> QuantizedModel:
    """The quantized base, from the cache or made now.

    With ``lora.init: loftq`` or ``pissa`` the adapter's first factors come from the same pass, because only here are
    a weight and its quantized value at hand together; they are saved beside the weights.

    Raises:
        BaseModelError: a weight is not finite, or quantization cannot hold a matrix.
    """
    key = cache_key(settings, lora, content_key=content_key, layers=layers)
    folder = Path(settings.cache_folder) / key
    found = _cached(folder)
    if found is not None:
        return found
    work = _Quantizer(weight_format_of(settings), lora, layers)
    with writing_folder(folder) as partial:
        try:
            size = write_model(
                partial,
                work.stream(base.folder),
                work.weight_format,
                linear_modules=layers.quantized,
                like=base.folder,
                rest_dtype=getattr(torch, settings.compute_dtype),
                ignored=layers.ignored,
                on_encoded=work.measure,
            )
        except ValueError as error:
            raise BaseModelError(f"{base.folder}: {error}") from error
        if work.factors:
            (partial / INITIAL_FACTORS).mkdir()
            write(partial / INITIAL_FACTORS, work.factors, _settings(lora, base))
        record = QuantizedModel(
            folder=folder,
            key=key,
            bits=work.weight_format.bits,
            layers=tuple(work.distortions),
            bits_per_parameter=work.bits_per_parameter,
            bytes=size,
            reused=False,
            initial_factors=folder / INITIAL_FACTORS if work.factors else None,
        )
        # Not pydantic's writer: it would turn the infinite SQNR of a layer that lost nothing into null.
        write_text(partial / RECORD_FILE, json.dumps(asdict(record), indent=1, default=str) + "\n")
    return record


def cache_key(settings: Quantization, lora: Lora, *, content_key: str, layers: LinearLayers) -> str:
    """Name of the cached folder: equal exactly where the written bytes would be equal."""
    asked: dict[str, object] = {
        "layout": LAYOUT,
        "content": content_key,
        "data_type": settings.data_type,
        "double_quant": settings.doubly_quantized,
        "compute_dtype": settings.compute_dtype,
        "layers": sorted(layers.quantized),
    }
    if lora.init != "default":
        asked["init"] = [lora.init, lora.rank, lora.scale, sorted(layers.adapted)]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return f"{settings.data_type}-{digest[:16]}"


def _cached(folder: Path) -> QuantizedModel | None:
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        record = TypeAdapter(QuantizedModel).validate_json(path.read_bytes())
    except ValidationError:
        logger.warning("%s is damaged; quantizing again", path)
        return None
    factors = folder / INITIAL_FACTORS
    return replace(record, folder=folder, reused=True, initial_factors=factors if factors.is_dir() else None)


def _settings(lora: Lora, base: BaseCheckpoint) -> AdapterSettings:
    return AdapterSettings(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        base_model=str(base.folder),
    )


class _Quantizer:
    """Prepares and meters the weights as they stream from the base into ``write_model``."""

    def __init__(self, weight_format: Bitsandbytes, lora: Lora, layers: LinearLayers) -> None:
        self.weight_format = weight_format
        self.lora = lora
        self.adapted = frozenset(layers.adapted)
        self.distortions: list[LayerDistortion] = []
        self.factors: dict[str, Factors] = {}
        self.bits = 0

    def stream(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """The base's tensors; with PiSSA, adapted weights without their principal part."""
        tensors = read_tensors(folder, check_finite=True)
        for name, tensor in counted(tensors, "quantizing", unit="tensors", total=len(read_headers(folder))):
            module = name.removesuffix(".weight")
            if self.lora.init == "pissa" and module in self.adapted and name.endswith(".weight"):
                factors = self._start_at(module, tensor)
                yield name, tensor.float() - delta_weight(factors.lora_a, factors.lora_b, scale=self.lora.scale)
            else:
                yield name, tensor

    def measure(self, module: str, weight: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Takes the distortion of one stored matrix; with LoftQ, factors of what was lost."""
        original, restored = weight.float(), self.weight_format.decode(parts).float()
        if self.lora.init == "loftq" and module in self.adapted:
            self._start_at(module, original - restored)
        bits = stored_bits(parts)
        self.bits += bits
        self.distortions.append(
            LayerDistortion(
                name=module,
                shape=(weight.shape[0], weight.shape[1]),
                sqnr_db=sqnr_db(original, restored),
                relative_error=relative_error(original, restored),
                max_error=max_error(original, restored),
                bits_per_parameter=bits / weight.numel(),
            )
        )

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits over parameters, of the quantized matrices."""
        return self.bits / sum(layer.shape[0] * layer.shape[1] for layer in self.distortions)

    def _start_at(self, module: str, weight: Tensor) -> Factors:
        lora_a, lora_b = principal_factors(weight, self.lora.rank, scale=self.lora.scale)
        self.factors[module] = Factors(lora_a=lora_a, lora_b=lora_b)
        return self.factors[module]
