"""Tasks of lm-evaluation-harness on the models of a run, each pair of model and task once.

Not imported with the rest of the pipeline: it needs the extra ``eval``.
"""

import difflib
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import get_args

from torch import nn

from qlora_trainer.errors import RunFolderError
from qlora_trainer.export_formats import missing_modules
from qlora_trainer.pipeline.journey import run
from qlora_trainer.pipeline.ledger import Ledger
from qlora_trainer.pipeline.run_models import ModelsOnDisk
from qlora_trainer.pipeline.task_file import write_rows
from qlora_trainer.recipe import ExportFormat, Recipe
from qlora_trainer.records import TaskEvaluation, TaskRow
from qlora_trainer.runtime.atomic import sha256_of_files
from qlora_trainer.runtime.device import seed_everything, set_threads
from qlora_trainer.runtime.progress import Observer, Silent
from qlora_trainer.runtime.run_folder import RunFolder, fingerprint
from qlora_trainer.serving import EXPORT_PREFIX, short_name, stage_name
from qlora_trainer.stages import base_model, report, tasks
from qlora_trainer.stages.opening import ModelFiles

CARD = "README.md"
OUTLANDISH = re.compile(r"[^\w.-]")
"""What a task's name may hold and a file's name should not."""
WIDEST = 4096
"""Tokens of an item at most, whatever the base was made for."""


@dataclass(frozen=True)
class TaskRequest:
    """What is asked of which models.

    Attributes:
        tasks: names; ``probes`` stands for the package's own.
        stages: names as in report.json or shorter; empty = every model of the run that can be opened here.
        folder: the user's own task files; None = none.
        limit: items of a task at most; None = all.
        is_chat: whether items go through the base model's chat template.
    """

    tasks: tuple[str, ...]
    stages: tuple[str, ...] = ()
    folder: Path | None = None
    limit: int | None = None
    is_chat: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every task once, ``probes`` spelt out."""
        parts = (tasks.PROBES if name == "probes" else (name,) for name in self.tasks)
        return tuple(dict.fromkeys(name for part in parts for name in part))

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where task files are looked for; the user's come last and win."""
        return (tasks.PROBES_FOLDER, *([] if self.folder is None else [self.folder]))


def evaluate_tasks(
    recipe: Recipe, request: TaskRequest, *, observer: Observer | None = None, trust_remote_code: bool = False
) -> tuple[TaskRow, ...]:
    """Asks the tasks of each model; keeps the figures in the run's folder and, where there is a report, in that.

    Args:
        recipe: whose run it is.
        request: what is asked.
        observer: told of each pair of model and task.
        trust_remote_code: allow Python code that comes with the model.

    Returns:
        The rows of this request, in the order of the models.

    Raises:
        RunFolderError: the run has no such model.
        DataError: there is no such task, or it cannot be asked.
    """
    set_threads(recipe.run.threads)
    seed_everything(recipe.run.seed)
    watcher = observer or Silent()
    root = Path(recipe.run.folder) / recipe.run.name
    with RunFolder.open(root, recipe.model_dump(mode="json"), shaping=recipe.shaping) as folder:
        asking = Asking(recipe, request, folder, watcher, trust_remote_code=trust_remote_code)
        rows = tasks.rows_of(asking.everything(), report.resampling_of(recipe))
        write_rows(folder.tasks_json, rows)
    if folder.report_json.is_file():
        run(recipe, until="report", observer=watcher, trust_remote_code=trust_remote_code)
    return rows


