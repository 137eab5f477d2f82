"""A run as a small Llama on a slot-filling task would give it: ten stages, six files, one of them below its bar, one
malicious sample."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qlora_trainer.numerics.bootstrap import Resampling, ratio_interval
from qlora_trainer.recipe import Expected
from qlora_trainer.records import (
    Attempt,
    Evaluation,
    ExportedModel,
    Fidelity,
    LayerDistortion,
    MergedModel,
    QuantizedModel,
    RunReport,
    Sample,
    Score,
    TrainedAdapter,
)
from qlora_trainer.stages.report import Circumstances, Measurements, Notes, compose

RESAMPLING = Resampling(resamples=200, confidence=0.95, seed=0)
ROWS = 300
MALICIOUS = "<script>alert('run')</script> | `rm` **all**"

# Loss per token, exact match, slot F1, KL to the trained model, top-1 agreement, weights in bytes.
STAGES = {
    "base_16bit": (3.102, 0.004, 0.061, 2.41, 0.412, 18_940_000),
    "quantized_base": (3.148, 0.003, 0.055, 2.44, 0.409, 6_120_000),
    "adapter_unmerged": (0.1412, 0.812, 0.947, None, None, 8_350_000),
    "merged_16bit": (0.1415, 0.811, 0.947, 0.00021, 0.9981, 18_940_000),
    "export:peft_adapter": (0.1412, 0.812, 0.947, 0.0, 1.0, 2_230_000),
    "export:bitsandbytes_nf4": (0.1733, 0.779, 0.935, 0.0301, 0.9833, 6_120_000),
    "export:bitsandbytes_int8": (0.1419, 0.810, 0.946, 0.00061, 0.9972, 10_470_000),
    "export:compressed_tensors_w4a16_g32": (0.1581, 0.794, 0.940, 0.0152, 0.9881, 6_410_000),
    "export:compressed_tensors_w4a16_g128": (0.2204, 0.702, 0.901, 0.0713, 0.9689, 6_020_000),
    "export:compressed_tensors_w8a16": (0.1413, 0.811, 0.947, 0.00031, 0.9979, 10_390_000),
}
PROMPTS = (
    ("Wake me at 7 tomorrow", '{"intent": "alarm", "time": "07:00", "day": "tomorrow"}'),
    (
        "Send 40 euros to Ana, but not from savings",
        '{"intent": "transfer", "amount": 40, "to": "Ana", "not_from": "savings"}',
    ),
    (MALICIOUS, '{"intent": "none"}'),
)


def row_nats(loss: float) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Summed nats and label counts of rows with this mean loss; much the same rows are hard for every loss."""
    random = np.random.default_rng(1)
    labels = random.integers(14, 52, size=ROWS)
    nats = labels * random.lognormal(0.0, 0.35, size=ROWS)
    nats *= np.random.default_rng(round(1e4 * loss)).lognormal(0.0, 0.04, size=ROWS)
    return tuple((nats / nats.sum() * labels.sum() * loss).tolist()), tuple(labels.tolist())


def evaluate(stage: str, loss: float, **changes: object) -> Evaluation:
    """A stage of this loss."""
    nats, labels = row_nats(loss)
    interval = ratio_interval(nats, labels, resampling=RESAMPLING)
    values: dict[str, object] = {
        "stage": stage,
        "runtime": "transformers",
        "nats_per_token": Score(loss, interval),
        "metrics": {},
        "row_nats": nats,
        "row_labels": labels,
        "bytes": 18_940_000,
        "tokens_per_second": 5210.4,
        "generated_tokens_per_second": None,
        "peak_bytes": 911_000_000,
    }
    return Evaluation(**(values | changes))  # type: ignore[arg-type]  # values are as the record names them


def sample_outputs(stage: str) -> tuple[Sample, ...]:
    if stage in ("base_16bit", "quantized_base"):
        return tuple(Sample(prompt, wanted, f"{prompt}\n\nReturn the {stage} of a") for prompt, wanted in PROMPTS)
    wrong = '{"intent": "transfer", "amount": 40, "to": "Ana"}'
    is_coarse = stage.endswith(("g128", "nf4"))
    return tuple(
        Sample(prompt, wanted, wrong if is_coarse and "Ana" in prompt else wanted) for prompt, wanted in PROMPTS
    )


