"""The comparison as a file: JSON for programs, Markdown for people."""

import json
import math
from pathlib import Path

from pydantic_core import to_jsonable_python

from qlora_trainer.records import Comparison, ComparisonRow, Score
from qlora_trainer.runtime.atomic import write_text
from qlora_trainer.stages.compare.judging import MIB

JSON_FILE = "compare.json"
MARKDOWN_FILE = "compare.md"
_NOTHING = "-"


def write(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """Writes ``compare.json`` and ``compare.md`` into a folder; gives both paths."""
    files = folder / JSON_FILE, folder / MARKDOWN_FILE
    plain = to_jsonable_python(comparison, inf_nan_mode="null")
    write_text(files[0], json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    write_text(files[1], markdown(comparison))
    return files


def markdown(comparison: Comparison) -> str:
    """The table, the recommendation, what failed and the outliers."""
    metrics = list(dict.fromkeys(name for row in comparison.rows for name in row.metrics or {}))
    head = ["method", "bits", "nats/token", "above 16 bit", *metrics, "KL", "MiB", "peak MiB", "prefill tok/s"]
    head += ["decode tok/s", "quantizing s"]
    lines = [
        f"# Quantization methods on {_text(comparison.recipe)}",
        "",
        f"The {comparison.model} model; {comparison.test_rows} test rows; intervals of {comparison.interval_words}, "
        "above 16 bit paired. * = on the front of size and loss. Speed in brackets: integers were dequantized before "
        "they were multiplied, so it is not the method's.",
        "",
        _row(head),
        _row(["---"] * len(head)),
        *(_row(_cells(row, metrics)) for row in comparison.rows if row.failed is None),
        "",
        f"**Recommended: {comparison.recommendation.method}**, {_text(comparison.recommendation.why)}.",
    ]
    failed = [row for row in comparison.rows if row.failed is not None]
    if failed:
        lines += ["", "Not measured:", "", *(f"- {row.method}: {_text(row.failed or '')}" for row in failed)]
    notes = [row for row in comparison.rows if row.note or row.layers_16bit]
    if notes:
        lines += ["", "Notes:", "", *(f"- {row.method}: {_note(row)}" for row in notes)]
    return "\n".join([*lines, *_outliers(comparison)]) + "\n"


def _cells(row: ComparisonRow, metrics: list[str]) -> list[str]:
    scores = row.metrics or {}
    return [
        f"{row.method}{' *' if row.is_on_front else ''}",
        row.bits,
        _score(row.nats_per_token, "{:.4f}"),
        _score(row.added_nats, "{:+.4f}"),
        *(_score(scores.get(name), "{:.3g}") for name in metrics),
        _number(row.kl, "{:.5f}"),
        _number(None if row.bytes is None else row.bytes / MIB, "{:.2f}"),
        _number(None if row.peak_bytes is None else row.peak_bytes / MIB, "{:.0f}"),
        _speed(row, row.prefill_tokens_per_second),
        _speed(row, row.decode_tokens_per_second),
        _number(row.seconds, "{:.1f}"),
    ]


def _outliers(comparison: Comparison) -> list[str]:
    if not comparison.outliers:
        return []
    worst = sorted(comparison.outliers, key=lambda each: -each.magnitude)[:10]
    head = ["layer", "largest input", "over the median input's", "tokens with 6.0 or more", "outlier dimensions"]
    systematic = ", ".join(map(str, comparison.systematic)) or "none"
    return [
        "",
        "## Activation outliers",
        "",
        f"Inputs of each layer on {worst[0].tokens:,} calibration tokens, the ten largest of "
        f"{len(comparison.outliers)}. Dimensions of the hidden state that are outliers in a quarter of the layers "
        f"(LLM.int8, section 4): {systematic}.",
        "",
        _row(head),
        _row(["---"] * len(head)),
        *(
            _row(
                [
                    _text(each.layer),
                    f"{each.magnitude:.1f}",
                    "-" if math.isinf(each.spread) else f"{each.spread:.1f} x",
                    f"{100 * each.token_share:.1f} %",
                    ", ".join(map(str, each.dimensions[:8])) + (" .." if len(each.dimensions) > 8 else "") or "none",
                ]
            )
            for each in worst
        ),
    ]


def _note(row: ComparisonRow) -> str:
    left = f"in 16 bit: {', '.join(row.layers_16bit)}" if row.layers_16bit else ""
    return _text("; ".join(part for part in (row.note, left) if part))


def _score(score: Score | None, pattern: str) -> str:
    if score is None:
        return _NOTHING
    low, high = (pattern.format(end) for end in score.interval)
    return f"{pattern.format(score.value)} [{low}, {high}]"


def _number(value: float | None, pattern: str) -> str:
    return _NOTHING if value is None else pattern.format(value)


def _speed(row: ComparisonRow, value: float | None) -> str:
    text = _number(value, "{:.0f}")
    return f"({text})" if row.is_simulated and value is not None else text


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    """Text of unknown origin that cannot break a table or become markup."""
    plain = " ".join(text.split())
    return "".join(f"\\{character}" if character in "|*`<>[]#" else character for character in plain)
