"""What is measured of a model."""

from dataclasses import dataclass

Interval = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """A figure with its bootstrap interval over examples."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Sample:
    """One generated output beside what was wanted."""

    prompt: str
    reference: str
    output: str


@dataclass(frozen=True)
class Evaluation:
    """One model measured on the test rows.

    Attributes:
        stage: ``base_16bit``, ``quantized_base``, ``adapter_unmerged``, ``merged_16bit`` or ``export:<format>``.
        runtime: what ran the model, such as ``transformers``.
        nats_per_token: summed loss over label tokens.
        metrics: task metrics by name.
        row_nats: summed nats of each test row; same rows and order for every stage.
        row_labels: label tokens of each test row.
        bytes: size of the model's weights on disk.
        tokens_per_second: tokens of the scored rows over forward seconds.
        generated_tokens_per_second: new tokens over generation seconds; None where nothing was generated.
        peak_bytes: largest resident or allocated memory while measuring.
        samples: first generated outputs.
    """

    stage: str
    runtime: str
    nats_per_token: Score
    metrics: dict[str, Score]
    row_nats: tuple[float, ...]
    row_labels: tuple[int, ...]
    bytes: int
    tokens_per_second: float
    generated_tokens_per_second: float | None
    peak_bytes: int
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Fidelity:
    """How near a model is to the trained model (quantized base + unmerged adapter) on test label tokens.

    Attributes:
        kl_to_trained: mean over tokens of KL(trained || model), in nats.
        top1_agreement: share of tokens with the same most likely next token.
        tokens: label tokens compared.
    """

    kl_to_trained: float
    top1_agreement: float
    tokens: int
