"""What one looks up at the end: the terms, the settings, how to repeat it, the machine."""

import json
from collections.abc import Iterator

from qlora_trainer.pages.blocks import Block, Code, Fold, Section, Terms, Text
from qlora_trainer.pages.glossary import INTERVAL, LOSS, METRICS, PERPLEXITY
from qlora_trainer.records import Comparison

GLOSSARY: tuple[tuple[str, str], ...] = (
    LOSS,
    (
        "Above 16 bit",
        "Loss of the method minus that of the 16-bit model on the same rows, with its paired interval: the rows that "
        "are drawn again are the same for both, so that it is far narrower than that of either loss.",
    ),
    PERPLEXITY,
    INTERVAL,
    METRICS,
    (
        "Bits",
        "W4A8KV4 means weights in 4 bits, inputs of the quantized layers in 8, the key-value cache in 4. 16 bits of "
        "cache are not written.",
    ),
    (
        "KL to 16 bit",
        "Kullback-Leibler divergence: how far the next-token probabilities are from those of the 16-bit model, "
        "averaged over answer tokens. 0 means the same model.",
    ),
    (
        "Size",
        "Bytes of the stored weights: integers, scales and whatever stays in 16 bit. Files add a few kilobytes of "
        "names and a tokenizer.",
    ),
    (
        "Front",
        "The methods that no other beats: whatever is smaller has a higher loss, whatever has a lower loss is larger. "
        "Which one of them to take is a matter of what matters more (compare.prefer).",
    ),
    (
        "Prefill and decode tokens/s, peak memory",
        "Tokens scored per second of forward passes, tokens generated per second of one batch, and the largest memory "
        "of the process while measuring, on the machine named below.",
    ),
    ("Quantizing", "Time from the 16-bit weights to the method's, calibration and training included."),
    (
        "Outlier dimension",
        "An input of a layer that reaches 6.0 in at least 6 % of the tokens; systematic where it is one in a quarter "
        "of the layers that read the hidden state (LLM.int8, arXiv 2208.07339, section 4). Activations with outliers "
        "are hard to quantize: one scale has to span them and everything else.",
    ),
)


def terms(comparison: Comparison) -> Section:
    """What the figures mean."""
    return Section("terms", "What the figures mean", (Terms(GLOSSARY),))


def settings(comparison: Comparison) -> Section:
    """What was asked for, and how to ask again."""
    return Section("settings", "Settings, and how to repeat this", tuple(_settings(comparison)), short="Settings")


def environment(comparison: Comparison) -> Section:
    """Machine and versions."""
    pairs = tuple(comparison.environment.items())
    return Section("environment", "Environment", (Terms(pairs),) if pairs else ())


def _settings(comparison: Comparison) -> Iterator[Block]:
    pairs = tuple((name, _text(value)) for name, value in comparison.settings.items())
    if pairs:
        yield Text("Section compare of the recipe, defaults included:", is_soft=True)
        yield Terms(pairs)
    if comparison.command:
        yield Code("To repeat it", comparison.command, "sh")
        told = "Finished methods are read back from the run folder: other bounds or another preference measure nothing."
        yield Text(told, is_soft=True)
    if comparison.recipe_text:
        yield Fold("Resolved recipe", (Code("recipe.yaml of the run folder", comparison.recipe_text, "yaml"),))


def _text(value: object) -> str:
    """A setting as YAML has it on one line."""
    return value if isinstance(value, str) else "absent" if value is None else json.dumps(value).replace('"', "")
