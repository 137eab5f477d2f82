"""The soak on a tiny model: killed, damaged, cut off and gone on with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_trainer import recipe_file
from tests.test_pipeline import recipe_for

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts/bench_resume.py"


def soak(recipe: Path, kills: int) -> dict[str, object]:
    result = recipe.parent / "result.json"
    command = [sys.executable, str(SCRIPT), "--recipe", str(recipe), "--kills", str(kills), "--seed", "1"]
    command += ["--set", "training.max_steps=12", "--set", "data.train_rows=20"]
    command += ["--work", str(recipe.parent / "work"), "--result", str(result)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    log = recipe.parent / "work" / "children.log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.is_file() else "")
    found: dict[str, object] = json.loads(result.read_text())
    return found


def test_runs_that_are_killed_end_like_the_undisturbed_one_and_a_soak_goes_on(
    llama_folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_file.dump(recipe_for(llama_folder, tmp_path)), encoding="utf-8")
    first = soak(recipe, 4)
    whole = soak(recipe, 12)
    assert (first["kills"], whole["kills"]) == (4, 12)
    assert whole["adapter_sha256"] == first["adapter_sha256"]
    assert whole["divergent_runs"] == []
    assert whole["broken_checkpoints_after_kills"] == 0
    assert int(str(whole["runs"])) >= 1
    assert int(str(whole["kills_while_writing_a_checkpoint"])) >= 1
