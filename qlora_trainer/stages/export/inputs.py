"""What exporting works on, as the pipeline hands it over; and the records that its parts exchange."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.export_formats import MergeBase
from qlora_trainer.recipe import Calibration, ExportFormat, FloatType, Rounding
from qlora_trainer.records import LinearLayers

Weights = Iterator[tuple[str, Tensor]]
Wanted = Callable[[str], bool]
OnMerged = Callable[[str, Tensor, Tensor], None]


class MergedWeights(Protocol):
    """Fresh streams of merged weights, the matrices of linear layers in float32."""

    def __call__(self, into: MergeBase, *, wanted: Wanted | None = None, on_merged: OnMerged | None = None) -> Weights:
        """Every wanted tensor of the model with the learned delta in the base of choice.

        Args:
            into: the base.
            wanted: says by checkpoint name which tensors are read; None = all.
            on_merged: told of each adapted matrix: module, merged weight, base weight.
        """


@dataclass(frozen=True)
class AdapterFactors:
    """The trained factors, for what trains them further.

    Attributes:
        lora_a: A of each adapted module, shape ``(r, in_features)``.
        lora_b: B of each adapted module, shape ``(out_features, r)``.
        scale: the factor s before B A.
        has_magnitudes: DoRA, whose merged weight is no longer a base plus s B A.
    """

    lora_a: dict[str, Tensor]
    lora_b: dict[str, Tensor]
    scale: float
    has_magnitudes: bool


@dataclass(frozen=True)
class TaskData:
    """Rows that rounding may learn from: training rows only.

    Attributes:
        rows: all training rows.
        pad_id: token right of a row's end.
        stop_ids: tokens that generation stops at.
        tokenizer: that encoded the rows.
        seed: of the choice and order of rows.
        learning_rate: of the training that made the adapter.
        steps: of that training.
        batch_size: rows in one of its optimizer steps.
    """

    rows: Sequence[EncodedRow]
    pad_id: int
    stop_ids: tuple[int, ...]
    tokenizer: TextTokenizer
    seed: int
    learning_rate: float
    steps: int
    batch_size: int


@dataclass(frozen=True)
class ExportInputs:
    """What files are made from.

    Attributes:
        base: folder of the 16-bit base; gives config.json and tokenizer.
        adapter_base: folder that the PEFT adapter belongs on.
        adapter: folder of the trained adapter in PEFT format.
        merged: folder of the merged 16-bit model.
        merged_into: the base that is in ``merged``.
        weights: streams of merged weights; those with the dequantized base are the trained function's.
        base_weights: streams of the original base without the delta, ``wanted`` as above.
        factors: the trained factors.
        layers: which layers are quantized.
        data: rows for rounding.
        calibration: how many of them.
        rounding: settings of the methods.
        compute_dtype: type that runtimes compute in here.
        data_type: type of what is not quantized.
        window: tokens of the longest row that a runtime must read.
        threads: processor threads of runtimes with threads of their own; None = one per core.
        allow_16bit_layers: leave layers that a format cannot hold in 16 bit.
        trust_remote_code: allow code that comes with the model.
    """

    base: Path
    adapter_base: Path
    adapter: Path
    merged: Path
    merged_into: MergeBase
    weights: MergedWeights
    base_weights: Callable[[MergeBase], Weights]
    factors: AdapterFactors
    layers: LinearLayers
    data: TaskData
    calibration: Calibration
    rounding: Rounding
    compute_dtype: Literal["float32", "bfloat16"]
    data_type: FloatType
    window: int
    threads: int | None = None
    allow_16bit_layers: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class WrittenExport:
    """A file set that was written and read back, not yet opened by its runtime.

    Attributes:
        format: name of the format, as in the recipe.
        bits: of the quantized weights; 16 where nothing is quantized.
        folder: where it lies.
        tolerance: bound on the mean KL between runtime and computed weights.
        merged_into: the base that the delta went into; None for adapters.
        survived: dead-zone meter: share of each layer's learned delta that is in the file, by layer.
        layers_16bit: layers that the format could not hold.
        layers_raised: layers with more bits than the rest.
    """

    format: ExportFormat
    bits: int
    folder: Path
    tolerance: float
    merged_into: MergeBase | None
    survived: dict[str, float]
    layers_16bit: tuple[str, ...] = ()
    layers_raised: tuple[str, ...] = ()
