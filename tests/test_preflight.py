"""What ``check`` finds out: room, plan, audit, example, and every problem at once."""

import json
import shutil
from pathlib import Path
from typing import get_args

import huggingface_hub
import pytest

from qlora_trainer import export_formats, pipeline
from qlora_trainer.numerics.footprint import Footprint
from qlora_trainer.preflight import Preflight, check, checking, exports, predict_peak_bytes, room
from qlora_trainer.preflight.prediction import model_shape
from qlora_trainer.recipe import SHAPING_SECTIONS, ExportFormat, Recipe
from qlora_trainer.records import Cut
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.runtime.weight_headers import read_headers
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
        # 30 training rows are left.
        "calibration": {"rows": 16},
    }
    for section, changes in sections.items():
        settings[section] = {**settings.get(section, {}), **changes}
    return Recipe.model_validate(settings)


def with_room(monkeypatch: pytest.MonkeyPatch, *, memory: int = 64 * GIB, disk: int = 64 * GIB) -> None:
    """Sets what the machine seems to have free."""
    monkeypatch.setattr(room, "available_bytes", lambda: memory)
    monkeypatch.setattr("qlora_trainer.preflight.checking.free_disk_bytes", lambda path: disk)


def disk_items(monkeypatch: pytest.MonkeyPatch, base: Path, sections: dict[str, dict[str, object]]) -> dict[str, int]:
    """Predicted bytes on the disk, item by item."""
    with_room(monkeypatch)
    found = check(recipe(base, **sections))
    assert found.disk is not None
    return found.disk.needed.items


def planned(found: Preflight, name: str) -> str:
    return next(stage.text for stage in found.plan if stage.name == name)


