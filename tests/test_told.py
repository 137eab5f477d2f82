"""What trackers are told of a whole run, and that no key of the machine is in anything that it leaves."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from qlora_trainer import pipeline, recipe_file
from qlora_trainer.errors import MissingPackageError
from qlora_trainer.pipeline.telling import samples
from qlora_trainer.preflight import check
from qlora_trainer.records import Evaluation, RunReport, Sample, Score
from qlora_trainer.runtime import tracking
from qlora_trainer.runtime.tracked_run import Table
from tests.conftest import REPOSITORY
from tests.runtime.test_tracking import finished_records, values
from tests.runtime.wandb_server import API_KEY, serving
from tests.test_pipeline import recipe_for

RUN = """
import pickle, sys
from pathlib import Path
from qlora_trainer import load_recipe, pipeline
report = pipeline.run(load_recipe(sys.argv[1]))
Path(sys.argv[2]).write_bytes(pickle.dumps(report))
"""
SECRETS = {
    "WANDB_API_KEY": "5ec7e7" * 6 + "abcd",
    "HF_TOKEN": "hf_" + "SecretOfThisMachine" * 2,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "OtherSecretOfIt" * 2,
}
GIT_TOKEN = "ghp_" + "TokenOfTheRemote" * 2
UNCOMMITTED = "password = 'not yet committed'"


def working_copy(folder: Path, remote: str) -> Path:
    """A git repository whose remote holds a token, with a file of which a line is not committed."""
    folder.mkdir()
    author = ("-c", "user.name=me", "-c", "user.email=me@localhost")
    (folder / "settings.py").write_text("", encoding="utf-8")
    for command in (("init", "-q"), ("remote", "add", "origin", remote), ("add", "."), ("commit", "-qm", "one")):
        subprocess.run(["git", *author, *command], cwd=folder, check=True, capture_output=True)
    (folder / "settings.py").write_text(f"{UNCOMMITTED}\n", encoding="utf-8")
    return folder


def carry_out(folder: Path, place: Path, variables: Mapping[str, str]) -> None:
    """The run of a folder's recipe.yaml in a process of its own, because other tests break wandb in this one."""
    places = ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment |= dict.fromkeys(places, str(folder / "home")) | {"PYTHONPATH": str(REPOSITORY)} | variables
    command = [sys.executable, "-c", RUN, str(folder / "recipe.yaml"), str(folder / "report.pickle")]
    subprocess.run(command, cwd=place, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def told(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunReport]:
    """A finished run, told to wandb (offline) and, where it is installed, TensorBoard, on a machine with logins."""
    folder = tmp_path_factory.mktemp("told")
    recipe = recipe_for(
        llama_folder,
        folder,
        export={"formats": ["peft_adapter", "compressed_tensors_w8a16"]},
        training={"max_steps": 6},
        tracking={
            "wandb": "offline",
            "tensorboard": find_spec("tensorboard") is not None,
            "project": "toys",
            "name": "shown name",
            "group": "seeds",
            "tags": ["one"],
        },
    )
    (folder / "recipe.yaml").write_text(recipe_file.dump(recipe), encoding="utf-8")
    # wandb looks where the program was started, and takes a password out of an address, but not a user's name.
    place = working_copy(folder / "work", f"https://{GIT_TOKEN}:x-oauth-basic@host/owner/repository")
    carry_out(folder, place, SECRETS)
    shutil.rmtree(place)
    report = pickle.loads((folder / "report.pickle").read_bytes())
    assert isinstance(report, RunReport)
    return folder / "runs" / "tiny", report


def test_no_key_of_the_machine_is_in_anything_that_a_run_leaves(told: tuple[Path, RunReport]) -> None:
    root, _ = told
    files = [path for path in root.parent.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert {"log.txt", "report.html", "recipe.yaml", "environment.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert [name for name, value in SECRETS.items() if value.encode() in content] == [], path
        assert GIT_TOKEN.encode() not in content, path
        assert UNCOMMITTED.encode() not in content, path


def test_wandb_hears_names_figures_tables_outputs_and_the_page(told: tuple[Path, RunReport]) -> None:
    root, report = told
    records = finished_records(root)
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("toys", "shown name", "seeds", ["one"])
    summary = {}
    for record in records:
        summary |= values(record.summary.update)
    assert summary["test/adapter_unmerged/nats_per_token"] == report.stages[2].nats_per_token
    assert summary["run/status"] == report.status
    shown = {key.partition(".")[0] for key in summary if key.endswith("._type")}
    assert {"gap", "gap_bars_table", "exports", "samples", "ladder", "report"} <= shown
    assert {"train/nats_per_token", "train/learning_rate", "train/gradient_norm", "train/tokens"} <= summary.keys()
    assert {"train/memory_bytes", "validation/nats_per_token"} <= summary.keys()
    (page,) = root.glob("wandb/offline-run-*/files/media/html/report_*.html")
    assert page.read_text(encoding="utf-8") == (root / "report.html").read_text(encoding="utf-8")
    (table,) = root.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")
    outputs = json.loads(table.read_text())
    assert outputs["columns"][:4] == ["prompt", "reference", "base_16bit", "quantized_base"]
    assert len(outputs["data"]) == 4
    assert all(isinstance(cell, str) for row in outputs["data"] for cell in row)


def test_artifacts_name_what_they_were_made_from(told: tuple[Path, RunReport]) -> None:
    root, report = told
    logged = [record.artifact for record in finished_records(root) if record.WhichOneof("record_type") == "artifact"]
    artifacts = [each for each in logged if each.type != "run_table"]
    by_name = {each.name: each for each in artifacts}
    # What was used comes first, then what was made of it.
    assert [each.type for each in artifacts[:2]] == ["model", "dataset"]
    adapter = json.loads(by_name["tiny-adapter"].metadata)
    base, data = (json.loads(each.metadata) for each in artifacts[:2])
    assert adapter["made_from"] == {artifacts[0].name: base, artifacts[1].name: data}
    assert len(base["content_sha256"]) == len(data["tokens_sha256"]) == 64
    held = {entry.path for entry in by_name["tiny-adapter"].manifest.contents}
    assert {"identity.json", "adapter_config.json", "adapter_model.safetensors"} <= held
    # Exports are not uploaded unless that is asked for; their sums stand for them.
    export = by_name["tiny-compressed_tensors_w8a16"]
    assert [entry.path for entry in export.manifest.contents] == ["identity.json"]
    (figures,) = [each for each in report.exports if each.format == "compressed_tensors_w8a16"]
    assert json.loads(export.metadata)["sha256"] == figures.sha256


@pytest.mark.slow
def test_adapter_and_exports_go_up_as_versions_with_their_lineage(llama_folder: Path, tmp_path: Path) -> None:
    formats = ["peft_adapter", "compressed_tensors_w8a16"]
    with serving() as server:
        for number, rate in enumerate((0.01, 0.02)):
            folder = tmp_path / f"{number}"
            folder.mkdir()
            recipe = recipe_for(
                llama_folder,
                tmp_path,
                run={"folder": str(folder / "runs")},
                data={"cache_folder": str(folder / "encoded")},
                export={"formats": formats},
                training={"max_steps": 3, "learning_rate": rate},
                tracking={"wandb": "online", "upload": ["adapter", "exports"], "run_id": f"run{number}"},
            )
            (folder / "recipe.yaml").write_text(recipe_file.dump(recipe), encoding="utf-8")
            carry_out(folder, folder, {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY})
    versions = [each for each in server.versions if each.kind in ("model", "dataset")]
    assert all(each.state == "COMMITTED" for each in versions)
    base, data, *made = versions
    # Base and rows are the same for both runs: one version, used twice.
    assert [set(each.used_by) for each in (base, data)] == [{"run0", "run1"}] * 2
    assert [each.made_by for each in (base, data)] == [None, None]
    # Two runs of one name: every file has two versions, each of the run that made it.
    names = ["tiny-adapter", *(f"tiny-{name}" for name in formats)]
    assert [(each.name, each.made_by) for each in made] == [(name, run) for run in ("run0", "run1") for name in names]
    for each in made:
        root = tmp_path / str(each.made_by)[-1] / "runs" / "tiny"
        place = root / "adapter" if each.name == "tiny-adapter" else root / "exports" / each.name.removeprefix("tiny-")
        held = {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        assert {name: content for name, content in each.files.items() if name != "identity.json"} == held
        assert each.manifest["contents"].keys() == {"identity.json", *held}
        assert each.metadata["made_from"].keys() == {base.name, data.name}


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_trained(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    recipe = recipe_for(llama_folder, tmp_path, tracking={"tensorboard": True, "trackio": True})
    mend = r"tracking\.tensorboard and tracking\.trackio: .* pip install 'qlora-trainer\[tensorboard,trackio\]'"
    with pytest.raises(MissingPackageError, match=mend):
        pipeline.run(recipe)
    assert not (tmp_path / "quantized").exists()
    assert any("tracking.tensorboard" in problem for problem in check(recipe).problems)


def test_outputs_of_the_stages_stand_side_by_side() -> None:
    def evaluation(stage: str, *outputs: str) -> Evaluation:
        asked = tuple(Sample(f"q{number}", "r", output) for number, output in enumerate(outputs))
        return Evaluation(stage, "transformers", Score(1.0, (1.0, 1.0)), {}, (), (), 1, 1.0, None, 1, asked)

    table = samples([evaluation("base", "a", "b"), evaluation("silent"), evaluation("tuned", "c")])
    assert table == Table(("prompt", "reference", "base", "tuned"), [["q0", "r", "a", "c"], ["q1", "r", "b", None]])
