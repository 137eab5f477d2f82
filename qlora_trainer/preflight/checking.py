"""Everything that can be known of a run beforehand, problems included, in one record."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from qlora_trainer.data.scoring import require_packages
from qlora_trainer.errors import TrainerError
from qlora_trainer.export_formats import FACTS
from qlora_trainer.numerics.fitting import PolicyRoom, rooms
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.numerics.training_load import TrainingLoad
from qlora_trainer.preflight.exports import layer_findings, package_findings, row_problems
from qlora_trainer.preflight.plan import PlannedStage, plan
from qlora_trainer.preflight.prediction import (
    disk_prediction,
    likely_cut,
    memory_predictions,
    model_shape,
    training_load,
)
from qlora_trainer.preflight.room import GPU_PLACE, Budget, Memory, planned_memory
from qlora_trainer.recipe import Recipe, bytes_of
from qlora_trainer.records import BaseCheckpoint, Cut
from qlora_trainer.runtime.memory import available_bytes, free_disk_bytes
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.runtime.tracking import require_trackers
from qlora_trainer.stages import base_model, dataset
from qlora_trainer.stages.dataset import TaskRows

Made = TypeVar("Made")


@dataclass(frozen=True)
class Preflight:
    """What ``check`` found.

    Attributes:
        memory: predicted need of each stage that needs much, beside what is free.
        disk: predicted size of everything that the run writes, beside what is free; None where it is not known.
        plan: the stages in order; empty where base or rows cannot be used.
        audit: what the label masks train, in a few lines.
        example: the first training row in pieces, each with whether it is trained.
        notes: what the reader should know and need not mend.
        problems: what must be mended before a run; each says what is wrong, where, and the mend.
        rooms: under each checkpointing policy, the largest micro-batch and the longest window that fit.
        cut: the micro-batch and policy that the prediction of training is for; None where there is none.
    """

    memory: tuple[Budget, ...]
    disk: Budget | None
    plan: tuple[PlannedStage, ...]
    audit: tuple[str, ...]
    example: tuple[tuple[str, bool], ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    rooms: tuple[PolicyRoom, ...] = ()
    cut: Cut | None = None


def check(
    recipe: Recipe,
    *,
    trust_remote_code: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
    memory: int | None = None,
) -> Preflight:
    """Looks at everything that a run of the recipe would read and write; downloads nothing.

    Nothing is written but the cache of encoded rows, which the run reads then.

    Args:
        recipe: what would be run.
        trust_remote_code: allow Python code that comes with the model.
        device: plan for a processor or a GPU; None = for what is here.
        memory: plan for so many bytes; None = for what is free.
    """
    found = _Findings()
    room = found.attempt(lambda: planned_memory(device, memory))
    rows = None
    base = found.attempt(lambda: base_model.resolve_local(recipe.base_model, trust_remote_code=trust_remote_code))
    if base is None and recipe.base_model.name is not None:
        found.notes.append(
            f"{recipe.base_model.name} is on the hub and `check` downloads nothing. Fetch it with `hf download "
            f"{recipe.base_model.name}{_revision(recipe)}` and check again to see memory, plan and an example"
        )
    absent = found.attempt(lambda: dataset.absent_sources(recipe.data)) or ()
    for name in absent:
        found.notes.append(
            f"{name} is on the hub and `check` downloads nothing: its rows are not looked at. A run gets them"
        )
    if base is not None and not absent:
        folder = base.folder
        rows = found.attempt(lambda: dataset.load_rows(recipe, folder, download=False))
        found.attempt(lambda: _require_gguf(recipe, folder))
    elif base is None:
        found.problems += dataset.file_problems(recipe.data)
    found.attempt(lambda: require_packages(recipe.evaluation.metrics))
    tracking = recipe.tracking
    found.attempt(lambda: require_trackers(tensorboard=tracking.tensorboard, trackio=tracking.trackio))
    found.add(package_findings(recipe))
    folder_of_run = RunFolder(Path(recipe.run.folder) / recipe.run.name)
    found.attempt(lambda: folder_of_run.require_own(recipe.model_dump(mode="json"), shaping=recipe.shaping))
    if base is None or rows is None or room is None:
        return Preflight((), None, (), (), (), tuple(found.notes), tuple(found.problems))
    return _whole(recipe, base, rows, room, found)


def _revision(recipe: Recipe) -> str:
    revision = recipe.base_model.revision
    return "" if revision is None else f" --revision {revision}"


class _Findings:
    """Problems and notes, gathered from attempts that may fail."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    def add(self, findings: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
        """Adds problems and notes that were found elsewhere."""
        problems, notes = findings
        self.problems += problems
        self.notes += notes

    def attempt(self, make: Callable[[], Made]) -> Made | None:
        """What ``make`` gives; None, and a problem more, where the reader has to mend something."""
        try:
            return make()
        except TrainerError as error:
            self.problems.append(str(error))
            return None


