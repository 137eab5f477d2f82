"""A quantized base from the cache, or made now.

Streams one matrix at a time, so a base larger than memory can be quantized. The result is kept in a
cache, keyed by the content of the weights and the settings, and shared by all runs that ask for the same.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import TypeAdapter, ValidationError

from qlora_trainer.errors import BaseModelError
from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.formats.model_folder import Stored, write_model
from qlora_trainer.formats.peft_adapter import AdapterSettings, write
from qlora_trainer.recipe import Lora, Quantization
from qlora_trainer.records import BaseCheckpoint, LinearLayers, QuantizedModel
from qlora_trainer.runtime.atomic import write_text, writing_folder
from qlora_trainer.stages.quantize.encoding import Calibrated, Encoding
from qlora_trainer.stages.quantize.storage import weight_format_of

logger = logging.getLogger(__name__)

RECORD_FILE = "quantized.json"
INITIAL_FACTORS = "initial_adapter"
# Raised whenever the written folder changes for equal settings, so that older caches are not mistaken for it.
LAYOUT = 1


def quantize(
    base: BaseCheckpoint,
    settings: Quantization,
    *,
    lora: Lora,
    layers: LinearLayers,
    content_key: str,
    calibrated: Calibrated | None = None,
) -> QuantizedModel:
    """The quantized base, from the cache or made now.

    With ``lora.init: loftq`` or ``pissa`` the adapter's first factors come from the same pass, because only here are
    a weight and its quantized value at hand together; they are saved beside the weights. With ``data_type: none`` the
    base is its own folder, and nothing is written unless PiSSA takes a part out of it.

    Args:
        base: the 16-bit base.
        settings: the recipe's section.
        lora: says what the first factors are.
        layers: which layers are quantized.
        content_key: of the base's weights and config.
        calibrated: how the integers of ``gptq_int4`` are chosen.

    Raises:
        BaseModelError: a weight is not finite, or quantization cannot hold a matrix.
        RecipeError: too few calibration rows.
        ValueError: ``gptq_int4`` without calibration.
    """
    key = cache_key(settings, lora, content_key=content_key, layers=layers, calibrated=calibrated)
    if settings.data_type == "none" and lora.init != "pissa":
        return _as_it_is(base, key)
    folder = Path(settings.cache_folder) / key
    found = _cached(folder)
    if found is not None:
        return found
    work = Encoding(weight_format_of(settings), lora, layers)
    measured = settings.data_type != "none"
    with writing_folder(folder) as partial:
        try:
            with _weights(work, base, calibrated, folder.parent) as weights:
                size = write_model(
                    partial,
                    weights,
                    work.weight_format,
                    linear_modules=layers.quantized,
                    like=base.folder,
                    rest_dtype=getattr(torch, settings.compute_dtype),
                    ignored=layers.ignored,
                    on_encoded=work.measure if measured else None,
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
            bits_per_parameter=work.bits_per_parameter if measured else work.weight_format.bits,
            bytes=size,
            reused=False,
            initial_factors=folder / INITIAL_FACTORS if work.factors else None,
        )
        # Not pydantic's writer: it would turn the infinite SQNR of a layer that lost nothing into null.
        write_text(partial / RECORD_FILE, json.dumps(asdict(record), indent=1, default=str) + "\n")
    return record


def cache_key(
    settings: Quantization, lora: Lora, *, content_key: str, layers: LinearLayers, calibrated: Calibrated | None = None
) -> str:
    """Name of the cached folder: equal exactly where the written bytes would be equal."""
    asked: dict[str, object] = {
        "layout": LAYOUT,
        "content": content_key,
        "data_type": settings.data_type,
        "double_quant": settings.doubly_quantized,
        "compute_dtype": settings.compute_dtype,
        "layers": sorted(layers.quantized),
    }
    if settings.data_type == "gptq_int4":
        if calibrated is None:
            raise ValueError("gptq_int4 chooses integers on calibration rows; give calibrated=")
        asked |= {"group_size": settings.inputs_per_scale, "calibration": calibrated.key}
    if lora.init != "default":
        asked["init"] = [lora.init, lora.rank, lora.scale, sorted(layers.adapted)]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return f"{settings.data_type}-{digest[:16]}"


def _as_it_is(base: BaseCheckpoint, key: str) -> QuantizedModel:
    """The record of a base that is not quantized."""
    return QuantizedModel(
        folder=base.folder, key=key, bits=16, layers=(), bits_per_parameter=16, bytes=base.bytes, reused=True
    )


@contextmanager
def _weights(
    work: Encoding, base: BaseCheckpoint, calibrated: Calibrated | None, beside: Path
) -> Iterator[Iterator[tuple[str, Stored]]]:
    """What is written: the base's tensors, to be rounded to nearest, or integers chosen on rows."""
    stream = work.stream(base.folder)
    if calibrated is None or not isinstance(work.weight_format, CompressedTensors):
        yield stream
        return
    with TemporaryDirectory(dir=beside, prefix=".rounding-") as workplace:
        yield calibrated.round_base(stream, work.weight_format.spec, Path(workplace))


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
