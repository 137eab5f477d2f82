"""The recipe's data section -> encoded, split and audited rows.

Knows the recipe and the order of the steps; how each step works is in ``data``. Nothing here imports torch, so
that ``check`` can show what would be trained. ``files`` finds what the recipe names, ``encoding`` writes the rows into
a folder, ``cache`` keeps that folder for the next time, ``rows`` is what training and evaluation read.
"""

from qlora_trainer.stages.dataset.cache import load_rows
from qlora_trainer.stages.dataset.files import absent_sources, file_problems
from qlora_trainer.stages.dataset.rows import TaskRows, audit_lines, render_example, token_fingerprint
from qlora_trainer.stages.dataset.template import with_chat_template

__all__ = [
    "TaskRows",
    "absent_sources",
    "audit_lines",
    "file_problems",
    "load_rows",
    "render_example",
    "token_fingerprint",
    "with_chat_template",
]
