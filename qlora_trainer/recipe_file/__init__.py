"""A recipe's YAML text in, a checked ``Recipe`` out; every problem of the text at once, each with its mend.

``document`` reads YAML into plain values and remembers where each stands, ``overrides`` puts ``--set`` on
top, ``problems`` words what is wrong, ``fields`` describes what can be written, ``shipped`` finds the recipes that come
with the package, ``sweeps`` reads the settings of a trial. Nothing here knows what a setting does.
"""

from qlora_trainer.recipe_file.fields import ABSENT, FieldText, SectionText, describe
from qlora_trainer.recipe_file.loading import dump, dump_short, load
from qlora_trainer.recipe_file.shipped import shipped_folder, shipped_recipe, shipped_recipes
from qlora_trainer.recipe_file.sweeps import trial_overrides

__all__ = [
    "ABSENT",
    "FieldText",
    "SectionText",
    "describe",
    "dump",
    "dump_short",
    "load",
    "shipped_folder",
    "shipped_recipe",
    "shipped_recipes",
    "trial_overrides",
]