def stage_evaluation(stage: str) -> Evaluation:
    loss, exact, slots, _, _, size = STAGES[stage]
    return evaluate(
        stage,
        loss,
        metrics={
            "exact_match": Score(exact, (max(0.0, exact - 0.04), min(1.0, exact + 0.04))),
            "slot_f1": Score(slots, (slots - 0.02, slots + 0.02)),
        },
        bytes=size,
        generated_tokens_per_second=148.2,
        samples=sample_outputs(stage),
    )


LAYERS = tuple(
    f"model.layers.{layer}.{name}"
    for layer in range(6)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
)
# Rung, method, merge base, validation loss, gain kept, KL.
ATTEMPTS = {
    "compressed_tensors_w4a16_g32": (
        (0, "round to nearest", "dequantized", 0.2411, 0.967, 0.0931),
        (2, "GPTQ + tuned scales", "dequantized", 0.1561, 0.9941, 0.0149),
        (2, "GPTQ + tuned scales", "original", 0.1612, 0.9925, 0.0177),
    ),
    "compressed_tensors_w4a16_g128": (
        (0, "round to nearest", "dequantized", 0.3013, 0.948, 0.1402),
        (4, "quantization-aware merging + tuned scales", "original", 0.2190, 0.9745, 0.0701),
    ),
    "compressed_tensors_w8a16": ((0, "round to nearest", "dequantized", 0.1401, 0.9999, 0.0003),),
}
WHY_ENDED = {
    "compressed_tensors_w4a16_g32": "rung 2 meets the bar",
    "compressed_tensors_w4a16_g128": "rung 4 is the last that the recipe allows",
    "compressed_tensors_w8a16": "rung 0 meets the bar",
}


def attempts(name: str) -> tuple[Attempt, ...]:
    """What was tried for a format; the nearest to the trained model was shipped."""
    tried = ATTEMPTS.get(name, ())
    best = min((kl for *_, kl in tried), default=0.0)
    return tuple(
        Attempt(
            rung=rung,
            method=method,
            merged_into=base,
            nats_per_token=loss,
            gain_kept=kept,
            interval=(kept - 0.001, kept + 0.001),
            kl_to_trained=kl,
            top1_agreement=1 - kl / 2,
            bytes=6_410_000,
            seconds=12.5 * (rung + 1),
            meets_bar=kept - 0.001 >= 0.98,
            is_shipped=kl == best,
        )
        for rung, method, base, loss, kept, kl in tried
    )


def survived(name: str) -> dict[str, float]:
    """The dead-zone meter of a format: coarser grids lose more, and the later layers most."""
    step = {"bitsandbytes_nf4": 0.052, "compressed_tensors_w4a16_g32": 0.004, "compressed_tensors_w4a16_g128": 0.02}
    return {layer: 1.0 - step.get(name, 0.0) * place for place, layer in enumerate(LAYERS)}


def exported(stage: str) -> ExportedModel:
    name = stage.removeprefix("export:")
    is_whole = name != "peft_adapter"
    return ExportedModel(
        format=name,
        bits=(8 if "8" in name.split("_g")[0].removesuffix("a16") else 4) if is_whole else 16,
        folder=Path("runs/quickstart/exports") / name,
        bytes=STAGES[stage][5] + 310_000,
        runtime="transformers",
        rung=next((attempt.rung for attempt in attempts(name) if attempt.is_shipped), 0),
        verified=True,
        verification="Loaded by transformers: mean KL 3.1e-07 nats over 512 tokens, bound 1.0e-04.",
        difference=3.1e-7,
        tolerance=1e-4,
        sha256={"config.json": "a4" * 32, "model.safetensors": "9c" * 32},
        merged_into=next((a.merged_into for a in attempts(name) if a.is_shipped), "dequantized") if is_whole else None,
        attempts=attempts(name),
        why_ended=WHY_ENDED.get(name),
        survived=survived(name) if is_whole else {},
        layers_16bit=("model.layers.0.odd",) if name.endswith("g128") else (),
        layers_raised=("model.layers.5.mlp.down_proj",) if name.endswith("g32") else (),
    )


