"""A comparison as ``compare`` finds one: two methods at 8 bits, three at 4, one that failed."""

from dataclasses import replace

from qlora_trainer.records import Comparison, ComparisonRow, LayerOutliers, Recommendation, Score
from qlora_trainer.stages.compare.judging import failed_row

MIB = 2**20
BASE = ComparisonRow(
    method="16bit",
    what="the model as it is",
    weight_bits=16,
    activation_bits=16,
    nats_per_token=Score(1.2246, (1.1, 1.3)),
    added_nats=Score(0.0, (0.0, 0.0)),
    metrics={"exact_match": Score(0.5, (0.4, 0.6)), "bleu": Score(12.5, (11.0, 14.0))},
    kl=0.0,
    bytes=8 * MIB,
    peak_bytes=120 * MIB,
    prefill_tokens_per_second=2000.0,
    decode_tokens_per_second=100.0,
    seconds=0.0,
    is_on_front=True,
)


def method(name: str, bits: int, added: float, size: float, **changes: object) -> ComparisonRow:
    """A row that adds so much to the loss, within a tenth, and takes so many MiB."""
    values: dict[str, object] = {
        "method": name,
        "what": f"{name} in words",
        "weight_bits": bits,
        "nats_per_token": Score(1.2246 + added, (1.1, 1.3)),
        "added_nats": Score(added, (0.9 * added, 1.1 * added)),
        "kl": added / 2,
        "bytes": round(size * MIB),
        "seconds": 1.25,
        "is_simulated": True,
        "is_on_front": False,
    }
    return replace(BASE, **{**values, **changes})  # type: ignore[arg-type]  # values are as the record names them


COMPARISON = Comparison(
    recipe="tiny",
    model="trained",
    test_rows=1200,
    confidence=0.95,
    rows=(
        BASE,
        replace(
            method("gptq_int4", 4, 0.01, 3.0, layers_16bit=("model.layers.0.mlp.down_proj",)),
            nats_per_token=Score(1.2346, (1.1, 1.3)),
            is_on_front=True,
        ),
        method("rtn_int4", 4, 0.08, 3.0),
        method("nf4", 4, 0.03, 2.5, is_simulated=False, is_on_front=True),
        method("rtn_int8", 8, 0.0004, 5.0, is_on_front=True),
        method("smoothquant_w8a8", 8, 0.0005, 5.0, activation_bits=8, note="alpha 0.5 at 12 of 12 norms"),
        failed_row("awq_int4", ValueError("a | b <script> *bold*")),
    ),
    outliers=(
        LayerOutliers("model.layers.0.mlp.down_proj", 61.5, float("inf"), 0.25, tuple(range(40)), 100),
        LayerOutliers("model.layers.1.mlp.down_proj", 3.0, 1.5, 0.0, (), 100),
    ),
    systematic=(11, 40),
    recommendation=Recommendation("gptq_int4", "the smallest [of three] that meet the bounds"),
    settings={
        "model": "trained",
        "methods": ["gptq_int4", "rtn_int4"],
        "group_size": 64,
        "most_added_nats": 0.02,
        "most_mib": None,
        "allow_16bit_layers": True,
    },
    recipe_text="run: {name: tiny}\n",
    environment={"processor": "a <fast> one", "torch": "2.13.0"},
    command="qlora-trainer compare recipes/tiny.yaml --set 'run.name=tiny'",
)
