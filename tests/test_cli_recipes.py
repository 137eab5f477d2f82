"""``recipes list | show | copy``, and that a wheel brings the recipes along."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qlora_trainer import recipe_file
from qlora_trainer.errors import RecipeError
from qlora_trainer.recipe_file import shipped
from tests.test_cli import invoke

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.yaml"))


def test_every_recipe_is_listed_on_a_line_that_says_what_it_is_and_whether_it_was_run() -> None:
    code, out, err = invoke("recipes")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.split("\n\n")[0].splitlines()}
    assert sorted(lines) == NAMES
    assert lines["quickstart"].endswith("the base and the task that come with the repository.")
    assert lines["llama3.1_8b_24gb"].endswith("Llama 3.1 8B Instruct on your conversations, one 24 GB GPU (not run)")
    assert invoke("recipes", "list")[1] == out


def test_a_recipe_is_shown_as_it_stands() -> None:
    code, out, _ = invoke("recipes", "show", "qwen3_8b_24gb")
    assert code == 0
    assert out.rstrip() == (REPOSITORY / "recipes" / "qwen3_8b_24gb.yaml").read_text(encoding="utf-8").rstrip()


def test_a_copied_recipe_can_be_loaded_and_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = invoke("recipes", "copy", "qwen3_8b_24gb", "new/mine.yaml")
    assert code == 0
    assert "qlora-trainer check new/mine.yaml" in out
    assert recipe_file.load("new/mine.yaml").run.name == "qwen3_8b_24gb"
    code, _, err = invoke("recipes", "copy", "qwen3_8b_24gb", "new/mine.yaml")
    assert code == 2
    assert "not overwritten" in err


def test_the_quickstart_is_copied_with_its_base_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("recipes", "copy", "quickstart")[0] == 0
    assert invoke("check", "quickstart.yaml")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show"], "needs the name of a recipe"),
        (["copy"], "needs the name of a recipe"),
        (["show", "qwen3_8b_24"], "Did you mean qwen3_8b_24gb"),
        (["show", "zzz"], "`qlora-trainer recipes list` names them all"),
        (["list", "quickstart"], "recipes show quickstart"),
        (["show", "quickstart", "mine.yaml"], "recipes copy quickstart mine.yaml"),
    ],
)
def test_what_cannot_be_meant_is_told_with_the_command_that_can(arguments: list[str], message: str) -> None:
    code, _, err = invoke("recipes", *arguments)
    assert code == 2
    assert message in err


def test_an_installation_without_recipes_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "BESIDE", tmp_path)
    monkeypatch.setattr(shipped, "INSTALLED", Path("share/nowhere"))
    monkeypatch.setattr(shipped, "_recorded", list)
    with pytest.raises(RecipeError, match="share/nowhere"):
        shipped.shipped_folder()


@pytest.mark.slow
def test_a_wheel_brings_every_recipe_to_where_it_is_looked_for(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    place = f"{wheel.name.split('-')[0]}-{wheel.name.split('-')[1]}.data/data/{shipped.INSTALLED}/"
    assert {f"{place}{name}.yaml" for name in NAMES} <= set(names)
    assert f"{place}quickstart/base/model.safetensors" in names
    target = tmp_path / "installed"
    install = ["install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    code = "from qlora_trainer.recipe_file import shipped_folder; print(shipped_folder())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)}, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(target)
