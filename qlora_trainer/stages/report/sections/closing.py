"""What one looks up at the end: the terms, the machine, the recipe."""

import hashlib

from qlora_trainer.pages.blocks import Block, Code, Fold, Section, Terms
from qlora_trainer.stages.report.glossary import GLOSSARY
from qlora_trainer.stages.report.inputs import Shown


def terms(shown: Shown) -> Section:
    """What the figures mean."""
    return Section("terms", "What the figures mean", (Terms(GLOSSARY),))


def environment(shown: Shown) -> Section:
    """Machine, versions, hashes, and the recipe with all its defaults."""
    report = shown.report
    hashes = (
        ("recipe, SHA-256", hashlib.sha256(report.recipe.encode("utf-8", "surrogatepass")).hexdigest()),
        ("quantized base", shown.measurements.quantized.key),
    )
    blocks: tuple[Block, ...] = (
        Terms((*report.environment.items(), *hashes)),
        Fold("Resolved recipe", (Code("recipe.yaml of the run folder", report.recipe, "yaml"),)),
    )
    return Section("environment", "Environment and recipe", blocks)
