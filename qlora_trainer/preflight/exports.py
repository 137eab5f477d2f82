"""What the wanted files need and will be made by: problems, notes and sentences, before anything is loaded."""

from collections.abc import Iterator, Mapping

from qlora_trainer.export_formats import (
    FACTS,
    Package,
    bar_of,
    merge_bases,
    missing_modules,
    rungs_of,
    unfit_base_in_words,
    unfit_in_words,
    unfit_layers,
    unwritable,
)
from qlora_trainer.recipe import ExportFormat, Recipe


def climbs(recipe: Recipe, name: ExportFormat) -> tuple[int, ...]:
    """The rungs that may be tried for a format, in order."""
    return rungs_of(name, recipe.ladder, has_magnitudes=recipe.lora.use_dora)


def calibrated(recipe: Recipe) -> tuple[str, ...]:
    """What learns from calibration rows: the base, by its data type, and formats whose rounding may."""
    formats = tuple(name for name in recipe.export.formats if len(climbs(recipe, name)) > 1)
    kind = recipe.quantization.data_type
    return (f"quantization.data_type: {kind}", *formats) if kind == "gptq_int4" else formats


def package_findings(recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Problems and notes for packages that are not installed and for adapters that a format cannot hold."""
    return unwritable(recipe), tuple(_unreadable(recipe))


def layer_findings(recipe: Recipe, linears: Mapping[str, tuple[int, int]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Problems, or notes where the recipe allows 16-bit layers, for layers that a format's blocks do not divide.

    Args:
        recipe: what is asked for.
        linears: shape ``(out_features, in_features)`` by layer.
    """
    unfit_base = unfit_base_in_words(recipe.quantization, linears)
    problems = () if unfit_base is None else (unfit_base,)
    if not recipe.export.allow_16bit_layers:
        found = (unfit_in_words(name, linears) for name in recipe.export.formats)
        return (*problems, *(problem for problem in found if problem is not None)), ()
    unfit = {name: unfit_layers(name, linears) for name in recipe.export.formats}
    return problems, tuple(
        f"{name} leaves {', '.join(f'{layer} ({number})' for layer, number in layers.items())} in 16 bit, as "
        "export.allow_16bit_layers: true allows"
        for name, layers in unfit.items()
        if layers
    )


def row_problems(recipe: Recipe, *, training_rows: int) -> Iterator[str]:
    """More calibration rows than there are training rows."""
    wanted, names = recipe.calibration.rows, calibrated(recipe)
    if names and wanted > training_rows:
        yield (
            f"calibration.rows: {wanted:,} are asked for by {', '.join(names)}, and there are {training_rows:,} "
            f"training rows. Set calibration.rows: {training_rows} or give more training rows"
        )


def planned_export(recipe: Recipe, name: ExportFormat) -> str:
    """How one file will be made."""
    facts, bases = FACTS[name], merge_bases(recipe)
    checked = f"loaded again by {facts.runtime}, verified, evaluated"
    if facts.kind == "adapter":
        return f"written, {checked}"
    into = f"from {_both(bases)}"
    if facts.kind == "16bit":
        return f"{into}, {checked}"
    if facts.kind == "library":
        return f"rounded by its own library, {into}, {checked}"
    return f"{_ladder(recipe, name)}, {into}, {checked}"


def planned_merge(recipe: Recipe) -> str:
    """Which base the merged 16-bit file is made of."""
    bases = merge_bases(recipe)
    kept = ", the better on the validation rows is kept" if len(bases) > 1 else ""
    return f"into {_both(bases)}{kept}, saved as {recipe.merge.data_type}"


def _ladder(recipe: Recipe, name: ExportFormat) -> str:
    rungs, ladder = climbs(recipe, name), recipe.ladder
    text = f"rungs {', '.join(map(str, rungs))}" if len(rungs) > 1 else "rung 0"
    if len(rungs) > 1:
        text += f" until {100 * (bar_of(name, ladder) or 0):g} % of the gain are kept"
        text += f" on {recipe.calibration.rows:,} calibration rows"
    if ladder.minutes is not None and len(rungs) > 1:
        text += f", none begun after {ladder.minutes:g} minutes"
    return text


def _both(bases: tuple[str, ...]) -> str:
    return "both bases (dequantized, original)" if len(bases) > 1 else f"the {bases[0]} base"


def _unreadable(recipe: Recipe) -> Iterator[str]:
    """Formats that will be written and that no installed package can load."""
    unread: dict[Package, list[ExportFormat]] = {}
    for name in recipe.export.formats:
        facts = FACTS[name]
        if facts.package is not None and facts.kind != "library" and missing_modules(name):
            unread.setdefault(facts.package, []).append(name)
    for package, names in unread.items():
        missing = missing_modules(names[0])
        yield (
            f"{', '.join(names)} will be written but not verified: {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed. {package.install}"
        )
