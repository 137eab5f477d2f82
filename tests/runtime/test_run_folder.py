import copy
import hashlib
import json
import logging
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from qlora_trainer.errors import RunFolderError
from qlora_trainer.runtime import run_folder
from qlora_trainer.runtime.run_folder import RunFolder, fingerprint

RECIPE = {
    "run": {"name": "a", "seed": 0},
    "lora": {"rank": 8, "alpha": 1e-05, "target_modules": ["q_proj", "v_proj"]},
    "data": {"train": "zwölf.jsonl", "validation": None},
    "tracking": {"wandb": "off"},
}
SHAPING = ("lora", "data", "run.seed")


@dataclass(frozen=True)
class Inner:
    low: float
    text: str


@dataclass(frozen=True)
class Stage:
    folder: Path
    shape: tuple[int, int]
    figures: dict[str, float]
    inner: tuple[Inner, ...]
    maybe: float | None = None


STAGE = Stage(
    folder=Path("runs/a"),
    shape=(2, 3),
    figures={"third": 1 / 3, "infinite": math.inf, "tiny": 5e-324},
    inner=(Inner(-0.1, "ä\n"), Inner(2.0, "")),
)


def changed(*path, value):
    recipe = copy.deepcopy(RECIPE)
    section = recipe
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return recipe


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs" / "a"


@pytest.fixture
def finished(root):
    """A folder in which a stage was finished."""
    with RunFolder.open(root, RECIPE, shaping=SHAPING) as folder:
        folder.save_record("quantize", "key", STAGE)
    return folder


def test_opening_writes_the_recipe_and_the_environment(root):
    with RunFolder.open(root, RECIPE, shaping=SHAPING) as folder:
        assert yaml.safe_load(folder.recipe_text) == RECIPE
        assert folder.environment["torch"]
        assert "zwölf" in (root / "recipe.yaml").read_text(encoding="utf-8")
        assert json.loads((root / "environment.json").read_text()) == folder.environment


def test_naming_a_folder_touches_nothing(root):
    assert RunFolder(root).report_json == root / "report.json"
    assert not root.exists()


def test_paths_have_the_names_that_other_tools_rely_on(root):
    folder = RunFolder(root)
    names = [folder.checkpoints, folder.adapter, folder.merged, folder.exports, folder.evaluations, folder.stages]
    assert [path.name for path in names] == ["checkpoints", "adapter", "merged", "exports", "evaluations", "stages"]
    files = [folder.metrics, folder.log, folder.report_md, folder.report_html]
    assert [path.name for path in files] == ["metrics.jsonl", "log.txt", "report.md", "report.html"]
    assert {path.parent for path in (*names, *files)} == {root}


def test_the_same_recipe_opens_its_folder_again(finished):
    with RunFolder.open(finished.root, copy.deepcopy(RECIPE), shaping=SHAPING) as folder:
        assert folder.load_record("quantize", "key", Stage) == STAGE


def test_another_recipe_is_refused_with_every_difference(finished):
    other = changed("lora", "rank", value=16) | {"data": {"train": "b.jsonl", "window": 5}}
    before = finished.recipe_text
    with pytest.raises(RunFolderError) as caught, RunFolder.open(finished.root, other, shaping=SHAPING):
        pytest.fail("the folder must not open")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{finished.root} holds results of another recipe, 4 setting(s) differ:"
    assert sorted(lines[1:-1]) == [
        '  data.train: "zwölf.jsonl" there, "b.jsonl" now',
        "  data.validation: null there, absent now",
        "  data.window: absent there, 5 now",
        "  lora.rank: 8 there, 16 now",
    ]
    assert lines[-1] == "Give this recipe another run.name, or delete that folder."
    assert finished.recipe_text == before


@pytest.mark.parametrize(
    ("recipe", "is_refused"),
    [
        (changed("run", "seed", value=1), True),
        (changed("run", "name", value="b"), False),
        (changed("tracking", "wandb", value="offline"), False),
        (changed("lora", "target_modules", value=["q_proj"]), True),
        (changed("lora", "alpha", value=1.0000000000000003e-05), True),
    ],
)
def test_only_settings_that_shape_the_results_must_stay(finished, caplog, recipe, is_refused):
    caplog.set_level(logging.INFO)
    if is_refused:
        with pytest.raises(RunFolderError), RunFolder.open(finished.root, recipe, shaping=SHAPING):
            pytest.fail("the folder must not open")
    else:
        with RunFolder.open(finished.root, recipe, shaping=SHAPING) as folder:
            assert yaml.safe_load(folder.recipe_text) == recipe
        assert " was " in caplog.text


def test_a_section_whose_name_begins_alike_does_not_shape(finished):
    recipe = RECIPE | {"lora_notes": "new"}
    with RunFolder.open(finished.root, recipe, shaping=SHAPING) as folder:
        assert yaml.safe_load(folder.recipe_text) == recipe


def test_a_folder_without_results_may_be_claimed_by_any_recipe(root):
    for rank in (8, 16):
        with RunFolder.open(root, changed("lora", "rank", value=rank), shaping=SHAPING) as folder:
            assert yaml.safe_load(folder.recipe_text)["lora"]["rank"] == rank


