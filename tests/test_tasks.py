"""Tasks on the models of a finished run: which models, what is kept, what is asked again, what the report says."""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'qlora-trainer[eval]'")

from qlora_trainer import pipeline
from qlora_trainer.cli import tasks_verb
from qlora_trainer.cli.app import make_app
from qlora_trainer.errors import DataError, RunFolderError
from qlora_trainer.pipeline.task_file import read_rows
from qlora_trainer.pipeline.tasks import TaskRequest, evaluate_tasks
from qlora_trainer.runtime.progress import Silent
from qlora_trainer.stages.tasks import PROBES
from tests.finished import FinishedRun
from tests.stages.tasks.own_tasks import TASKS, write_tasks

INT8 = "export:compressed_tensors_w8a16"
MODELS = ("base_16bit", "quantized_base", "adapter_unmerged", "merged_16bit", INT8)


@dataclass
class Watcher(Silent):
    done: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        (self.reused if reused else self.done).append(name)


@pytest.fixture(scope="module")
def run(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The finished run in a place of its own: tasks change its report."""
    folder = tmp_path_factory.mktemp("asked")
    shutil.copytree(finished_run.root, folder / "runs" / "tiny")
    section = finished_run.recipe.run.model_copy(update={"folder": str(folder / "runs")})
    recipe = finished_run.recipe.model_copy(update={"run": section})
    return replace(finished_run, recipe=recipe, root=folder / "runs" / "tiny")


@pytest.fixture(scope="module")
def asked(run: FinishedRun) -> Watcher:
    watcher = Watcher()
    evaluate_tasks(run.recipe, TaskRequest(("probes",), limit=3), observer=watcher)
    return watcher


def test_every_model_of_a_run_is_asked_every_probe(run: FinishedRun, asked: Watcher) -> None:
    rows = read_rows(run.root / "tasks.json")
    assert {(row.stage, row.task) for row in rows} == {(stage, task) for stage in MODELS for task in PROBES}
    assert all(row.items == 3 and row.limit == 3 for row in rows)
    assert all((row.difference is None) == (row.stage == "base_16bit") for row in rows)
    assert len([name for name in asked.done if name.startswith("task ")]) == len(MODELS) * len(PROBES)


def test_the_report_holds_the_table(run: FinishedRun, asked: Watcher) -> None:
    report = json.loads((run.root / "report.json").read_text())
    assert {row["stage"] for row in report["tasks"]} == set(MODELS)
    assert "## Tasks" in (run.root / "report.md").read_text()
    assert "probe_in_context" in (run.root / "report.md").read_text()


def test_what_was_asked_is_read_back_and_more_is_added(run: FinishedRun, asked: Watcher) -> None:
    watcher = Watcher()
    request = TaskRequest(("probe_in_context",), stages=("base_16bit", "compressed_tensors_w8a16"), limit=3)
    rows = evaluate_tasks(run.recipe, request, observer=watcher)
    assert [row.stage for row in rows] == ["base_16bit", INT8]
    assert [name for name in watcher.done if name.startswith("task ")] == []
    again = evaluate_tasks(run.recipe, replace(request, limit=2), observer=watcher)
    assert len([name for name in watcher.done if name.startswith("task ")]) == 2
    assert all(row.items == 2 for row in again)
    assert {row.limit for row in read_rows(run.root / "tasks.json")} == {2, 3}


def test_figures_of_a_file_that_was_made_anew_leave_the_report(run: FinishedRun, asked: Watcher) -> None:
    path = run.root / "tasks.json"
    kept = path.read_text()
    changed = [{**row, "content": "other"} if row["stage"] == INT8 else row for row in json.loads(kept)]
    path.write_text(json.dumps(changed))
    report = pipeline.run(run.recipe)
    path.write_text(kept)
    assert report is not None
    assert INT8 not in {row.stage for row in report.tasks}
    assert any(INT8 in warning and "made anew" in warning for warning in report.warnings)


def test_models_and_tasks_that_are_not_there_are_named(run: FinishedRun) -> None:
    with pytest.raises(RunFolderError, match=r"no model gguf_q4_0\. It has: base, quantized, trained"):
        evaluate_tasks(run.recipe, TaskRequest(("probes",), stages=("gguf_q4_0",)))
    with pytest.raises(RunFolderError, match=r"no model mergd\. Did you mean merged\?"):
        evaluate_tasks(run.recipe, TaskRequest(("probes",), stages=("base", "mergd")))
    with pytest.raises(DataError, match="no folder"):
        evaluate_tasks(run.recipe, TaskRequest(("probes",), stages=("base_16bit",), folder=Path("/nowhere/at/all")))


@pytest.mark.slow  # the harness reads all of its own task files to tell that none has the name
def test_a_task_that_is_nowhere_is_told_with_the_nearest(run: FinishedRun) -> None:
    with pytest.raises(DataError, match=r"no task 'probe_in_contxt'\. Did you mean probe_in_context"):
        evaluate_tasks(run.recipe, TaskRequest(("probe_in_contxt",), stages=("base_16bit",)))


def test_without_the_harness_the_command_names_the_extra(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_verb, "find_spec", lambda _name: None)
    result = CliRunner().invoke(make_app(), ["evaluate", str(run.path), "--tasks", "probes"])
    assert result.exit_code == 2
    assert 'pip install "qlora-trainer[eval]"' in result.stderr


def test_the_command_prints_the_table(run: FinishedRun, asked: Watcher) -> None:
    result = CliRunner().invoke(
        make_app(),
        [
            *("evaluate", str(run.path), "--set", f"run.folder={run.root.parent}"),
            *("--tasks", "probe_in_context", "--at", "base", "--stage", "merged_16bit", "--limit", "3"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "minus 16-bit base" in result.stdout
    assert "probe_in_context" in result.stdout
    assert "tasks.json" in result.stdout


def test_options_of_tasks_need_tasks(run: FinishedRun) -> None:
    result = CliRunner().invoke(make_app(), ["evaluate", str(run.path), "--limit", "3"])
    assert result.exit_code == 2
    assert "belong to --tasks" in result.stderr


# Files for llama.cpp.


@pytest.mark.gguf
def test_gguf_files_are_asked_the_same_tasks_as_the_model_that_they_were_made_of(
    gguf_run: FinishedRun, tmp_path: Path
) -> None:
    shutil.copytree(gguf_run.root, tmp_path / "moved")
    (tmp_path / "own").mkdir()
    result = CliRunner().invoke(
        make_app(),
        [
            *("evaluate", str(tmp_path / "moved"), "--tasks", ",".join(TASKS), "--limit", "8"),
            *("--task-folder", str(write_tasks(tmp_path / "own"))),
            *("--at", "merged", "--at", "gguf_q8_0", "--at", "export:gguf_q6_k"),
        ],
    )
    assert result.exit_code == 0, result.output
    found = {(row.stage, row.task, row.metric): row for row in read_rows(tmp_path / "moved" / "tasks.json")}
    assert {stage for stage, _, _ in found} == {"merged_16bit", "export:gguf_q8_0", "export:gguf_q6_k"}
    assert {task for _, task, _ in found} == set(TASKS)
    exact = found["merged_16bit", "own_rolling", "bits_per_byte"].value
    # Measured: 6.6984 bits per byte; +0.0016 with 8 bits, -0.028 with 6. Zero would be the merged model itself.
    for name, most in (("gguf_q8_0", 0.01), ("gguf_q6_k", 0.1)):
        assert 1e-5 < abs(found[f"export:{name}", "own_rolling", "bits_per_byte"].value - exact) < most
    assert all(row.items == 8 for row in found.values())


@pytest.mark.gguf
def test_an_adapter_for_llama_cpp_is_not_asked_without_its_base(gguf_run: FinishedRun) -> None:
    with pytest.raises(RunFolderError, match=r"gguf_adapter runs only on top .* Take trained \(adapter_unmerged\)"):
        evaluate_tasks(gguf_run.recipe, TaskRequest(("probes",), stages=("base", "gguf_adapter")))
