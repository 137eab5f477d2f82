"""Runs a task of lm-evaluation-harness on a model."""

import difflib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from torch import nn

from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError
from qlora_trainer.records import TaskEvaluation, TaskScore
from qlora_trainer.stages.tasks.folders import with_found_data
from qlora_trainer.stages.tasks.language_model import HarnessModel
from qlora_trainer.stages.tasks.subject import TaskSubject

HARNESS_VERSION = version("lm_eval")
NO_FILTER = ",none"
RESAMPLES = 1000
"""Of the standard errors that have no formula."""


@dataclass(frozen=True)
class TaskPlan:
    """How items are asked.

    Attributes:
        limit: how many items of a task; None = all.
        batch_size: requests at a time.
        window: most tokens of a request.
        is_chat: whether items go through the chat template.
    """

    limit: int | None
    batch_size: int
    window: int
    is_chat: bool


@dataclass(frozen=True)
class Library:
    """Tasks that were found, by the harness's own index.

    Attributes:
        names: of the tasks asked for.
    """

    names: tuple[str, ...]
    _manager: TaskManager


@contextmanager
def open_library(names: Sequence[str], folders: Sequence[Path]) -> Iterator[Library]:
    """Finds tasks: in the folders, and among the harness's own where a name is in none of them.

    Raises:
        DataError: a name is nowhere; tells all such names, with the nearest that exist.
    """
    with ExitStack() as stack:
        places = [str(stack.enter_context(with_found_data(folder))) for folder in folders]
        with _quiet():
            manager = TaskManager(include_path=places, include_defaults=False)
            if set(names) - set(manager.all_tasks):
                manager = TaskManager(include_path=places, include_defaults=True)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise DataError("\n".join(_unknown(name, manager.all_tasks) for name in unknown))
        yield Library(tuple(names), manager)


def run_task(
    name: str, model: nn.Module, tokenizer: TextTokenizer, *, library: Library, plan: TaskPlan, subject: TaskSubject
) -> TaskEvaluation:
    """One model on one task.

    Raises:
        DataError: the task cannot be read, or asks for what cannot be done here; says what the harness said.
    """
    asked = HarnessModel(model, tokenizer, batch_size=plan.batch_size, window=plan.window)
    try:
        with _quiet():
            # Not simple_evaluate, which describes the whole machine after every task: seconds each time.
            found = lm_eval.evaluate(
                lm=asked,
                task_dict=_loaded(name, library),
                limit=plan.limit,
                bootstrap_iters=RESAMPLES,
                apply_chat_template=plan.is_chat,
                fewshot_as_multiturn=plan.is_chat,
            )
    except DataError as error:
        raise DataError(f"task {name}: {error}") from error
    except Exception as error:  # a task file can break the harness anywhere, and a data set that is not here too
        raise DataError(f"task {name} cannot be asked of {subject.stage}: {type(error).__name__}: {error}") from error
    scores = tuple(_scores(name, found))
    if not scores:
        raise DataError(f"task {name} gave no figure; name a task, not a group of others, and one with a metric")
    return TaskEvaluation(
        task=name,
        stage=subject.stage,
        runtime=subject.runtime,
        scores=scores,
        items=int(found["n-samples"][name]["effective"]),
        limit=plan.limit,
        shots=int(found["n-shot"].get(name) or 0),
        version=str(found["versions"].get(name)),
        is_chat=plan.is_chat,
        window=plan.window,
        truncated=asked.truncated,
        harness=HARNESS_VERSION,
        content=subject.content,
    )


def _loaded(name: str, library: Library) -> Any:
    """The task with its data, its solved examples drawn with the harness's own seed."""
    loaded = library._manager.load([name])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _scores(name: str, found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """The finite figures of a task; the harness names them ``metric,filter`` and ``metric_stderr,filter``."""
    results, samples = found["results"].get(name, {}), found["samples"].get(name, [])
    better = found["higher_is_better"].get(name, {})
    for key, value in results.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float) or not isfinite(value):
            continue
        stderr = results.get(f"{metric}_stderr,{chosen}")
        yield TaskScore(
            metric=key.removesuffix(NO_FILTER),
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) and isfinite(stderr) else None,
            higher_is_better=better.get(metric),
            items=_items(metric, [each for each in samples if each.get("filter", "none") == chosen]),
        )


def _items(metric: str, samples: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    values = [each.get(metric) for each in sorted(samples, key=lambda each: int(each["doc_id"]))]
    plain = [float(value) for value in values if isinstance(value, int | float)]
    return tuple(plain) if len(plain) == len(values) else ()


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"--tasks: there is no task {name!r}.{hint} Own task files are found with --task-folder"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness's bars and remarks off the terminal; what it raises is raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