def test_a_checkpoint_is_a_result(root):
    with RunFolder.open(root, RECIPE, shaping=SHAPING) as folder:
        (folder.checkpoints / "step-000010").mkdir(parents=True)
    other = changed("lora", "rank", value=16)
    with pytest.raises(RunFolderError, match=r"lora\.rank"), RunFolder.open(root, other, shaping=SHAPING):
        pytest.fail("the folder must not open")


@pytest.mark.parametrize("text", ["a: [", "just text", "\x00"])
def test_a_damaged_recipe_beside_results_is_refused(finished, text):
    (finished.root / "recipe.yaml").write_text(text)
    with pytest.raises(RunFolderError, match="damaged"), RunFolder.open(finished.root, RECIPE, shaping=SHAPING):
        pytest.fail("the folder must not open")


def test_a_changed_environment_is_warned_of(finished, caplog):
    told = finished.environment | {"torch": "1.0"}
    finished.environment_json.write_text(json.dumps(told))
    with RunFolder.open(finished.root, RECIPE, shaping=SHAPING) as folder:
        assert folder.environment["torch"] != "1.0"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "torch: 1.0 ->" in caplog.text


def test_a_folder_in_use_is_refused_with_the_process(root):
    with RunFolder.open(root, RECIPE, shaping=SHAPING):
        code = (
            "import sys\nfrom pathlib import Path\nfrom qlora_trainer.errors import RunFolderError\n"
            "from qlora_trainer.runtime.run_folder import RunFolder\n"
            "try:\n    with RunFolder.open(Path(sys.argv[1]), {}, shaping=()): pass\n"
            "except RunFolderError as error: print(error)"
        )
        command = [sys.executable, "-c", code, str(root)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.startswith(f"{root} is in use by process {os.getpid()}. Wait")
    with RunFolder.open(root, RECIPE, shaping=SHAPING):
        pass


def test_an_error_in_the_block_frees_the_folder(root):
    with pytest.raises(KeyboardInterrupt), RunFolder.open(root, RECIPE, shaping=SHAPING):
        raise KeyboardInterrupt
    with RunFolder.open(root, RECIPE, shaping=SHAPING):
        pass


def test_what_a_killed_process_moved_aside_is_put_back(finished):
    for moved in (finished.adapter, finished.exports / "peft", finished.checkpoints / "step-000010"):
        aside = moved.with_name(f".{moved.name}.old")
        aside.mkdir(parents=True)
        (aside / "content").touch()
    with RunFolder.open(finished.root, RECIPE, shaping=SHAPING) as folder:
        assert (folder.adapter / "content").exists()
        assert (folder.exports / "peft" / "content").exists()
        assert (folder.checkpoints / "step-000010" / "content").exists()


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunFolderError, match="file stands where a folder is needed"),
        RunFolder.open(tmp_path / "file" / "run", RECIPE, shaping=SHAPING),
    ):
        pytest.fail("the folder must not open")


def test_a_record_survives_the_round_trip(finished):
    assert finished.load_record("quantize", "key", Stage) == STAGE


def test_a_record_with_another_fingerprint_or_name_is_not_there(finished):
    assert finished.load_record("quantize", "other", Stage) is None
    assert finished.load_record("merge", "key", Stage) is None


def test_a_newer_record_replaces_the_older_one(finished):
    newer = Inner(1.0, "newer")
    finished.save_record("quantize", "new key", newer)
    assert finished.load_record("quantize", "new key", Inner) == newer
    assert finished.load_record("quantize", "key", Stage) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"fingerprint": "key"}', "\xff"])
def test_a_damaged_record_is_warned_of_and_not_there(finished, caplog, text):
    (finished.stages / "quantize.json").write_bytes(text.encode("latin-1"))
    assert finished.load_record("quantize", "key", Stage) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "quantize.json" in caplog.text


def test_a_record_of_another_version_is_warned_of_and_not_there(finished, caplog):
    assert finished.load_record("quantize", "key", Inner) is None
    assert "quantize.json is damaged or of another version" in caplog.text


def test_a_fingerprint_depends_on_values_and_not_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": Path("x")}) == fingerprint({"b": "x", "a": 1})
    parts = [(), (1,), (1, 2), ((1, 2),), ("1",), (1.0000000000000002,), (True,), (None,), (math.nan,), (math.inf,)]
    parts += [(STAGE,), ({"a": 1},), ({"a": 2},)]
    assert len({fingerprint(*each) for each in parts}) == len(parts)


def test_a_fingerprint_is_the_same_in_every_process():
    assert fingerprint("a", 1) == hashlib.sha256(b'["a",1]').hexdigest()


def test_too_little_room_is_told_before_the_work(root, monkeypatch):
    monkeypatch.setattr(run_folder, "free_disk_bytes", lambda path: 2**30)
    RunFolder(root).require_free_disk(2**30, "the merged model")
    with pytest.raises(RunFolderError, match=r"the merged model needs 1\.50 GiB.*1\.00 GiB free"):
        RunFolder(root).require_free_disk(3 * 2**29, "the merged model")


def test_opening_a_folder_needs_no_torch():
    code = "import sys, qlora_trainer.runtime.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