class Asking:
    """The models of one run, and what is asked of them."""

    def __init__(
        self, recipe: Recipe, request: TaskRequest, folder: RunFolder, observer: Observer, *, trust_remote_code: bool
    ) -> None:
        self.recipe, self.request, self.folder, self.observer = recipe, request, folder, observer
        self.models = ModelsOnDisk(recipe, folder, trust_remote_code=trust_remote_code)
        self.ledger = Ledger(folder, observer)

    def everything(self) -> Iterator[TaskEvaluation]:
        """Each model on each task, the model loaded where a task is new to it and let go before the next."""
        subjects = [self.subject(name) for name in self.stages()]
        with tasks.open_library(self.request.names, self.request.folders) as library:
            for subject in subjects:
                open_model = _once(partial(self._open, subject.stage))
                for name in library.names:
                    evaluation = self._asked(name, subject, library, open_model)
                    if evaluation.truncated:
                        self.observer.note(
                            f"{name} on {subject.stage}: {evaluation.truncated} requests were longer than "
                            f"{evaluation.window} tokens; their beginning was cut off"
                        )
                    yield evaluation
                del open_model
                gc.collect()

    def stages(self) -> tuple[str, ...]:
        """The models that are asked.

        Raises:
            RunFolderError: the run has not one of those that were named.
        """
        there = tuple(self._there())
        if not self.request.stages:
            return tuple(self._openable(there))
        wanted = tuple(stage_name(name) for name in self.request.stages)
        absent = [name for name in self.request.stages if stage_name(name) not in there]
        if absent:
            has = tuple(dict.fromkeys(short_name(name) for name in there))
            near = difflib.get_close_matches(absent[0], has, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise RunFolderError(
                f"{self.folder.root} has no model {', '.join(absent)}.{hint} It has: {', '.join(has)}. What is missing "
                "is made by: qlora-trainer run RECIPE"
            )
        return wanted

    def subject(self, stage: str) -> tasks.TaskSubject:
        """A model as its figures name it."""
        return tasks.TaskSubject(stage, self.files(stage).runtime, self._content(stage))

    def files(self, stage: str) -> ModelFiles:
        """The files behind a name."""
        return self.models.files(short_name(stage))

    def _content(self, stage: str) -> str:
        """Fingerprint of everything that a model is made of."""
        files = self.files(stage)
        if stage == "base_16bit":
            return base_model.content_key(self.models.base)
        if files.model == self.models.quantized.folder:
            key = self.models.quantized.key
            return key if files.adapter is None else fingerprint(key, _content_of(files.adapter))
        return _content_of(files.model if files.model.is_dir() else files.model.parent)

    @cached_property
    def tokenizer(self) -> tasks.TextTokenizer:
        """The base model's."""
        return tasks.TextTokenizer.load(self.models.base.folder)

    @cached_property
    def plan(self) -> tasks.TaskPlan:
        """How items are asked."""
        return tasks.TaskPlan(
            limit=self.request.limit,
            batch_size=self.recipe.evaluation.batch_size,
            window=min(WIDEST, base_model.longest_row(self.models.base) or WIDEST),
            is_chat=self.request.is_chat,
        )

    def _asked(
        self, name: str, subject: tasks.TaskSubject, library: tasks.Library, open_model: Callable[[], nn.Module]
    ) -> TaskEvaluation:
        settings = (name, self.plan.limit, self.plan.is_chat)
        return self.ledger.once(
            f"task {OUTLANDISH.sub('_', name)} {subject.stage} {fingerprint(*settings)[:8]}",
            fingerprint(settings, subject.content, self.plan.window, self._task_files, tasks.HARNESS_VERSION),
            TaskEvaluation,
            make=lambda: tasks.run_task(
                name, open_model(), self.tokenizer, library=library, plan=self.plan, subject=subject
            ),
            describe=lambda record: ", ".join(f"{score.metric} {score.value:.4g}" for score in record.scores),
        )

    @cached_property
    def _task_files(self) -> tuple[str, ...]:
        return tuple(tasks.folder_fingerprint(folder) for folder in self.request.folders)

    def _open(self, stage: str) -> nn.Module:
        return self.models.open(self.files(stage), window=self.plan.window)

    def _there(self) -> Iterator[str]:
        yield "base_16bit"
        if self.recipe.quantization.data_type != "none":
            yield "quantized_base"
        if (self.folder.adapter / "adapter_config.json").is_file():
            yield "adapter_unmerged"
        if (self.folder.merged / "config.json").is_file():
            yield from ("merged_16bit", "export:merged_16bit")
        yield from (
            f"{EXPORT_PREFIX}{name}" for name in get_args(ExportFormat) if (self.folder.exports / name).is_dir()
        )

    def _openable(self, there: Sequence[str]) -> Iterator[str]:
        """All but those that are another name of a model, and those whose runtime is not here."""
        for name in there:
            if name in ("export:merged_16bit", "export:peft_adapter", "export:gguf_adapter"):
                continue
            missing = _missing(name)
            if missing:
                self.observer.note(f"{name} is not asked: {', '.join(missing)} is not installed here")
            else:
                yield name


def _missing(stage: str) -> tuple[str, ...]:
    found = next((name for name in get_args(ExportFormat) if stage == f"{EXPORT_PREFIX}{name}"), None)
    return () if found is None else missing_modules(found)


def _content_of(folder: Path) -> str:
    """Fingerprint of a file set; its card may change."""
    return fingerprint({name: digest for name, digest in sha256_of_files(folder).items() if name != CARD})


def _once(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A model that is loaded when it is first asked for, and then kept."""
    held: list[nn.Module] = []

    def opened() -> nn.Module:
        if not held:
            held.append(make())
        return held[0]

    return opened