def _require_gguf(recipe: Recipe, base: Path) -> None:
    """Where a GGUF format is asked for, makes sure that llama.cpp knows the base; only then torch is loaded."""
    if any(FACTS[name].runtime == "llama_cpp" for name in recipe.export.formats):
        from qlora_trainer.stages.export import require_gguf  # noqa: PLC0415 - loads torch

        require_gguf(base)


def _whole(recipe: Recipe, base: BaseCheckpoint, rows: TaskRows, room: Memory, found: _Findings) -> Preflight:
    """The record of a run whose base and rows can be read."""
    try:
        shape: ModelShape | None = model_shape(base)
    except ValueError as error:
        shape = None
        found.notes.append(f"no prediction of memory and disk: {error}")
    memory: tuple[Budget, ...] = ()
    fitting: tuple[PolicyRoom, ...] = ()
    cut = disk = load = None
    if shape is not None:
        training = recipe.training
        if training.memory_budget is not None:
            room = Memory(room.device, min(bytes_of(training.memory_budget), room.free_bytes), room.place)
        cut = likely_cut(recipe, shape, rows, room)
        load = training_load(recipe, rows.train, room.device, cut)
        memory = tuple(
            Budget(purpose, needed, room.free_bytes, room.place)
            for purpose, needed in memory_predictions(recipe, shape, rows, load).items()
        )
        fitting = rooms(shape, load, room.free_bytes, rows=cut.micro_batch_size, window=recipe.data.window)
        disk = _disk(recipe, shape, load)
        found.add(layer_findings(recipe, shape.linears))
        found.problems += (f"lora.target_modules: {text}" for text in recipe.lora.unknown_targets(shape.linears))
    found.problems += row_problems(recipe, training_rows=len(rows.train))
    _judge(memory, disk, found)
    return Preflight(
        memory=memory,
        disk=disk,
        plan=plan(recipe, base, rows, None if shape is None or load is None else (shape, load)),
        audit=dataset.audit_lines(rows),
        example=tuple(dataset.render_example(rows.tokenizer, rows.train[0])),
        notes=(*rows.notes, *found.notes),
        problems=tuple(found.problems),
        rooms=fitting,
        cut=cut,
    )


def _disk(recipe: Recipe, shape: ModelShape, load: TrainingLoad) -> Budget:
    root = Path(recipe.run.folder) / recipe.run.name
    # What an earlier part of the run has written makes room for its successor.
    free = free_disk_bytes(root) + _written_bytes(root)
    return Budget("the run", disk_prediction(recipe, shape, load), free, f"disk of {recipe.run.folder}")


def _judge(memory: tuple[Budget, ...], disk: Budget | None, found: _Findings) -> None:
    """Too little room is a problem; memory that is only just enough is a note."""
    for budget in memory:
        mend = _MENDS[budget.purpose]
        if budget.is_short and _fits_with_machine(budget):
            found.notes.append(
                f"{budget}; while the 16-bit model is measured, what does not fit lies in this machine's memory, which "
                "takes longer"
            )
        elif budget.is_short:
            found.problems.append(f"{budget}. {mend}")
        elif budget.is_tight:
            found.notes.append(f"{budget}; it may fit if the allocator returns freed memory. {mend}")
    if disk is not None and disk.is_short:
        found.problems.append(f"{disk}. Make room, choose a run.folder on another disk, or remove export.formats")


def _fits_with_machine(budget: Budget) -> bool:
    """Whether measuring the unquantized model fits once weights may lie outside the GPU (``runners.placement``)."""
    is_on_gpu = budget.purpose == "evaluation" and budget.place == GPU_PLACE
    return is_on_gpu and budget.needed.total <= available_bytes()


_MENDS = {
    "training": "Lower training.micro_batch_size (and raise gradient_accumulation_steps) or data.window, or set "
    "training.checkpointing: full",
    "evaluation": "Lower evaluation.batch_size or data.window; the 16-bit base itself must fit",
    "rounding": "Lower calibration.rows, calibration.batch_size or data.window",
}


def _written_bytes(root: Path) -> int:
    """Size of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
