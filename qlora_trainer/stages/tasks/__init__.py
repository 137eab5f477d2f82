"""Public and local task files on any model of a run, through lm-evaluation-harness (extra ``eval``).

``language_model`` is a model as the harness asks it, ``harness`` runs a task, ``folders`` finds task files, ``table``
sets the models side by side, ``subject`` names one of them. The harness is imported here and nowhere else.
"""

from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.stages.tasks.folders import PROBES, PROBES_FOLDER, folder_fingerprint
from qlora_trainer.stages.tasks.harness import HARNESS_VERSION, Library, TaskPlan, open_library, run_task
from qlora_trainer.stages.tasks.subject import TaskSubject
from qlora_trainer.stages.tasks.table import rows_of

__all__ = [
    "HARNESS_VERSION",
    "PROBES",
    "PROBES_FOLDER",
    "Library",
    "TaskPlan",
    "TaskSubject",
    "TextTokenizer",
    "folder_fingerprint",
    "open_library",
    "rows_of",
    "run_task",
]
