"""The whole way on a tiny model: what a run leaves, what a second run repeats, what it refuses."""

import json
import os
import shutil
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_trainer import pipeline
from qlora_trainer.errors import DataError, Interrupted, RecipeError, RunFolderError
from qlora_trainer.pipeline.ground import prepare
from qlora_trainer.pipeline.ledger import Ledger
from qlora_trainer.pipeline.measuring import Measuring
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import Cut, RunReport
from qlora_trainer.runtime.progress import Silent, TrainingProgress, WorkProgress
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.stages import export as export_stage

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
FORMATS = (
    "peft_adapter",
    "merged_16bit",
    "bitsandbytes_nf4",
    "bitsandbytes_int8",
    "compressed_tensors_w4a16_g32",
    "compressed_tensors_w8a16",
)


@dataclass
class Watcher:
    """Keeps which stages were carried out and which were read back."""

    stop_at_step: int | None = None
    done: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    worked: set[str] = field(default_factory=set)

    def stage_started(self, name: str) -> None: ...

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        (self.reused if reused else self.done).append(name)

    def training(self, progress: TrainingProgress) -> None:
        if progress.step == self.stop_at_step:
            os.kill(os.getpid(), signal.SIGINT)

    def work(self, progress: WorkProgress) -> None:
        self.worked.add(progress.what)

    def note(self, text: str) -> None: ...


