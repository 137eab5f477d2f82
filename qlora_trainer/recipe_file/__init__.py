"""A recipe's YAML text in, a checked ``Recipe`` out; every problem of the text at once, each with its mend.

``document`` reads YAML into plain values and remembers where each stands, ``overrides`` puts ``--set`` on
top, ``problems`` words what is wrong, ``fields`` describes what can be written. Nothing here knows what a
setting does.
"""

from qlora_trainer.recipe_file.fields import ABSENT, FieldText, SectionText, describe
from qlora_trainer.recipe_file.loading import dump, load

__all__ = ["ABSENT", "FieldText", "SectionText", "describe", "dump", "load"]
