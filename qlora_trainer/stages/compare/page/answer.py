"""The answer, before anything else: which method to take, what it costs, and how to get its file."""

from collections.abc import Iterator, Mapping

from qlora_trainer.export_formats import FACTS as FORMATS
from qlora_trainer.pages.blocks import Code, Fact, Facts
from qlora_trainer.pages.page import Answer
from qlora_trainer.pages.tables import Tone
from qlora_trainer.pages.wording import (
    METRIC_TITLES,
    count_of,
    duration,
    interval,
    metric,
    percent,
    signed_nats,
    significant,
    size,
)
from qlora_trainer.recipe import ExportFormat
from qlora_trainer.records import Comparison, ComparisonRow
from qlora_trainer.stages.compare.methods import REFERENCE
from qlora_trainer.stages.compare.page.reading import measured, reference

OWN_FORMATS: Mapping[str, ExportFormat] = {
    "nf4": "bitsandbytes_nf4",
    "llm_int8": "bitsandbytes_int8",
    "rtn_int8": "compressed_tensors_w8a16",
    "rtn_w8a8": "compressed_tensors_w8a8",
    "smoothquant_w8a8": "compressed_tensors_w8a8",
}


def answer(comparison: Comparison) -> Answer:
    """The recommended method; where none meets the bounds, that and the nearest."""
    advice = comparison.recommendation
    row = next(row for row in comparison.rows if row.method == advice.method)
    tone: Tone = "good" if advice.is_within_bounds else "warn"
    return Answer(
        question="Take this method" if advice.is_within_bounds else "No method meets the recipe's bounds; the nearest",
        name="16bit: do not quantize" if row.method == REFERENCE else row.method,
        why=f"{advice.why[:1].upper()}{advice.why[1:]}.",
        tone=tone,
        figures=Facts(tuple(_figures(row, reference(comparison)))),
        commands=tuple(_commands(comparison)),
    )


def sentence(comparison: Comparison) -> str:
    """The best of each number of bits beside each other: what choosing between them is about."""
    rows, base = measured(comparison), reference(comparison)
    best = [
        f"the best at {bits} bits, {row.method}, changes the loss by {signed_nats(row.added_nats.value)} nats per "
        f"token in {percent((row.bytes or 0) / (base.bytes or 1), 0)} of the size"
        for bits in (8, 4)
        if (row := _best(rows, bits)) is not None and row.added_nats is not None
    ]
    tests = f"the same {count_of(comparison.test_rows)} test rows"
    told = f"{len(rows) - 1} methods on the {comparison.model} model, measured on {tests}"
    return f"{told}: {'; '.join(best)}." if best else f"{told}."


def headline(comparison: Comparison) -> Facts:
    """The comparison in a few figures."""
    return Facts(tuple(_headline(comparison)))


def export_format(row: ComparisonRow, comparison: Comparison) -> ExportFormat | None:
    """The format of ``export.formats`` that holds a method's bits; None where there is none."""
    if row.method in OWN_FORMATS:
        return OWN_FORMATS[row.method]
    if row.bits != "W4A16" or row.method == "fp4":
        return None
    grouped = f"compressed_tensors_w4a16_g{comparison.settings.get('group_size')}"
    return next((name for name in FORMATS if name == grouped), None)


def _commands(comparison: Comparison) -> Iterator[Code]:
    advice = comparison.recommendation
    row = next(row for row in comparison.rows if row.method == advice.method)
    name = export_format(row, comparison)
    if name is None or not comparison.command or comparison.model != "trained" or not advice.is_within_bounds:
        return
    run = comparison.command.replace(" compare ", " run ", 1)
    climbs = "; integers are chosen by the export's own ladder" if FORMATS[name].kind == "integer" else ""
    yield Code(f"To get a verified file of these bits{climbs}", f"{run} --set 'export.formats=[{name}]'", "sh")


def _best(rows: tuple[ComparisonRow, ...], bits: int) -> ComparisonRow | None:
    found = [row for row in rows if row.weight_bits == bits and row.nats_per_token is not None]
    return min(found, key=lambda row: row.nats_per_token.value if row.nats_per_token else 0.0, default=None)


def _figures(row: ComparisonRow, base: ComparisonRow) -> Iterator[Fact]:
    if row.added_nats is not None and row.method != REFERENCE:
        ends = interval(row.added_nats.interval, signed_nats)
        yield Fact("Costs in loss", signed_nats(row.added_nats.value), f"nats per token above 16 bit ({ends})")
    for name, score in list((row.metrics or {}).items())[:2]:
        known = (base.metrics or {}).get(name)
        note = "" if known is None or row is base else f"{metric(name, known.value)} in 16 bit"
        yield Fact(METRIC_TITLES.get(name, name), metric(name, score.value), note)
    if row.bytes is not None and base.bytes is not None:
        note = "" if row is base else f"{percent(row.bytes / base.bytes, 0)} of 16 bit, {size(base.bytes)}"
        yield Fact("Costs in space", size(row.bytes), note)
    yield from _speed(row, base)
    if row.seconds:
        yield Fact("Quantizing took", duration(row.seconds), "on the machine named below")


def _speed(row: ComparisonRow, base: ComparisonRow) -> Iterator[Fact]:
    ours, theirs = row.decode_tokens_per_second, base.decode_tokens_per_second
    if row.is_simulated:
        yield Fact("Speed", "not measured", "integers were dequantized first here: a speed that is not its own")
    elif ours is not None:
        note = "" if theirs is None or row is base else f"; 16 bit {significant(theirs, 3)}"
        yield Fact("Speed here", significant(ours, 3), f"generated tokens/s{note}")


def _headline(comparison: Comparison) -> Iterator[Fact]:
    methods = [row for row in comparison.rows if row.method != REFERENCE]
    done = [row for row in methods if row.failed is None]
    tone: Tone = "plain" if len(done) == len(methods) else "warn"
    yield Fact("Methods measured", f"{len(done)} of {len(methods)}", "beside the 16-bit model", tone)
    front = sum(row.is_on_front for row in measured(comparison))
    yield Fact("On the front", count_of(front), "no other is both smaller and better")
    loss = reference(comparison).nats_per_token
    if loss is not None:
        ends = interval(loss.interval, lambda end: f"{end:.3f}")
        yield Fact("Loss in 16 bit", f"{loss.value:.3f}", f"nats per token ({ends})")
    yield Fact("Test rows", count_of(comparison.test_rows), f"intervals of {comparison.interval_words}, paired by row")
