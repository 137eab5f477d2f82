"""``evaluate --tasks``: tasks of lm-evaluation-harness on the models of a run."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_trainer.cli.guard import guarded
from qlora_trainer.cli.options import AsJson, Overrides, Quiet, RecipePath, TrustRemoteCode
from qlora_trainer.cli.run_path import recipe_of
from qlora_trainer.cli.screen import make_console, printable, write
from qlora_trainer.cli.watching import watching
from qlora_trainer.errors import MissingPackageError

if TYPE_CHECKING:
    from qlora_trainer.records import TaskRow

TASKS_HELP = """With --tasks, tasks of lm-evaluation-harness are asked instead, of every model that the run has, or of
those named by --at; results stand in tasks.json and in the report, and are not repeated. Needs the extra `eval`.
`--tasks probes` needs no download: small probes of what quantization may cost, made for this package.

\b
Examples with tasks:
  qlora-trainer evaluate recipes/quickstart.yaml --tasks probes
  qlora-trainer evaluate RECIPE --tasks hellaswag --at base --at gguf_q4_1 --limit 200
  qlora-trainer evaluate RECIPE --tasks my_task --task-folder my_tasks"""

Tasks = Annotated[str | None, typer.Option("--tasks", metavar="A,B", help="Tasks, or `probes`, with commas between.")]
TaskFolder = Annotated[
    Path | None, typer.Option("--task-folder", metavar="DIR", help="Folder of your own task files (YAML).")
]
Stages = Annotated[
    list[str] | None,
    typer.Option("--at", "--stage", metavar="MODEL", help="A model of the run; may be repeated. Default: all."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Items of a task at most; for a first look.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask through the base model's chat template.")]


def with_tasks(plain: Callable[..., None]) -> Callable[..., None]:
    """The verb ``evaluate``: ``plain`` measures on the test rows, ``--tasks`` asks tasks."""

    def evaluate(
        recipe: RecipePath,
        overrides: Overrides,
        *,
        tasks: Tasks = None,
        task_folder: TaskFolder = None,
        stage: Stages = None,
        limit: Limit = None,
        chat: Chat = False,
        trust_remote_code: TrustRemoteCode = False,
        quiet: Quiet = False,
        as_json: AsJson = False,
    ) -> None:
        if tasks is None:
            if task_folder is not None or stage or limit is not None or chat:
                raise typer.BadParameter("--task-folder, --at, --limit and --chat belong to --tasks: name some")
            plain(recipe, overrides, trust_remote_code=trust_remote_code, quiet=quiet, as_json=as_json)
            return
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        if not names:
            raise typer.BadParameter("--tasks names none: give names with commas between, such as probes")
        with guarded():
            _ask(
                recipe,
                overrides,
                {"tasks": names, "stages": tuple(stage or ()), "folder": task_folder, "limit": limit, "is_chat": chat},
                trust_remote_code=trust_remote_code,
            )

    return evaluate


def _ask(path: Path, overrides: Sequence[str], asked: dict[str, object], *, trust_remote_code: bool) -> None:
    recipe = recipe_of(path, overrides)
    if find_spec("lm_eval") is None:
        raise MissingPackageError(
            '--tasks needs lm-evaluation-harness, which is not installed: pip install "qlora-trainer[eval]"'
        )
    from qlora_trainer.pipeline.tasks import TaskRequest, evaluate_tasks  # noqa: PLC0415

    console = make_console()
    with watching(console) as observer:
        request = TaskRequest(**asked)  # type: ignore[arg-type]  # the options by the names of its fields
        rows = evaluate_tasks(recipe, request, observer=observer, trust_remote_code=trust_remote_code)
    show_rows(console, rows)
    write(console, f"\nKept in {Path(recipe.run.folder) / recipe.run.name / 'tasks.json'}")


def show_rows(console: Console, rows: Sequence["TaskRow"]) -> None:
    """Prints the table stage x task."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "metric", "stage"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "stderr", "items", "minus 16-bit base, paired"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = (row.task, row.metric, row.stage, f"{row.value:.4f}", _stderr(row), str(row.items), _difference(row))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(table)


def _stderr(row: "TaskRow") -> str:
    return "-" if row.stderr is None else f"{row.stderr:.4f}"


def _difference(row: "TaskRow") -> str:
    if row.difference is None or row.difference_interval is None:
        return "-"
    low, high = row.difference_interval
    return f"{row.difference:+.4f} [{low:+.4f},{high:+.4f}]"
