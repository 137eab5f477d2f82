"""What ``compare`` finds: a row for each method, the outliers of each layer, a recommendation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_trainer.records.measurements import Score


@dataclass(frozen=True)
class ComparisonRow:
    """One method, measured on the same test rows as every other; or why it could not be.

    Attributes:
        method: as in the recipe; ``16bit`` for the model as it is.
        what: the method in a few words.
        weight_bits: of a quantized weight, constants not counted.
        activation_bits: of the inputs of quantized layers; 16 = not quantized.
        kv_bits: of the key-value cache, in scoring and in generation; 16 = not quantized.
        failed: why there are no figures; None where there are.
        nats_per_token: loss with its interval.
        added_nats: loss above the 16-bit model's, with its paired interval.
        metrics: task metrics by name.
        kl: mean KL(16 bit || method) over label tokens, in nats.
        top1_agreement: share of label tokens with the same most likely next token.
        bytes: of the stored weights, constants and 16-bit parts included.
        peak_bytes: largest resident or allocated memory of this process while measuring.
        prefill_tokens_per_second: tokens of scored rows over forward seconds.
        decode_tokens_per_second: generated tokens over seconds; None where nothing was generated.
        is_simulated: whether integers were dequantized before they were multiplied, so that speed and memory are
            those of a model in the compute type and tell nothing of the method.
        seconds: that quantizing took.
        layers_16bit: layers that the method could not treat and the recipe allows in 16 bit.
        note: what the method found, such as SmoothQuant's alphas.
        is_on_front: whether no other row is at once smaller and better.
    """

    method: str
    what: str
    weight_bits: int
    activation_bits: int
    kv_bits: int = 16
    failed: str | None = None
    nats_per_token: Score | None = None
    added_nats: Score | None = None
    metrics: dict[str, Score] | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    bytes: int | None = None
    peak_bytes: int | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    is_simulated: bool = False
    seconds: float | None = None
    layers_16bit: tuple[str, ...] = ()
    note: str = ""
    is_on_front: bool = False

    @property
    def bits(self) -> str:
        """The bits as papers write them: ``W4A16``, ``W4A8KV4``."""
        return f"W{self.weight_bits}A{self.activation_bits}{'' if self.kv_bits == 16 else f'KV{self.kv_bits}'}"


@dataclass(frozen=True)
class LayerOutliers:
    """Outliers among the inputs of one layer (LLM.int8, arXiv 2208.07339, section 4).

    Attributes:
        layer: its name in the checkpoint.
        magnitude: largest ``|x|``.
        spread: that over the median input's largest ``|x|``; infinite where the median input was always 0.
        token_share: share of tokens with an input of 6.0 or more.
        dimensions: inputs that reach 6.0 in at least 6 % of the tokens.
        tokens: tokens looked at.
    """

    layer: str
    magnitude: float
    spread: float
    token_share: float
    dimensions: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Recommendation:
    """The method to take.

    Attributes:
        method: as in the recipe, or ``16bit``.
        why: one sentence with the figures that decided.
        is_within_bounds: whether it meets the recipe's bounds; where no method does, the one of least loss is named.
    """

    method: str
    why: str
    is_within_bounds: bool = True


@dataclass(frozen=True)
class Comparison:
    """Everything that ``compare`` found.

    Attributes:
        recipe: name of the run.
        model: ``trained`` or ``base``.
        test_rows: rows that every method was measured on.
        confidence: coverage of the intervals.
        rows: the 16-bit model first, then the methods in the order of the recipe.
        outliers: of each quantized layer's inputs, on the calibration rows.
        systematic: input dimensions of the hidden state that are outliers in a quarter of the layers that read it.
        recommendation: by the recipe's preference.
        settings: the recipe's section ``compare`` as plain values; empty in files of before they were kept.
        recipe_text: the whole resolved recipe as YAML; empty likewise.
        environment: machine and versions, by name; empty likewise.
        command: repeats the comparison; empty likewise.
    """

    recipe: str
    model: str
    test_rows: int
    confidence: float
    rows: tuple[ComparisonRow, ...]
    outliers: tuple[LayerOutliers, ...]
    systematic: tuple[int, ...]
    recommendation: Recommendation
    settings: Mapping[str, object] = field(default_factory=dict)
    recipe_text: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def interval_words(self) -> str:
        """The intervals in words, such as ``95 %``."""
        return f"{100 * self.confidence:g} %"