def write_rows(path: Path, count: int, *, first: int = 0) -> str:
    rows = [
        {"prompt": f"Remind me at {number}", "completion": f'{{"at": {number}}}'}
        for number in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe_for(base: Path, folder: Path, **sections: dict[str, object]) -> Recipe:
    values: dict[str, dict[str, object]] = {
        "run": {"name": "tiny", "folder": str(folder / "runs"), "threads": 1},
        "base_model": {"path": str(base)},
        "quantization": {"cache_folder": str(folder / "quantized"), "compute_dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0},
        "data": {
            "train": write_rows(folder / "train.jsonl", 40),
            "validation": write_rows(folder / "validation.jsonl", 6, first=100),
            "test": write_rows(folder / "test.jsonl", 12, first=200),
            "cache_folder": str(folder / "encoded"),
        },
        "training": {
            "learning_rate": 0.01,
            "max_steps": 20,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "log_every_steps": 1,
            "checkpoint_every_steps": 10,
        },
        "evaluation": {"metrics": ["exact_match"], "generation_rows": 4, "max_new_tokens": 8, "kl_tokens": 50},
        "merge": {"data_type": "float32"},
        "export": {"formats": FORMATS},
        "calibration": {"rows": 16, "batch_size": 8},
        "rounding": {"scale_epochs": 1, "learned_steps": 4},
        # How good four bits are on a random model that learned by heart is another test's question.
        "ladder": {"bar_int4": 0.0, "bar_int8": 0.0},
    }
    for name, updates in sections.items():
        values[name] = {**values.get(name, {}), **updates}
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def finished(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, RunReport]:
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_for(llama_folder, folder)
    report = pipeline.run(recipe)
    assert report is not None
    return folder / "runs" / "tiny", recipe, report


def test_a_run_ends_with_a_report_of_every_stage_all_verified(finished: tuple[Path, Recipe, RunReport]) -> None:
    root, _, report = finished
    names = [stage.name for stage in report.stages]
    assert names[:4] == ["base_16bit", "quantized_base", "adapter_unmerged", "merged_16bit"]
    assert {export.format for export in report.exports} == set(FORMATS)
    assert all(export.verified for export in report.exports), [export.verification for export in report.exports]
    assert report.status == "complete"
    assert json.loads((root / "report.json").read_text())["status"] == "complete"
    for name in ("report.md", "report.html", "recipe.yaml", "environment.json", "metrics.jsonl"):
        assert (root / name).stat().st_size > 0


def test_training_wins_and_faithful_files_keep_it(finished: tuple[Path, Recipe, RunReport]) -> None:
    _, _, report = finished
    assert report.gap.learned_nats > 0.5
    kept = {export.format: export.gain_kept for export in report.exports}
    for exact in ("peft_adapter", "merged_16bit", "compressed_tensors_w8a16"):
        assert kept[exact] == pytest.approx(1.0, abs=0.01)
    # Rounding to four bits loses something here, but far from everything.
    assert 0.3 < (kept["compressed_tensors_w4a16_g32"] or 0) < 1.05


def test_auto_is_tried_out_evaluated_and_told_of(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = []
    original = Measuring.longest_batches

    def counted(self: Measuring, model: nn.Module) -> None:
        original(self, model)
        evaluated.append(max(len(row.prompt_ids) for row in self.ground.rows.validation))

    monkeypatch.setattr(Measuring, "longest_batches", counted)
    auto = {
        "micro_batch_size": "auto",
        "gradient_accumulation_steps": None,
        "rows_per_step": 4,
        "checkpointing": "auto",
        "max_steps": 4,
    }
    recipe = recipe_for(llama_folder, tmp_path, training=auto, export={"formats": ("peft_adapter",)})
    report = pipeline.run(recipe)
    assert report is not None
    assert len(evaluated) == 1
    chosen = report.training.chosen
    assert chosen is not None
    assert chosen.trials[0].cut == Cut(4, "none")
    assert chosen.cut in [trial.cut for trial in chosen.trials]
    folder = tmp_path / "runs" / "tiny"
    written = json.loads((folder / "report.json").read_text())["training"]
    assert written["chosen"]["cut"]["micro_batch_size"] == chosen.cut.micro_batch_size
    assert written["predicted_peak_bytes"] in [trial.predicted_bytes for trial in chosen.trials]
    assert str(chosen.cut) in (folder / "report.md").read_text()


def test_the_evaluation_that_is_tried_out_is_the_longest_of_the_run(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, evaluation={"batch_size": 2, "max_new_tokens": 30})
    ground = prepare(recipe, trust_remote_code=False)
    folder = RunFolder(tmp_path / "runs" / "tiny")
    measuring = Measuring(recipe, ground, folder=folder, ledger=Ledger(folder, Silent()))
    seen: list[tuple[int, ...]] = []
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    measuring.longest_batches(model)
    rows = sorted(ground.rows.validation, key=lambda row: len(row.token_ids))[-2:]
    scored, generated = seen
    assert scored == (2, len(rows[-1].token_ids))
    # One token is generated behind prompts that are as long as they will be at the end.
    assert generated == (2, max(len(row.prompt_ids) for row in rows) + 30)


def test_a_second_run_repeats_nothing(finished: tuple[Path, Recipe, RunReport]) -> None:
    _, recipe, report = finished
    watcher = Watcher()
    again = pipeline.run(recipe, observer=watcher)
    assert watcher.done == []
    assert again is not None
    assert (again.stages, again.exports) == (report.stages, report.exports)
    # Seconds of all parts of the run, not of this one; only looking into the cache of quantized bases is timed anew.
    assert again.seconds == pytest.approx(report.seconds, abs=1.0)
    assert again.seconds > 1.0


def test_a_run_that_was_moved_repeats_nothing_and_adds_where_it_lies(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, training={"max_steps": 3}, export={"formats": ("bitsandbytes_nf4",)})
    assert pipeline.run(recipe) is not None
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "runs" / "tiny", tmp_path / "elsewhere" / "renamed")
    section = recipe.run.model_copy(update={"folder": str(tmp_path / "elsewhere"), "name": "renamed"})
    formats = recipe.export.model_copy(update={"formats": ("bitsandbytes_nf4", "compressed_tensors_w8a16")})
    watcher = Watcher()
    report = pipeline.run(recipe.model_copy(update={"run": section, "export": formats}), observer=watcher)
    assert report is not None
    assert [name for name in watcher.done if "w8a16" not in name] == []
    assert [Path(export.path).parent for export in report.exports] == [tmp_path / "elsewhere/renamed/exports"] * 2
    assert all(export.verified for export in report.exports)
    assert not (tmp_path / "runs" / "tiny").exists()


def test_another_export_is_added_without_training_again(finished: tuple[Path, Recipe, RunReport]) -> None:
    _, recipe, _ = finished
    more = recipe.model_copy(
        update={"export": recipe.export.model_copy(update={"formats": (*FORMATS, "compressed_tensors_w4a16_g64")})}
    )
    watcher = Watcher()
    report = pipeline.run(more, observer=watcher)
    name = "export compressed_tensors_w4a16_g64"
    ways = [(0, "dequantized"), (0, "original"), (1, "dequantized"), (1, "original")]
    assert watcher.done == [*(f"{name} rung {rung} {into}" for rung, into in ways), name]
    assert report is not None
    assert report.exports[-1].verified


def test_each_file_says_how_it_was_made(finished: tuple[Path, Recipe, RunReport]) -> None:
    root, _, report = finished
    for export in report.exports:
        if export.format in ("peft_adapter", "merged_16bit"):
            assert export.attempts == ()
            continue
        shipped = [attempt for attempt in export.attempts if attempt.is_shipped]
        assert len(shipped) == 1
        assert shipped[0].nats_per_token == min(attempt.nats_per_token for attempt in export.attempts)
        assert (export.rung, export.merged_into) == (shipped[0].rung, shipped[0].merged_into)
        assert {attempt.merged_into for attempt in export.attempts} == {"dequantized", "original"}
        assert set(export.survived) == {f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS}
    assert set(report.merge_base) == {"dequantized", "original"}
    assert not (root / "exports" / ".work").exists()


def test_the_ladder_is_climbed_to_its_end_where_no_file_is_good_enough(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing = export_stage.standing
    monkeypatch.setattr(export_stage, "standing", lambda *args, **kw: replace(standing(*args, **kw), meets_bar=False))
    recipe = recipe_for(
        llama_folder,
        tmp_path,
        export={"formats": ("compressed_tensors_w4a16_g32", "gptq_w4_g32")},
        ladder={"last_rung": 5},
        rounding={"raised_share": 0.3},
    )
    report = pipeline.run(recipe)
    assert report is not None
    mixed, gptq = report.exports
    assert [attempt.rung for attempt in mixed.attempts] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]
    assert [attempt.rung for attempt in gptq.attempts] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert not any(attempt.meets_bar for attempt in mixed.attempts)
    assert "no rung is left" in (mixed.why_ended or "")
    raised = mixed.attempts[-1]
    before = min(mixed.attempts[:-1], key=lambda attempt: attempt.nats_per_token)
    assert raised.merged_into == before.merged_into
    assert raised.bytes > before.bytes
    assert raised.kl_to_trained < before.kl_to_trained


@pytest.mark.parametrize("name", ["compressed_tensors_w4a16_g128", "gptq_w4_g128"])
def test_layers_that_stay_in_16_bit_are_listed(name: str, llama_folder: Path, tmp_path: Path) -> None:
    """Only down_proj of this model has inputs in multiples of 128."""
    recipe = recipe_for(
        llama_folder,
        tmp_path,
        training={"max_steps": 2},
        export={"formats": (name,), "allow_16bit_layers": True},
    )
    report = pipeline.run(recipe)
    assert report is not None
    unfit = {f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEARS if "down" not in linear}
    assert set(report.exports[0].layers_16bit) == unfit


def test_no_rung_is_begun_when_the_time_is_spent(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(
        llama_folder,
        tmp_path,
        training={"max_steps": 2},
        export={"formats": ("compressed_tensors_w4a16_g32",)},
        ladder={"bar_int4": 0.99, "minutes": 1e-6},
    )
    report = pipeline.run(recipe)
    assert report is not None
    assert [attempt.rung for attempt in report.exports[0].attempts] == [0, 0]
    assert "ladder.minutes" in (report.exports[0].why_ended or "")


def test_an_interrupted_export_goes_on_where_it_was(
    finished: tuple[Path, Recipe, RunReport], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, whole = finished
    recipe = recipe_for(llama_folder, tmp_path, export={"formats": ("compressed_tensors_w4a16_g32",)})
    write = export_stage.write
    calls = iter(range(100))

    def pulled_out(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise OSError("pulled out")
        return write(*args, **kwargs)

    monkeypatch.setattr(export_stage, "write", pulled_out)
    with pytest.raises(OSError, match="pulled out"):
        pipeline.run(recipe)
    monkeypatch.undo()
    watcher = Watcher()
    report = pipeline.run(recipe, observer=watcher)
    assert report is not None
    name = "export compressed_tensors_w4a16_g32"
    assert watcher.done == [f"{name} rung 1 original", name]
    same = next(export for export in whole.exports if export.format == "compressed_tensors_w4a16_g32")
    assert report.exports[0].sha256 == same.sha256


def test_a_recipe_that_trains_otherwise_is_refused_with_the_differences(
    finished: tuple[Path, Recipe, RunReport],
) -> None:
    _, recipe, _ = finished
    other = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"rank": 8})})
    with pytest.raises(RunFolderError, match=r"lora\.rank: 4 there, 8 now"):
        pipeline.run(other)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_losses(
    finished: tuple[Path, Recipe, RunReport], llama_folder: Path, tmp_path: Path
) -> None:
    _, _, whole = finished
    recipe = recipe_for(llama_folder, tmp_path)
    with pytest.raises(Interrupted, match="after step 7 of 20"):
        pipeline.run(recipe, observer=Watcher(stop_at_step=7))
    report = pipeline.run(recipe)
    assert report is not None
    assert [stage.nats_per_token for stage in report.stages] == [stage.nats_per_token for stage in whole.stages]


def test_until_ends_after_the_named_stage(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, training={"max_steps": 2})
    watcher = Watcher()
    assert pipeline.run(recipe, until="quantize", observer=watcher) is None
    assert watcher.done == ["quantize"]
    assert pipeline.run(recipe, until="train", observer=watcher) is None
    assert watcher.done[-1] == "train"
    assert (tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "runs" / "tiny" / "merged").exists()


def test_a_format_that_does_not_fit_is_refused_before_training(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, export={"formats": ("compressed_tensors_w4a16_g128",)})
    with pytest.raises(RecipeError, match=r"multiples of 128.*w4a16_g64 fits"):
        pipeline.run(recipe)
    assert not (tmp_path / "runs").exists()


def test_unknown_target_modules_are_refused_with_a_suggestion(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, lora={"target_modules": ("q_porj", "v_proj")})
    with pytest.raises(RecipeError, match="Did you mean 'q_proj'"):
        pipeline.run(recipe)


def test_rows_without_a_trainable_token_are_fatal(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, data={"window": 3})
    with pytest.raises(DataError, match="window"):
        pipeline.run(recipe)


@pytest.mark.parametrize(
    ("data_type", "lora", "into"),
    [
        ("int8", {}, "dequantized"),
        ("fp4", {"use_rslora": True}, "original"),
        ("nf4", {"init": "loftq"}, "dequantized"),
        ("nf4", {"init": "pissa"}, "original"),
        ("nf4", {"use_dora": True, "target_modules": ("q_proj", "down_proj")}, "dequantized"),
        ("none", {"init": "pissa"}, "measured"),
        ("none", {"use_dora": True}, "original"),
        ("gptq_int4", {"use_dora": True, "target_modules": ("q_proj", "down_proj")}, "original"),
    ],
)
def test_every_kind_of_base_and_adapter_goes_the_whole_way(
    data_type: str, lora: dict[str, object], into: str, llama_folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(
        llama_folder,
        tmp_path,
        quantization={"data_type": data_type},
        lora=lora,
        training={"max_steps": 3},
        merge={"into": into},
        export={"formats": ("peft_adapter", "compressed_tensors_w8a16")},
    )
    report = pipeline.run(recipe)
    assert report is not None
    assert all(export.verified for export in report.exports), [export.verification for export in report.exports]
    config = json.loads((tmp_path / "runs/tiny/exports/peft_adapter/adapter_config.json").read_text())
    base = Path(config["base_model_name_or_path"])
    if lora.get("init") == "pissa" or data_type == "gptq_int4":
        assert base.parent == tmp_path / "quantized"
    else:
        assert base == llama_folder


@pytest.mark.gguf
@pytest.mark.parametrize("use_rslora", [False, True])
def test_gguf_files_go_the_whole_way_through_llama_cpp(use_rslora: bool, llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'qlora-trainer[gguf]'")
    recipe = recipe_for(
        llama_folder,
        tmp_path,
        lora={"use_rslora": use_rslora},
        export={"formats": ("gguf_f16", "gguf_q8_0", "gguf_q4_1", "gguf_q5_0", "gguf_adapter")},
    )
    report = pipeline.run(recipe)
    assert report is not None
    for export in report.exports:
        assert export.verified, export.verification
        assert export.runtime == "llama_cpp"
        assert "tokenizer, chat template and stop tokens are those of training" in export.verification
    kept = {export.format: export.gain_kept or 0.0 for export in report.exports}
    # The adapter's scale is right, or nothing of the gain would be left: alpha / rank is 2, rsLoRA's 4.
    assert kept["gguf_adapter"] == pytest.approx(1.0, abs=0.02)
    assert kept["gguf_q8_0"] == pytest.approx(1.0, abs=0.02)


def test_a_model_that_gguf_does_not_know_is_refused_before_training(llama_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama_folder, base)
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 2.0}
    (base / "config.json").write_text(json.dumps(config))
    recipe = recipe_for(base, tmp_path, export={"formats": ("gguf_q8_0",)})
    with pytest.raises(RecipeError, match=r"export\.formats: .*cannot be written as GGUF"):
        pipeline.run(recipe)
    assert not (tmp_path / "runs").exists()


# Rows of other kinds, and a chat template of the recipe's.

SHORT: dict[str, dict[str, object]] = {
    "training": {"max_steps": 3},
    "export": {"formats": ("peft_adapter", "bitsandbytes_nf4")},
}


def test_every_file_holds_the_chat_template_of_the_recipe(llama_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    own = (llama_folder / "chat_template.jinja").read_text()
    template.write_text(own.replace("{{ bos_token }}", "{{ bos_token }}Mine: "))
    recipe = recipe_for(llama_folder, tmp_path, **SHORT, data={"chat_template": str(template)})
    report = pipeline.run(recipe)
    assert report is not None
    assert all(export.verified for export in report.exports)
    root = tmp_path / "runs" / "tiny"
    for folder in (root / "merged", root / "exports/peft_adapter", root / "exports/bitsandbytes_nf4"):
        assert (folder / "chat_template.jinja").read_text() == template.read_text()
    settings = json.loads((root / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(llama_folder)
    assert (llama_folder / "chat_template.jinja").read_text() == own
    assert "Mine: " in (root / "report.md").read_text()


def test_plain_texts_of_weighted_sources_go_the_whole_way(llama_folder: Path, tmp_path: Path) -> None:
    for name, count in (("a", 30), ("b", 6)):
        rows = [{"text": f"The fox {name} jumps over dog {number}."} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "train": [{"path": str(tmp_path / f"{name}.jsonl"), "weight": 1.0} for name in "ab"],
        "validation": str(tmp_path / "a.jsonl"),
        "test": str(tmp_path / "b.jsonl"),
        "format": "text",
    }
    report = pipeline.run(recipe_for(llama_folder, tmp_path, **SHORT, data=data, evaluation={"metrics": ()}))
    assert report is not None
    assert report.status == "complete"
    assert all(export.verified for export in report.exports)
