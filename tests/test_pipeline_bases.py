"""The whole way on a base that is not quantized, and on one whose integers GPTQ chose on training rows."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_trainer import pipeline
from qlora_trainer.errors import Interrupted, RecipeError, RunFolderError
from qlora_trainer.pipeline import Asked, pack
from qlora_trainer.pipeline.tasks import Asking, TaskRequest
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import RunReport
from qlora_trainer.runtime.progress import Silent
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.serving import models_of, serve_commands
from tests.test_pipeline import Watcher, recipe_for

FORMATS = ("peft_adapter", "merged_16bit", "compressed_tensors_w4a16_g32", "compressed_tensors_w8a16")
TYPES = ("none", "gptq_int4")


@dataclass(frozen=True)
class Finished:
    recipe: Recipe
    report: RunReport
    root: Path

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.root)


def asked(data_type: str, base: Path, folder: Path, **sections: dict[str, object]) -> Recipe:
    own = {"data_type": data_type, **sections.pop("quantization", {})}
    return recipe_for(base, folder, quantization=own, **sections)


def carried_out(recipe: Recipe) -> Finished:
    report = pipeline.run(recipe)
    assert report is not None
    return Finished(recipe, report, Path(recipe.run.folder) / "tiny")


@pytest.fixture(scope="module")
def runs(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    export = {"formats": FORMATS}
    return {
        kind: carried_out(asked(kind, llama_folder, tmp_path_factory.mktemp(kind), export=export)) for kind in TYPES
    }


@pytest.mark.parametrize("kind", TYPES)
def test_every_file_is_verified_and_keeps_what_was_learned(kind: str, runs: dict[str, Finished]) -> None:
    report = runs[kind].report
    assert report.status == "complete"
    assert all(export.verified for export in report.exports), [export.verification for export in report.exports]
    assert report.gap.learned_nats > 0.5
    kept = {export.format: export.gain_kept for export in report.exports}
    for exact in ("peft_adapter", "merged_16bit", "compressed_tensors_w8a16"):
        assert kept[exact] == pytest.approx(1.0, abs=0.01)


def test_a_base_that_is_not_quantized_has_no_row_no_cost_and_no_map(runs: dict[str, Finished]) -> None:
    run = runs["none"]
    assert [stage.name for stage in run.report.stages][:3] == ["base_16bit", "adapter_unmerged", "merged_16bit"]
    assert run.report.gap.quantization_nats == 0.0
    assert run.report.gap.why_null == "the base was not quantized, which has cost nothing"
    assert run.report.sentence.startswith("The base was not quantized; training on your task won ")
    page = (run.root / "report.md").read_text()
    assert "16-bit base + adapter" in page
    assert "Quantized base" not in page
    assert "Quantization cost" not in page
    # There is one base to merge into, so nothing is tried out.
    assert run.report.merge_base == {}
    assert {export.merged_into for export in run.report.exports} == {None, "original"}


def test_a_gptq_base_is_told_of_as_any_quantized_one(runs: dict[str, Finished]) -> None:
    run = runs["gptq_int4"]
    assert [stage.name for stage in run.report.stages][1] == "quantized_base"
    assert run.report.quantization["layers"] == 14
    assert run.report.quantization["bits_per_parameter"] == pytest.approx(4.25, abs=0.05)
    assert run.report.sentence.startswith("Storing the model in 4 bits ")
    assert "Relative quantization error of each layer" in (run.root / "report.html").read_text()
    assert set(run.report.merge_base) == {"dequantized", "original"}


@pytest.mark.parametrize("kind", TYPES)
def test_a_second_run_repeats_nothing(kind: str, runs: dict[str, Finished]) -> None:
    watcher = Watcher()
    again = pipeline.run(runs[kind].recipe, observer=watcher)
    assert watcher.done == []
    assert again is not None
    assert again.stages == runs[kind].report.stages


@pytest.mark.parametrize("kind", TYPES)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_losses(
    kind: str, runs: dict[str, Finished], llama_folder: Path, tmp_path: Path
) -> None:
    recipe = asked(kind, llama_folder, tmp_path, export={"formats": ("peft_adapter",)})
    with pytest.raises(Interrupted, match="after step 7 of 20"):
        pipeline.run(recipe, observer=Watcher(stop_at_step=7))
    report = pipeline.run(recipe)
    assert report is not None
    stages = {stage.name: stage.nats_per_token for stage in runs[kind].report.stages}
    assert all(stage.nats_per_token == stages[stage.name] for stage in report.stages)


@pytest.mark.parametrize("kind", TYPES)
def test_the_commands_of_the_report_load_the_adapter_onto_its_base(kind: str, runs: dict[str, Finished]) -> None:
    page = (runs[kind].root / "report.md").read_text()
    start = page.index("from peft import PeftModel")
    code = page[start : page.index("```", start)]
    assert ("decompress_model" in code) is (kind == "gptq_int4")
    # The warning is transformers' own, at every insertion by peft.
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        exec(code, scope := {})
    model = scope["model"]
    assert isinstance(model, PeftModel)
    exported = AutoModelForCausalLM.from_pretrained(runs[kind].root / "merged", dtype=torch.float32)
    ids = torch.tensor([[1, 20, 21, 22, 23]])
    with torch.no_grad():
        logits = model(ids).logits.float()
        difference = (logits - exported(ids).logits).norm() / logits.norm()
    # ``dtype="auto"`` takes what the base's file says: bfloat16 for the 16-bit base, float32 for the other.
    assert difference < 2e-2


def test_the_adapter_of_a_gptq_base_names_the_folder_of_that_base(
    runs: dict[str, Finished], llama_folder: Path
) -> None:
    def named(kind: str) -> Path:
        config = json.loads((runs[kind].root / "exports/peft_adapter/adapter_config.json").read_text())
        return Path(config["base_model_name_or_path"])

    assert named("none") == llama_folder
    assert named("gptq_int4").parent == Path(runs["gptq_int4"].recipe.quantization.cache_folder)
    assert (named("gptq_int4") / "config.json").is_file()


@pytest.mark.parametrize("kind", TYPES)
def test_cards_say_how_the_base_was_stored(kind: str, runs: dict[str, Finished]) -> None:
    card = (runs[kind].root / "exports/peft_adapter/README.md").read_text()
    assert "BitsAndBytesConfig" not in card
    assert "PEFT, on the 16-bit base:" in card
    if kind == "none":
        assert "trained with LoRA (16-bit base, rank 4)" in card
        assert '"qlora"' not in card
        assert "Its exact base" not in card
    else:
        assert "trained with QLoRA (gptq_int4 base, rank 4)" in card
        assert "**Its exact base is not part of this file.**" in card
        assert str(runs[kind].recipe.quantization.cache_folder) not in card


def test_a_run_without_a_quantized_base_has_no_model_of_that_name(runs: dict[str, Finished]) -> None:
    run = runs["none"]
    assert models_of(run.folder, run.recipe).names[:3] == ("base", "trained", "merged")
    with pytest.raises(RunFolderError, match="this run has no model 'quantized'"):
        pipeline.talk(run.recipe, "quantized")


@pytest.mark.parametrize("kind", TYPES)
def test_the_trained_model_speaks_as_the_adapter_that_was_exported(kind: str, runs: dict[str, Finished]) -> None:
    recipe = runs[kind].recipe
    said = {at: pipeline.talk(recipe, at).say("Remind me at 203", max_new_tokens=8) for at in ("trained", "base")}
    assert said["trained"] == pipeline.talk(recipe, "peft_adapter").say("Remind me at 203", max_new_tokens=8)
    assert said["trained"] != said["base"]


def test_a_deleted_gptq_base_is_made_again_to_the_same_bits(llama_folder: Path, tmp_path: Path) -> None:
    recipe = asked("gptq_int4", llama_folder, tmp_path, training={"max_steps": 2})
    pipeline.run(recipe, until="train")
    (folder,) = Path(recipe.quantization.cache_folder).iterdir()
    before = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    pipeline.talk(recipe, "trained")
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("none", ("base_16bit", "adapter_unmerged", "merged_16bit")),
        ("gptq_int4", ("base_16bit", "quantized_base", "adapter_unmerged", "merged_16bit")),
    ],
)
def test_tasks_are_asked_of_the_models_that_there_are(
    kind: str, names: tuple[str, ...], runs: dict[str, Finished], llama_folder: Path
) -> None:
    run = runs[kind]
    asking = Asking(run.recipe, TaskRequest(("probes",)), run.folder, Silent(), trust_remote_code=False)
    assert asking.stages()[: len(names)] == names
    trained = asking.files("adapter_unmerged")
    assert trained.adapter == run.root / "adapter"
    if kind == "none":
        assert trained.model == llama_folder
    else:
        assert trained.model.name == asking.models.quantized.key


def test_a_gptq_adapter_is_sent_with_the_name_of_the_original_base(runs: dict[str, Finished]) -> None:
    parcel = pack(runs["gptq_int4"].recipe, Asked("peft_adapter", "me/tuned", base_on_hub="owner/base"))
    settings = json.loads(bytes(parcel.files["adapter_config.json"]))  # type: ignore[arg-type]  # changed, so no path
    assert settings["base_model_name_or_path"] == "owner/base"
    assert "**Its exact base is not part of this file.**" in bytes(parcel.files["README.md"]).decode()  # type: ignore[arg-type]  # made, so no path


def test_servers_are_given_the_base_that_the_adapter_was_trained_on(
    runs: dict[str, Finished], llama_folder: Path
) -> None:
    (plain,) = serve_commands(runs["none"].recipe, runs["none"].folder, "trained")
    assert f"vllm serve {llama_folder} --enable-lora" in plain.command
    assert "on the base in 16 bit;" in plain.notes[1]
    (packed,) = serve_commands(runs["gptq_int4"].recipe, runs["gptq_int4"].folder, "trained")
    assert f"vllm serve {runs['gptq_int4'].recipe.quantization.cache_folder}/gptq_int4-" in packed.command
    assert "bitsandbytes" not in packed.command


def test_other_calibration_is_another_run(runs: dict[str, Finished]) -> None:
    recipe = runs["gptq_int4"].recipe
    other = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"rows": 8})})
    with pytest.raises(RunFolderError, match=r"calibration\.rows: 16 there, 8 now"):
        pipeline.run(other)


def test_groups_that_do_not_fit_are_refused_before_anything_is_read_into_memory(
    llama_folder: Path, tmp_path: Path
) -> None:
    recipe = asked("gptq_int4", llama_folder, tmp_path, quantization={"group_size": 128})
    with pytest.raises(
        RecipeError, match=r"inputs in multiples of its group_size, 128; .*\(64 inputs\).* Set group_size: 64"
    ):
        pipeline.run(recipe)
    assert not (tmp_path / "runs").exists()
