"""The exported files: how large, good and fast, how to load them, and how they were made."""

from collections.abc import Iterator

from qlora_trainer.pages.blocks import Block, Chart, Code, Fold, Grid, Heading, Key, Section, Text
from qlora_trainer.records import ExportFigures
from qlora_trainer.stages.report.heatmap import survived_map
from qlora_trainer.stages.report.inputs import Shown
from qlora_trainer.stages.report.loading import snippets
from qlora_trainer.stages.report.making import Making, makings, merge_base_in_words, survived_table
from qlora_trainer.stages.report.tables import exports_table, status_cell
from qlora_trainer.stages.report.tradeoff import tradeoff

SHADES = tuple(Key(f"heat h{level}", "100 %" if level == 0 else f"{95 - 10 * level} %") for level in range(0, 10, 3))


def exports(shown: Shown) -> Section:
    """Size, quality and speed of every file, and how to load it."""
    return Section("exports", "Exports", tuple(_exports(shown)))


def making(shown: Shown) -> Section:
    """Everything that was tried, and why it ended."""
    return Section("making", "How each file was made", tuple(_making(shown)))


def survived(shown: Shown) -> Section:
    """The dead-zone meter of every file."""
    table = survived_table(shown.report.exports)
    told = "Share of each layer's learned change that is in the file: 100 % all of it, 0 % nothing."
    if not table.rows:
        return Section("survived", "What survived of the learned delta", ())
    return Section(
        "survived",
        "What survived of the learned delta",
        (
            Text(told, is_soft=True),
            Grid(table, "wide"),
            Chart(
                survived_map(shown.report.exports),
                "Layers from left to right. The stronger the colour, the less survived.",
                SHADES,
            ),
        ),
        short="What survived",
    )


def _exports(shown: Shown) -> Iterator[Block]:
    report = shown.report
    if not report.exports:
        return
    chosen = "none" if report.choice is None else report.choice.format
    yield Text(chosen, lead="Recommended:")
    yield Chart(
        tradeoff(report),
        "Size of the files on disk; quality with its interval; speed on the machine of this run, in the runtime that "
        "loaded the file: another machine or server gives another speed.",
        (Key("bar trained", "recommended"), Key("bar export", "other files"), Key("bar stage", "16-bit base")),
    )
    yield Grid(exports_table(report), "exports")
    why = next((export.why_null for export in report.exports if export.why_null is not None), "")
    if why:
        yield Text(f"Gain kept is not given: {why}.", is_soft=True)
    yield Heading("How to load each file")
    yield from (_loading(export, shown, is_open=export.format == chosen) for export in report.exports)


def _loading(export: ExportFigures, shown: Shown, *, is_open: bool) -> Fold:
    base = str(shown.measurements.quantized.folder)
    checksums = "\n".join(f"{digest}  {name}" for name, digest in sorted(export.sha256.items()))
    blocks: list[Block] = [Text(export.verification, tone=status_cell(export).tone)]
    loaded = snippets(
        export, quantized_base=base, served_rank=shown.notes.served_rank, unpacks_base=shown.notes.unpacks_base
    )
    blocks += [Code(snippet.title, snippet.text) for snippet in loaded]
    if checksums:
        code = Code("For sha256sum --check, in the folder of the file", checksums)
        blocks.append(Fold("SHA-256 of its files", (code,)))
    return Fold(export.format, tuple(blocks), note=export.path, is_open=is_open)


def _making(shown: Shown) -> Iterator[Block]:
    base = merge_base_in_words(shown.measurements.merged)
    made = makings(shown.report.exports)
    if base:
        yield Text(base)
    if made:
        told = "Figures of attempts come from the validation rows, which alone choose; those above from the test rows."
        yield Text(told, is_soft=True)
    for each in made:
        yield from _attempts(each)


def _attempts(made: Making) -> Iterator[Block]:
    yield Heading(made.format)
    if made.asked:
        yield Text(made.asked, is_soft=True)
    if made.attempts.rows:
        yield Grid(made.attempts, "attempts")
    yield from (Text(remark) for remark in made.remarks)
