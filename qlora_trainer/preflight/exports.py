"""What the wanted files need and will be made by: problems, notes and sentences, before anything is loaded."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from qlora_trainer.export_formats import FACTS, bar_of, unfit_in_words, unfit_layers
from qlora_trainer.recipe import ExportFormat, Recipe

INSTALL = {"gguf": 'pip install "qlora-trainer[gguf]"', "gptqmodel": "pip install gptqmodel optimum"}
"""How to install what reads a format, by the module that shows whether it is there."""


def climbs(recipe: Recipe, name: ExportFormat) -> tuple[int, ...]:
    """The rungs that may be tried for a format, in order.

    As ``stages.export.rungs`` has it, which loads torch: DoRA has no rung 4, and formats that store all layers alike
    have no rung 5.
    """
    facts, ladder = FACTS[name], recipe.ladder
    if facts.kind != "integer":
        return (0,)
    start = ladder.start_rung_int8 if facts.bits >= 8 else ladder.start_rung_int4
    can_mix = facts.bits < 8 and not name.startswith("gptq_")
    missing = {4} if recipe.lora.use_dora else set[int]()
    missing |= set[int]() if can_mix else {5}
    return (0, *(rung for rung in range(max(start, 1), ladder.last_rung + 1) if rung not in missing))


def calibrated(recipe: Recipe) -> tuple[ExportFormat, ...]:
    """Formats whose rounding may learn from calibration rows."""
    return tuple(name for name in recipe.export.formats if len(climbs(recipe, name)) > 1)


def merge_bases(recipe: Recipe) -> tuple[str, ...]:
    """Bases that the adapter is merged into: the delta of LoftQ repairs the quantized one and belongs on no other."""
    if recipe.merge.into != "measured":
        return (recipe.merge.into,)
    return ("dequantized",) if recipe.lora.init == "loftq" else ("dequantized", "original")


def package_findings(recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Problems and notes for packages that are not installed and for adapters that a format cannot hold."""
    return tuple(_unwritable(recipe)), tuple(_unreadable(recipe))


def layer_findings(recipe: Recipe, linears: Mapping[str, tuple[int, int]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Problems, or notes where the recipe allows 16-bit layers, for layers that a format's blocks do not divide.

    Args:
        recipe: what is asked for.
        linears: shape ``(out_features, in_features)`` by layer.
    """
    if not recipe.export.allow_16bit_layers:
        found = (unfit_in_words(name, linears) for name in recipe.export.formats)
        return tuple(problem for problem in found if problem is not None), ()
    unfit = {name: unfit_layers(name, linears) for name in recipe.export.formats}
    return (), tuple(
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


def _unwritable(recipe: Recipe) -> Iterator[str]:
    formats = recipe.export.formats
    gguf = [name for name in formats if FACTS[name].runtime == "llama_cpp"]
    if gguf and find_spec("gguf") is None:
        yield (
            f"export.formats: {', '.join(gguf)} cannot be written: the package gguf is not installed. "
            f"{INSTALL['gguf']}, or remove them"
        )
    rounded = [name for name in gguf if FACTS[name].kind == "library"]
    if rounded and find_spec("llama_cpp") is None:
        yield (
            f"export.formats: {', '.join(rounded)} cannot be written: llama.cpp rounds them, and llama-cpp-python is "
            f"not installed. {INSTALL['gguf']}, or remove them"
        )
    if recipe.lora.use_dora and "gguf_adapter" in formats:
        yield (
            "export.formats: gguf_adapter cannot hold the magnitudes of lora.use_dora: true. Remove it and serve a "
            "merged GGUF format, such as gguf_q8_0, or set lora.use_dora: false"
        )


def _unreadable(recipe: Recipe) -> Iterator[str]:
    """Formats that will be written and that no installed package can load."""
    formats = recipe.export.formats
    read_by_llama = [name for name in formats if FACTS[name].runtime == "llama_cpp" and FACTS[name].kind != "library"]
    read_by_gptq = [name for name in formats if name.startswith("gptq_")]
    for names, modules, install in (
        (read_by_llama, ("llama_cpp",), INSTALL["gguf"]),
        (read_by_gptq, ("gptqmodel", "optimum"), INSTALL["gptqmodel"]),
    ):
        missing = [module for module in modules if find_spec(module) is None]
        if names and missing:
            yield (
                f"{', '.join(names)} will be written but not verified: {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not installed. {install}"
            )