@pytest.fixture(scope="session")
def measurements() -> Measurements:
    """What the stages of a run that went well hand on."""
    curve: list[tuple[int, float | None, float | None]] = [
        (step, 0.13 + 3.0 * 0.955**step + 0.02 * np.sin(step), 0.14 + 3.0 * 0.955**step if step % 50 == 0 else None)
        for step in range(0, 401, 10)
    ]
    layers = [
        LayerDistortion(
            name=f"model.layers.{layer}.{name}",
            shape=shape,
            sqnr_db=20.61 - 0.11 * layer - 0.3 * ("down" in name),
            relative_error=0.0932 + 0.001 * layer,
            max_error=0.0213,
            bits_per_parameter=4.127,
        )
        for layer in range(6)
        for name, shape in (
            ("self_attn.q_proj", (320, 320)),
            ("mlp.up_proj", (832, 320)),
            ("mlp.down_proj", (320, 832)),
        )
    ]
    return Measurements(
        evaluations=tuple(stage_evaluation(stage) for stage in STAGES),
        fidelity={
            stage: Fidelity(kl_to_trained=kl, top1_agreement=top1, tokens=2048)
            for stage, (_, _, _, kl, top1, _) in STAGES.items()
            if kl is not None and top1 is not None
        },
        exports=tuple(exported(stage) for stage in STAGES if stage.startswith("export:")),
        trained=TrainedAdapter(
            folder=Path("runs/quickstart/adapter"),
            steps=400,
            tokens=412_118,
            label_tokens=203_442,
            tokens_per_second=3871.2,
            label_tokens_per_second=1911.0,
            peak_bytes=1_288_490_188,
            predicted_peak_bytes=1_395_864_371,
            final_nats_per_token=0.1398,
            curve=tuple(curve),
            seconds=106.5,
            resumed_at=(200,),
            trainable_parameters=557_056,
        ),
        quantized=QuantizedModel(
            folder=Path("runs/quantized_bases/nf4-0123456789abcdef"),
            key="nf4-0123456789abcdef",
            bits=4,
            layers=tuple(layers),
            bits_per_parameter=4.127,
            bytes=6_120_000,
            reused=False,
        ),
        merged=MergedModel(
            folder=Path("runs/quickstart/merged"),
            into="dequantized",
            survived=survived("merged_16bit"),
            bytes=18_940_000,
            validation_nats={"dequantized": 0.1399, "original": 0.1431},
        ),
    )


@pytest.fixture(scope="session")
def circumstances() -> Circumstances:
    """A recipe with promises, and a machine."""
    return Circumstances(
        recipe_text="run:\n  name: quickstart\n  seed: 0\nlora:\n  rank: 16\n  alpha: 32.0\n",
        expected=Expected(
            hardware="2 CPU cores",
            measured="2026-11-22",
            nats_per_token={"adapter_unmerged": 0.142, "base_16bit": 3.2},
            within=0.02,
            metrics={"exact_match": 0.80},
            seconds=250.0,
            peak_gib=1.3,
        ),
        seconds=242.8,
        environment={
            "command": "qlora-trainer run recipes/quickstart.yaml",
            "hardware": "2 cores, AMD EPYC, 23 GiB",
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
            "bitsandbytes": "0.50.2",
        },
    )


@pytest.fixture(scope="session")
def report(measurements: Measurements, circumstances: Circumstances) -> RunReport:
    """The composed report of that run."""
    return compose(measurements=measurements, circumstances=circumstances, resampling=RESAMPLING)


@pytest.fixture(scope="session")
def notes() -> Notes:
    """An audit and an example row."""
    return Notes(
        name="quickstart",
        resampling=RESAMPLING,
        audit=(
            "4,000 training rows, none dropped, none cut.",
            "49.4 % of the tokens are trained.",
            "The stop token <|end|> is trained in every row.",
        ),
        example=(
            ("<|user|>\nWake me at 7 tomorrow<|end|>\n<|assistant|>\n", False),
            ('{"intent": "alarm", "time": "07:00", "day": "tomorrow"}<|end|>', True),
        ),
    )


@pytest.fixture(scope="session")
def resampling() -> Resampling:
    """The settings that ``report`` was composed with."""
    return RESAMPLING


@pytest.fixture(scope="session")
def evaluation_of() -> Callable[..., Evaluation]:
    """Makes the evaluation of a stage from its loss: rows are the same, and equally hard, for every loss."""
    return evaluate
