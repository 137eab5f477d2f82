"""What ``check`` finds out: room, plan, audit, example, and every problem at once."""

import json
import shutil
from pathlib import Path

import pytest

from qlora_trainer.preflight import Preflight, check, predict_peak_bytes, room
from qlora_trainer.recipe import SHAPING_SECTIONS, Recipe
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.stages import base_model, dataset

GIB = 2**30


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with forty rows in it."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Call {number}", "completion": f"call({number})"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return tmp_path


def recipe(base: Path | str, **sections: dict[str, object]) -> Recipe:
    settings: dict[str, dict[str, object]] = {
        "run": {"name": "tiny"},
        "base_model": {"path": str(base)},
        "data": {"train": "rows.jsonl", "validation_rows": 4, "test_rows": 6},
        "training": {"max_steps": 5, "micro_batch_size": 2, "gradient_accumulation_steps": 3},
    }
    for section, changes in sections.items():
        settings[section] = {**settings.get(section, {}), **changes}
    return Recipe.model_validate(settings)


def with_room(monkeypatch: pytest.MonkeyPatch, *, memory: int = 64 * GIB, disk: int = 64 * GIB) -> None:
    """Sets what the machine seems to have free."""
    monkeypatch.setattr(room, "available_bytes", lambda: memory)
    monkeypatch.setattr("qlora_trainer.preflight.checking.free_disk_bytes", lambda path: disk)


# What is found where nothing is wrong.