def without_modules(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Makes the modules that exports need seem installed, but for these."""
    monkeypatch.setattr(export_formats, "find_spec", lambda name: None if name in missing else object())


# What is found where nothing is wrong.


@pytest.fixture
def found(here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Preflight:
    with_room(monkeypatch)
    return check(recipe(llama_folder, export={"formats": ["peft_adapter", "compressed_tensors_w4a16_g32"]}))


def test_a_recipe_that_can_run_has_no_problems(found: Preflight) -> None:
    assert found.problems == ()
    assert found.notes == ()


def test_memory_is_predicted_for_training_for_the_16_bit_base_and_for_rounding(found: Preflight) -> None:
    assert [budget.purpose for budget in found.memory] == ["training", "evaluation", "rounding"]
    assert all(0.3 * GIB < budget.needed.total < 1 * GIB for budget in found.memory)
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
        "attempts",
        "rounded integers",
    ]


def test_the_disk_holds_two_more_files_and_a_byte_for_each_rounded_weight(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = ["peft_adapter", "compressed_tensors_w4a16_g32", "compressed_tensors_w8a16"]
    items = disk_items(monkeypatch, llama_folder, {"export": {"formats": formats}, "merge": {"into": "dequantized"}})
    assert items["attempts"] == 2 * items["export compressed_tensors_w8a16"]
    base = base_model.resolve(recipe(llama_folder).base_model)
    shape = model_shape(base)
    assert shape is not None
    assert items["rounded integers"] == shape.linear_parameters


def test_two_merged_models_lie_on_the_disk_while_bases_are_compared(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = {"formats": ["peft_adapter", "merged_16bit"]}
    both = disk_items(monkeypatch, llama_folder, {"export": formats})
    assert both["attempts"] == both["merged model"]
    assert "rounded integers" not in both
    one = disk_items(monkeypatch, llama_folder, {"export": formats, "merge": {"into": "original"}})
    assert one["attempts"] == 0


def test_rounding_needs_memory_only_where_it_looks_at_activations(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def purposes(**changes: object) -> list[str]:
        asked = recipe(llama_folder, export={"formats": ["compressed_tensors_w4a16_g32"]}, ladder=changes)
        return [budget.purpose for budget in check(asked).memory]

    with_room(monkeypatch)
    assert "rounding" in purposes(start_rung_int4=1, last_rung=1)
    assert "rounding" not in purposes(start_rung_int4=0, last_rung=0)


def test_rounding_holds_one_block_and_the_hidden_states_of_all_rows(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)

    def items(rows: int, batch: int = 4) -> dict[str, int]:
        calibration = {"rows": rows, "batch_size": batch}
        asked = recipe(llama_folder, export={"formats": ["gptq_w4_g32"]}, calibration=calibration)
        return check(asked).memory[2].needed.items

    shape = model_shape(base_model.resolve(recipe(llama_folder).base_model))
    assert shape is not None
    few, many = items(8), items(16)
    assert few["one block, three times"] == 12 * shape.linear_parameters // shape.layers
    # Six layers read the residual stream's 64 values, down_proj reads 128.
    assert few["Gram matrices of a block"] == 4 * (6 * 64**2 + 128**2)
    hidden = "hidden states of calibration rows"
    assert many[hidden] == 2 * few[hidden]
    assert many["activations"] == few["activations"]
    assert items(8, batch=8)["activations"] == 2 * few["activations"]


def test_a_base_that_is_not_quantized_is_planned_as_it_is(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    asked = recipe(llama_folder, quantization={"data_type": "none"}, export={"formats": ["peft_adapter"]})
    found = check(asked)
    assert found.problems == found.notes == ()
    assert planned(found, "quantize") == "nothing is quantized: the base is held in bfloat16"
    assert "evaluate quantized_base" not in [stage.name for stage in found.plan]
    assert planned(found, "merge") == "into the original base, saved as bfloat16"
    shape = model_shape(base_model.resolve(asked.base_model))
    training = found.memory[0].needed.items
    assert training["base weights"] == 2 * shape.linear_parameters
    assert training["dequantized weights"] == 0
    assert found.disk is not None
    assert "quantized base" not in found.disk.needed.items
    less = check(recipe(llama_folder, quantization={"data_type": "none"}, lora={"init": "pissa"}))
    assert less.disk is not None
    # In bfloat16, as the base is.
    assert less.disk.needed.items["quantized base"] == 2 * shape.parameters


def test_a_gptq_base_is_planned_with_its_rows_and_the_memory_of_rounding(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    asked = recipe(llama_folder, quantization={"data_type": "gptq_int4"}, export={"formats": ["peft_adapter"]})
    found = check(asked)
    assert found.problems == found.notes == ()
    text = "gptq_int4 in groups of 64 on 16 training rows, kept in runs/quantized_bases"
    assert planned(found, "quantize") == text
    assert [budget.purpose for budget in found.memory] == ["training", "evaluation", "rounding"]
    assert found.disk is not None
    shape = model_shape(base_model.resolve(asked.base_model))
    assert found.disk.needed.items["rounded integers"] == shape.linear_parameters
    rest = 2 * (shape.parameters - shape.linear_parameters)
    stored = found.disk.needed.items["quantized base"]
    assert stored == shape.linear_parameters // 2 + shape.linear_parameters // 32 + rest


def test_the_predicted_size_of_a_gptq_base_is_that_of_its_file(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    asked = recipe(llama_folder, quantization={"data_type": "gptq_int4"})
    found = check(asked)
    assert found.disk is not None
    pipeline.run(asked, until="quantize")
    (folder,) = (here / "runs/quantized_bases").iterdir()
    headers = read_headers(folder)
    # Each layer's shape is written beside it, two int64 values, and that is not predicted.
    written = sum(header.bytes for name, header in headers.items() if not name.endswith("weight_shape"))
    assert found.disk.needed.items["quantized base"] == written


def test_a_gptq_base_that_cannot_be_made_is_a_problem(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    quantization = {"data_type": "gptq_int4", "group_size": 128}
    asked = recipe(
        llama_folder, quantization=quantization, calibration={"rows": 31}, export={"formats": ["peft_adapter"]}
    )
    groups, rows = check(asked).problems
    assert groups == (
        "quantization.data_type: gptq_int4 needs inputs in multiples of its group_size, 128; q_proj (64 inputs), "
        "k_proj (64 inputs), v_proj (64 inputs) and 3 more are not. Set group_size: 64"
    )
    assert rows.startswith("calibration.rows: 31 are asked for by quantization.data_type: gptq_int4, and there are 30")


def test_rungs_are_those_that_a_format_and_an_adapter_have() -> None:
    def rungs(name: ExportFormat, **lora: object) -> tuple[int, ...]:
        return exports.climbs(recipe("x", lora=lora, ladder={"last_rung": 5}), name)

    assert rungs("gguf_q4_0") == (0, 1, 2, 3, 4, 5)
    assert rungs("gguf_q4_0", use_dora=True) == (0, 1, 2, 3, 5)
    assert rungs("gptq_w4_g64") == (0, 1, 2, 3, 4)
    assert rungs("compressed_tensors_w8a8") == (0, 1, 2, 3, 4)
    assert rungs("gguf_q4_k_m") == rungs("merged_16bit") == (0,)


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


def test_nothing_is_written_but_the_cache_of_encoded_rows(found: Preflight, here: Path) -> None:
    assert found.plan
    assert sorted(path.name for path in here.iterdir()) == ["rows.jsonl", "runs"]
    assert [path.name for path in (here / "runs").iterdir()] == ["encoded_rows"]


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
    with_room(monkeypatch, memory=GIB // 4)
    training, evaluation = check(recipe(llama_folder)).problems
    assert training.startswith("training needs about 0.")
    assert "0.25 GiB are free (memory of this machine). Lower training.micro_batch_size" in training
    assert evaluation.startswith("evaluation needs about 0.")


def test_another_machine_can_be_planned_for(here: Path, llama_folder: Path) -> None:
    found = check(recipe(llama_folder), device="cuda", memory=3 * GIB)
    training = found.memory[0]
    assert (training.free_bytes, training.place) == (3 * GIB, "given with --memory, a GPU")
    assert "CUDA context" in training.needed.items
    assert found.problems == ()
    assert check(recipe(llama_folder), device="cuda", memory=GIB // 4).problems != ()


def test_a_gpu_that_is_not_there_needs_its_memory_told(here: Path, llama_folder: Path) -> None:
    (problem,) = check(recipe(llama_folder), device="cuda").problems
    assert problem.endswith("Say how much memory it has: --memory 24GiB")


def test_what_fits_is_told_for_every_policy(here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch)
    found = check(recipe(llama_folder, training={"checkpointing": "selective"}))
    assert [room.checkpointing for room in found.rooms] == ["none", "selective", "full"]
    assert found.cut == Cut(2, "selective")
    assert found.rooms[1].needed_bytes == found.memory[0].needed.total
    # Of two layers none is saved by computing them again, so the policies are not compared here.
    assert all(room.largest_micro_batch > 2 < room.longest_window for room in found.rooms)


def test_auto_is_predicted_as_the_first_that_fits(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"micro_batch_size": "auto", "rows_per_step": 6, "checkpointing": "auto"}
    asked = recipe(llama_folder, training={**training, "gradient_accumulation_steps": None})
    with_room(monkeypatch)
    assert check(asked).cut == Cut(6, "none")
    assert "how many at a time is tried out" in planned(check(asked), "train")
    with_room(monkeypatch, memory=GIB // 8)
    assert check(asked).cut == Cut(1, "full")


def test_a_memory_budget_counts_as_what_is_free(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    found = check(recipe(llama_folder, training={"checkpointing": "auto", "memory_budget": "2GiB"}))
    assert found.memory[0].free_bytes == 2 * GIB


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


def test_target_modules_that_the_model_has_not_are_told(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    # One that is right beside it does not hide the wrong one.
    problems = check(recipe(llama_folder, lora={"target_modules": ("q_porj", "v_proj")})).problems
    assert [text for text in problems if text.startswith("lora.")] == [
        "lora.target_modules: the model has no linear layer 'q_porj'. Did you mean 'q_proj'? It has: down_proj, "
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ]


def test_blocks_that_do_not_divide_the_inputs_are_a_problem_that_says_what_fits(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    without_modules(monkeypatch)
    names = ["compressed_tensors_w4a16_g128", "compressed_tensors_w8a16", "gguf_q4_k_m"]
    tensors, gguf = check(recipe(llama_folder, export={"formats": names})).problems
    assert tensors.startswith(
        "export.formats: compressed_tensors_w4a16_g128 needs inputs in multiples of 128; q_proj (64 inputs)"
    )
    # down_proj reads 128 values in this model.
    assert "down_proj" not in tensors
    assert "compressed_tensors_w4a16_g64 fits" in tensors
    assert gguf.startswith("export.formats: gguf_q4_k_m needs inputs in multiples of 256")


def test_an_architecture_that_llama_cpp_computes_otherwise_is_a_problem_before_anything_is_trained(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    shutil.copytree(llama_folder, here / "base")
    config = json.loads((here / "base/config.json").read_text(encoding="utf-8"))
    (here / "base/config.json").write_text(json.dumps({**config, "hidden_act": "relu"}), encoding="utf-8")
    (problem,) = check(recipe(here / "base", export={"formats": ["gguf_q8_0"]})).problems
    assert problem.startswith(f"export.formats: {here / 'base'}: cannot be written as GGUF:\n")
    assert "relu" in problem
    assert check(recipe(here / "base", export={"formats": ["peft_adapter"]})).problems == ()


def test_layers_that_may_stay_in_16_bit_are_a_note(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    names = ["compressed_tensors_w4a16_g128", "compressed_tensors_w8a16"]
    found = check(recipe(llama_folder, export={"formats": names, "allow_16bit_layers": True}))
    assert found.problems == ()
    (note,) = found.notes
    assert note.startswith("compressed_tensors_w4a16_g128 leaves q_proj (64 inputs), k_proj (64 inputs), ")
    assert "down_proj" not in note


@pytest.mark.parametrize(
    ("rows", "problems"), [(30, 0), (31, 1)], ids=["as many as there are", "one more than there are"]
)
def test_more_calibration_rows_than_training_rows_are_a_problem(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int, problems: int
) -> None:
    with_room(monkeypatch)
    names = {"formats": ["peft_adapter", "compressed_tensors_w4a16_g32"]}
    found = check(recipe(llama_folder, export=names, calibration={"rows": rows}))
    assert len(found.problems) == problems
    for problem in found.problems:
        assert problem == (
            "calibration.rows: 31 are asked for by compressed_tensors_w4a16_g32, and there are 30 training rows. Set "
            "calibration.rows: 30 or give more training rows"
        )


def test_rows_that_nothing_learns_from_are_not_asked_for(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    many = {"rows": 10**6}
    for names, ladder in (
        (["peft_adapter", "bitsandbytes_nf4"], {}),
        (["compressed_tensors_w4a16_g32"], {"start_rung_int4": 0, "last_rung": 0}),
    ):
        asked = recipe(llama_folder, export={"formats": names}, calibration=many, ladder=ladder)
        assert check(asked).problems == ()


GGUF = ["gguf_f16", "gguf_q8_0"]


def test_what_no_package_here_can_load_is_written_all_the_same(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    without_modules(monkeypatch, "llama_cpp", "gptqmodel")
    found = check(recipe(llama_folder, export={"formats": [*GGUF, "gptq_w4_g32", "compressed_tensors_w8a16"]}))
    assert found.problems == ()
    assert found.notes == (
        "gguf_f16, gguf_q8_0 will be written but not verified: llama_cpp is not installed. "
        'pip install "qlora-trainer[gguf]"',
        "gptq_w4_g32 will be written but not verified: gptqmodel is not installed. pip install gptqmodel optimum",
    )
    without_modules(monkeypatch)
    assert check(recipe(llama_folder, export={"formats": [*GGUF, "gptq_w4_g32"]})).notes == ()


def test_k_quants_need_llama_cpp_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    without_modules(monkeypatch, "llama_cpp")
    problems, notes = exports.package_findings(recipe("x", export={"formats": ["gguf_q4_k_m", "gguf_q4_0"]}))
    assert [problem.split(" cannot")[0] for problem in problems] == ["export.formats: gguf_q4_k_m"]
    assert [note.split(" will")[0] for note in notes] == ["gguf_q4_0"]


def test_a_gguf_adapter_cannot_hold_dora(here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch)
    without_modules(monkeypatch)
    asked = {"formats": ["gguf_adapter", "peft_adapter"]}
    assert check(recipe(llama_folder, export=asked)).problems == ()
    (problem,) = check(recipe(llama_folder, export=asked, lora={"use_dora": True})).problems
    assert problem.startswith("export.formats: gguf_adapter cannot hold the magnitudes of lora.use_dora: true")


def test_what_is_missing_is_told_before_the_base_is_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_modules(monkeypatch, "llama_cpp")
    asked = recipe("x", base_model={"path": None, "name": "owner/model"}, export={"formats": ["gguf_q6_k"]})
    (problem,) = check(asked).problems
    assert "it is rounded by llama_cpp, which is not installed" in problem


# The plan of the exports.


def test_the_plan_tells_rungs_bases_bar_and_calibration_rows(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    names = ["peft_adapter", "merged_16bit", "bitsandbytes_nf4", "compressed_tensors_w4a16_g32"]
    names.append("compressed_tensors_w8a16")
    found = check(recipe(llama_folder, export={"formats": names}, ladder={"minutes": 2.5, "last_rung": 3}))
    end = "loaded again by transformers, verified, evaluated"
    assert planned(found, "export peft_adapter") == f"written, {end}"
    assert planned(found, "export bitsandbytes_nf4") == (
        f"rounded by its own library, from both bases (dequantized, original), {end}"
    )
    assert planned(found, "export compressed_tensors_w4a16_g32") == (
        "rungs 0, 1, 2, 3 until 98 % of the gain are kept on 16 calibration rows, none begun after 2.5 minutes, from "
        f"both bases (dequantized, original), {end}"
    )
    assert planned(found, "export compressed_tensors_w8a16").startswith("rungs 0, 1, 2, 3 until 99.5 % of the gain")
    assert planned(found, "merge") == (
        "into both bases (dequantized, original), the better on the validation rows is kept, saved as bfloat16"
    )


def test_the_plan_names_the_one_base_that_is_used(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    named = check(recipe(llama_folder, merge={"into": "original"}))
    repaired = check(recipe(llama_folder, lora={"init": "loftq"}))
    assert planned(named, "merge") == "into the original base, saved as bfloat16"
    assert planned(repaired, "merge") == "into the dequantized base, saved as bfloat16"


def test_a_ladder_of_one_rung_calibrates_nothing(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    names = {"formats": ["compressed_tensors_w4a16_g32"]}
    found = check(recipe(llama_folder, export=names, ladder={"start_rung_int4": 0, "last_rung": 0}))
    assert planned(found, "export compressed_tensors_w4a16_g32").startswith("rung 0, from both bases")


def test_every_format_can_be_planned() -> None:
    for name in get_args(ExportFormat):
        assert exports.planned_export(recipe("x"), name).endswith("verified, evaluated")


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


def test_a_hub_model_that_was_downloaded_is_looked_at(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_kwargs: str(llama_folder))
    found = check(recipe("x", base_model={"path": None, "name": "owner/model"}))
    assert found.problems == ()
    assert found.memory
    assert found.example


def test_a_16_bit_model_larger_than_the_gpu_is_measured_with_the_help_of_the_machine(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch)
    free = 2 * GIB
    monkeypatch.setattr(checking, "planned_memory", lambda *_: room.Memory("cuda", free, room.GPU_PLACE))
    monkeypatch.setattr(checking, "memory_predictions", lambda *_: {"evaluation": Footprint({"weights": 3 * GIB})})
    monkeypatch.setattr(checking, "available_bytes", lambda: 4 * GIB)
    found = check(recipe(llama_folder))
    assert found.problems == ()
    assert any("lies in this machine's memory" in note for note in found.notes)
    monkeypatch.setattr(checking, "available_bytes", lambda: 2 * GIB)
    assert "the 16-bit base itself must fit" in check(recipe(llama_folder)).problems[0]


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
