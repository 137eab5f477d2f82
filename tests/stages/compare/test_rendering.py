import json
from pathlib import Path

from qlora_trainer.records import Comparison, ComparisonRow, LayerOutliers, Recommendation, Score
from qlora_trainer.stages.compare.judging import failed_row
from qlora_trainer.stages.compare.rendering import markdown, write

ROW = ComparisonRow(
    "rtn_int4",
    "words",
    4,
    16,
    nats_per_token=Score(1.23456, (1.1, 1.3)),
    added_nats=Score(0.01, (-0.001, 0.02)),
    metrics={"bleu": Score(12.3, (11.0, 13.0))},
    kl=0.00123,
    bytes=3 * 2**20,
    peak_bytes=100 * 2**20,
    prefill_tokens_per_second=1234.4,
    decode_tokens_per_second=99.6,
    is_simulated=True,
    seconds=1.25,
    is_on_front=True,
    layers_16bit=("model.layers.0.mlp.down_proj",),
)
COMPARISON = Comparison(
    recipe="tiny",
    model="base",
    test_rows=12,
    confidence=0.95,
    rows=(ROW, failed_row("nf4", ValueError("a | b <script> *bold*"))),
    outliers=(
        LayerOutliers("model.layers.0.mlp.down_proj", 61.5, float("inf"), 0.25, tuple(range(12)), 100),
        LayerOutliers("model.layers.1.mlp.down_proj", 3.0, 1.5, 0.0, (), 100),
    ),
    systematic=(11, 40),
    recommendation=Recommendation("rtn_int4", "the smallest [of one]"),
)


def test_a_row_holds_every_figure_and_brackets_speeds_that_are_not_its_own() -> None:
    line = next(line for line in markdown(COMPARISON).splitlines() if line.startswith("| rtn_int4"))
    assert line == (
        "| rtn_int4 * | W4A16 | 1.2346 [1.1000, 1.3000] | +0.0100 [-0.0010, +0.0200] | 12.3 [11, 13] | 0.00123 "
        "| 3.00 | 100 | (1234) | (100) | 1.2 |"
    )


def test_what_failed_is_listed_with_its_reason_escaped() -> None:
    text = markdown(COMPARISON)
    assert r"- nf4: a \| b \<script\> \*bold\*" in text
    assert "| nf4 |" not in text
    assert r"**Recommended: rtn_int4**, the smallest \[of one\]." in text
    assert "- rtn_int4: in 16 bit: model.layers.0.mlp.down_proj" in text


def test_outliers_are_listed_from_the_largest_on() -> None:
    lines = [line for line in markdown(COMPARISON).splitlines() if line.startswith("| model.layers")]
    assert lines == [
        "| model.layers.0.mlp.down_proj | 61.5 | - | 25.0 % | 0, 1, 2, 3, 4, 5, 6, 7 .. |",
        "| model.layers.1.mlp.down_proj | 3.0 | 1.5 x | 0.0 % | none |",
    ]
    assert "(LLM.int8, section 4): 11, 40." in markdown(COMPARISON)


def test_both_files_are_written_and_the_json_is_strict(tmp_path: Path) -> None:
    as_json, as_markdown = write(COMPARISON, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(as_json.read_text(), parse_constant=refuse)
    assert found["rows"][0]["nats_per_token"] == {"value": 1.23456, "interval": [1.1, 1.3]}
    assert found["rows"][1]["failed"] == "a | b <script> *bold*"
    assert found["outliers"][0]["spread"] is None
    assert as_markdown.read_text() == markdown(COMPARISON)