@pytest.fixture
def found(here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Preflight:
    with_room(monkeypatch)
    return check(recipe(llama_folder, export={"formats": ["peft_adapter", "compressed_tensors_w4a16_g32"]}))


def test_a_recipe_that_can_run_has_no_problems(found: Preflight) -> None:
    assert found.problems == ()
    assert found.notes == ()


def test_memory_is_predicted_for_training_and_for_the_16_bit_base(found: Preflight) -> None:
    assert [budget.purpose for budget in found.memory] == ["training", "evaluation"]
    assert all(0.5 * GIB < budget.needed.total < 1 * GIB for budget in found.memory)
    assert all(budget.free_bytes == 64 * GIB for budget in found.memory)


def test_the_disk_is_predicted_with_every_export(found: Preflight) -> None:
    assert found.disk is not None
    assert list(found.disk.needed.items) == [
        "quantized base",
        "checkpoints",
        "adapter",
        "merged model",
        "export peft_adapter",
        "export compressed_tensors_w4a16_g32",
    ]


def test_the_plan_names_every_stage_in_order(found: Preflight) -> None:
    assert [stage.name for stage in found.plan] == [
        "base model",
        "evaluate base_16bit",
        "quantize",
        "evaluate quantized_base",
        "train",
        "evaluate adapter_unmerged",
        "merge",
        "evaluate merged_16bit",
        "export peft_adapter",
        "export compressed_tensors_w4a16_g32",
        "report",
    ]


def test_the_plan_tells_steps_rows_and_epochs(found: Preflight) -> None:
    training = next(stage.text for stage in found.plan if stage.name == "train")
    # 40 rows less 4 for validation and 6 for the test; 5 steps of 2 x 3 rows are each of them once.
    assert training.startswith("5 steps of 6 rows (2 x 3), 1.00 epochs of 30 rows; about ")
    assert "validation on 4 rows" in training


def test_the_example_is_a_whole_row_of_which_the_answer_is_trained(found: Preflight) -> None:
    text = "".join(piece for piece, _ in found.example)
    trained = "".join(piece for piece, is_trained in found.example if is_trained)
    number = text.removeprefix("<s><|user|>Call ").partition("<")[0]
    assert text == f"<s><|user|>Call {number}<|assistant|>call({number})</s>"
    assert trained == f"call({number})</s>"


def test_nothing_is_written(found: Preflight, here: Path) -> None:
    assert found.plan
    assert [path.name for path in here.iterdir()] == ["rows.jsonl"]


def test_the_predicted_peak_of_a_run_is_that_of_the_check(found: Preflight, llama_folder: Path) -> None:
    asked = recipe(llama_folder)
    base = base_model.resolve(asked.base_model)
    predicted = predict_peak_bytes(asked, base, dataset.load_rows(asked, base.folder))
    assert predicted == found.memory[0].needed.total


# One truth in two places: the pipeline's modules import torch, which `check` must not.


# Problems.


def test_too_little_memory_is_a_problem_with_a_mend(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch, memory=GIB * 45 // 100)
    training, evaluation = check(recipe(llama_folder)).problems
    assert training.startswith("training needs about 0.5")
    assert "0.45 GiB are free (memory of this machine). Lower training.micro_batch_size" in training
    assert evaluation.startswith("evaluation needs about 0.5")


def test_memory_that_is_only_just_enough_is_a_note(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    asked = recipe(llama_folder)
    training = check(asked).memory[0].needed
    kept = training.items["freed, kept by the allocator"]
    with_room(monkeypatch, memory=training.total - kept // 2)
    found = check(asked)
    assert found.problems == ()
    assert found.notes[0].startswith("training needs about")


def test_too_little_disk_is_a_problem(here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, disk=1000)
    (problem,) = check(recipe(llama_folder)).problems
    assert problem.startswith("the run needs about 0.00 GiB, and 0.00 GiB are free (disk of runs). Make room")


def test_what_a_run_has_written_counts_as_room(here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, disk=1000)
    merged = here / "runs/tiny/merged/model.safetensors"
    merged.parent.mkdir(parents=True)
    merged.write_bytes(bytes(10**7))
    assert check(recipe(llama_folder)).problems == ()


def test_problems_of_base_data_metrics_and_folder_are_told_at_once(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_trainer.data.scoring.find_spec", lambda name: None)
    (here / "bad.jsonl").write_text("{}\nnot json\n", encoding="utf-8")
    former = recipe(llama_folder, lora={"rank": 8})
    with RunFolder.open(here / "runs/tiny", former.model_dump(mode="json"), shaping=SHAPING_SECTIONS) as folder:
        folder.save_record("train", "key", former.run.name)
    asked = recipe(here / "nowhere", data={"train": "bad.jsonl", "test": "none.csv"}, evaluation={"metrics": ["bleu"]})
    base, train, test, metrics, run_folder = check(asked).problems
    assert "there is no folder" in base
    assert "bad.jsonl" in train
    assert "none.csv" in test
    assert "sacrebleu" in metrics
    assert "lora.rank: 8 there, 16 now" in run_folder


def test_a_base_without_tokenizer_and_with_a_cut_shard_tells_both(
    here: Path, llama_folder: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(llama_folder, tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (problem,) = check(recipe(broken)).problems
    assert "tokenizer.json" in problem
    assert "model.safetensors" in problem


def test_groups_that_do_not_divide_the_inputs_are_a_problem(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    asked = recipe(llama_folder, export={"formats": ["compressed_tensors_w4a16_g128", "compressed_tensors_w8a16"]})
    (problem,) = check(asked).problems
    assert problem.startswith("export.formats: compressed_tensors_w4a16_g128 needs inputs in multiples of 128; q_proj")
    # down_proj reads 128 values in this model.
    assert "down_proj" not in problem


def test_a_folder_of_this_recipe_is_no_problem(here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch)
    asked = recipe(llama_folder)
    with RunFolder.open(here / "runs/tiny", asked.model_dump(mode="json"), shaping=SHAPING_SECTIONS) as folder:
        folder.save_record("train", "key", asked.run.name)
    changed = recipe(llama_folder, evaluation={"samples": 1})
    assert check(changed).problems == ()


def test_a_hub_model_is_not_downloaded_and_its_data_are_still_looked_at(here: Path) -> None:
    asked = recipe("x", base_model={"path": None, "name": "owner/model"}, data={"test": "none.csv"})
    found = check(asked)
    assert "owner/model is on the hub" in found.notes[0]
    assert len(found.problems) == 1
    assert "none.csv" in found.problems[0]


def test_a_base_of_another_family_is_planned_without_a_prediction(
    here: Path, llama_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(llama_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    del config["intermediate_size"]
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = check(recipe(other))
    assert found.problems == ()
    assert found.memory == ()
    assert found.plan
    assert "no prediction of memory" in found.notes[0]


# The machine.


def test_a_gpu_is_asked_for_its_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 143000\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(room, "NVIDIA_DEVICES", tmp_path)
    assert room.free_memory() == room.Memory("cuda", 143000 * 2**20, "memory of the GPU")


@pytest.mark.parametrize("answer", ["exit 9", "echo '[N/A]'"])
def test_a_gpu_that_does_not_answer_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(room, "NVIDIA_DEVICES", tmp_path)
    assert room.free_memory().device == "cpu"
