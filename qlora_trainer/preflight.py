"""What a run would do and need, found out before anything is loaded: the ``check`` command.

Reads the recipe, the base model's headers and the data files; imports no torch and no transformers, so that the
answer comes within a second. Problems are gathered, not raised, so that all of them are told at once.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import yaml

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.data.scoring import require_packages
from qlora_trainer.data.sources import read_rows
from qlora_trainer.errors import DataError, RunFolderError, TrainerError
from qlora_trainer.numerics import footprint
from qlora_trainer.numerics.footprint import Footprint, TrainingLoad
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.recipe import Data, Recipe, Training
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.runtime.memory import available_bytes, free_disk_bytes
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.stages import base_model, dataset
from qlora_trainer.stages.dataset import TaskRows
