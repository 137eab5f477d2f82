import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from qlora_trainer.recipe import Recipe
from qlora_trainer.records import RunReport
from qlora_trainer.stages.report.card import CardSubject, base_facts, render_card, write_cards
from qlora_trainer.stages.report.card.discreet import discreet
from qlora_trainer.stages.report.card.metadata import flow

INT4 = "compressed_tensors_w4a16_g32"
HOSTILE = "<script>alert('x')</script> | `rm` **all** [x](javascript:y)\n---\nlicense: mit"


def recipe_with(**sections: dict[str, Any]) -> Recipe:
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "quickstart"},
        "base_model": {"name": "owner/base"},
        "data": {"train": "rows.jsonl", "validation_rows": 4, "test_rows": 6},
        "training": {"max_steps": 5},
    }
    return Recipe.model_validate({**values, **{name: values.get(name, {}) | part for name, part in sections.items()}})


def subject_of(report: RunReport, name: str | None, folder: Path, recipe: Recipe | None = None) -> CardSubject:
    recipe = recipe or recipe_with()
    export = next((each for each in report.exports if each.format == name), None)
    return CardSubject(recipe, report, base_facts(recipe, folder), export)


def head_of(card: str) -> Any:
    """The YAML between the first two rules."""
    return yaml.safe_load(card.split("---\n")[1])


def test_the_head_is_yaml_that_the_hub_reads_with_the_figures_of_the_test_rows(
    report: RunReport, tmp_path: Path
) -> None:
    head = head_of(render_card(subject_of(report, INT4, tmp_path)))
    assert (head["base_model"], head["base_model_relation"]) == ("owner/base", "finetune")
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"qlora", "4-bit", "compressed-tensors"} <= set(head["tags"])
    name, results = model_index_to_eval_results(head["model-index"])
    measured = next(stage for stage in report.stages if stage.name == f"export:{INT4}")
    assert name == "quickstart"
    assert [result.metric_type for result in results] == ["nats_per_label_token", "exact_match", "slot_f1"]
    assert results[0].metric_value == pytest.approx(measured.nats_per_token, abs=1e-6)
    assert results[0].dataset_split == "test"
    assert "private" in results[0].dataset_type


@pytest.mark.parametrize(
    ("name", "library", "relation"), [("peft_adapter", "peft", "adapter"), ("merged_16bit", "transformers", "finetune")]
)
def test_each_kind_of_file_names_its_library(
    report: RunReport, tmp_path: Path, name: str, library: str, relation: str
) -> None:
    export = replace(report.exports[0], format=name)
    head = head_of(render_card(replace(subject_of(report, None, tmp_path), export=export)))
    assert (head["library_name"], head["base_model_relation"]) == (library, relation)


def test_the_licence_is_the_one_that_the_bases_card_gives(report: RunReport, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Base\nlicense: mit\n")
    card = render_card(subject_of(report, INT4, tmp_path))
    assert head_of(card)["license"] == "apache-2.0"
    assert "gives its licence as apache-2.0" in card


@pytest.mark.parametrize(
    "text", [None, "# no head\nlicense: mit\n", "---\nlicense: [a, b]\n---\n", "---\nlicense: x y\n---\n"]
)
def test_a_licence_that_was_not_found_is_not_guessed(report: RunReport, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    card = render_card(subject_of(report, INT4, tmp_path))
    assert "license" not in head_of(card)
    assert "was not found beside its weights" in card


def test_a_local_base_is_called_by_its_folder_and_is_no_base_model_of_the_hub(
    report: RunReport, tmp_path: Path
) -> None:
    base = tmp_path / "my base"
    base.mkdir()
    recipe = recipe_with(base_model={"name": None, "path": str(base)})
    card = render_card(subject_of(report, "peft_adapter", base, recipe))
    assert not {"base_model", "base_model_relation"} & set(head_of(card))
    assert "on the base my base," in card
    assert "PATH-OR-NAME-OF-THE-BASE" in card


def test_nothing_of_this_machine_stands_in_a_card(report: RunReport, tmp_path: Path) -> None:
    place = tmp_path / "with blank"
    place.mkdir()
    token = "hf_" + "a1B2" * 8
    recipe = recipe_with(
        run={"folder": str(place / "runs")},
        base_model={"name": None, "path": str(place)},
        data={"train": str(place / "rows.jsonl"), "test": str(place / "test.jsonl")},
        quantization={"cache_folder": str(place / "cache")},
    )
    said = f"{place}/exports/file differs; token {token}; see {Path.home()}/x/y, file:///etc/secret/key"
    export = replace(report.exports[0], verification=said)
    subject = replace(subject_of(report, None, place, recipe), export=export)
    card = render_card(subject)
    assert str(tmp_path) not in card
    assert "/tmp/" not in card
    assert "/etc/" not in card
    assert str(Path.home()) + "/" not in card
    assert token not in card
    assert "rows.jsonl" in card


def test_hostile_texts_stay_text(report: RunReport, tmp_path: Path) -> None:
    recipe = recipe_with(data={"render": "text", "text_template": HOSTILE + "{prompt}"}, base_model={"name": HOSTILE})
    export = replace(report.exports[0], verification=HOSTILE, status="unverified", verified=False)
    card = render_card(replace(subject_of(report, None, tmp_path, recipe), export=export))
    head = head_of(card)
    assert "license" not in head
    body = card.split("\n---\n", 1)[1]
    outside = "".join(part for index, part in enumerate(body.split("```")) if index % 2 == 0)
    assert "<script>" not in outside
    assert "[x](" not in outside
    assert "**all**" not in outside
    assert "\n---\n" not in outside


def test_files_that_are_not_good_say_so_at_the_top(report: RunReport, tmp_path: Path) -> None:
    subject = subject_of(report, INT4, tmp_path)
    assert subject.export is not None
    bad = render_card(replace(subject, export=replace(subject.export, verified=False, status="unverified")))
    below = render_card(replace(subject, export=replace(subject.export, status="below_bar")))
    assert "Not verified" in bad.split("## Results")[0]
    assert "Below the bar" in below.split("## Results")[0]
    assert "Not verified" not in render_card(replace(subject, export=replace(subject.export, status="complete")))


def test_an_adapter_names_peft_vllm_and_the_base_as_it_was_quantized(report: RunReport, tmp_path: Path) -> None:
    card = render_card(replace(subject_of(report, "peft_adapter", tmp_path), place="me/tuned"))
    assert 'PeftModel.from_pretrained(base, "me/tuned")' in card
    assert 'bnb_4bit_quant_type="nf4"' in card
    assert "--enable-lora --max-lora-rank 16 --lora-modules quickstart=me/tuned" in card
    dora = recipe_with(lora={"use_dora": True})
    assert "--enable-lora" not in render_card(subject_of(report, "peft_adapter", tmp_path, dora))
    pissa = recipe_with(lora={"init": "pissa"})
    assert "Not loadable from here" in render_card(subject_of(report, "peft_adapter", tmp_path, pissa))


def test_a_gguf_file_names_llama_cpp(report: RunReport, tmp_path: Path) -> None:
    export = replace(report.exports[0], format="gguf_q4_1", sha256={"model.gguf": "a" * 64})
    card = render_card(replace(subject_of(report, None, tmp_path), export=export, place="me/tuned"))
    assert "hf download me/tuned model.gguf --local-dir .\nllama-server -m model.gguf" in card


def test_cards_are_written_beside_every_file_that_is_there(report: RunReport, tmp_path: Path) -> None:
    adapter, file = tmp_path / "adapter", tmp_path / "file"
    adapter.mkdir()
    file.mkdir()
    exports = (replace(report.exports[0], path=str(file)), replace(report.exports[1], path=str(tmp_path / "gone")))
    recipe = recipe_with()
    write_cards(recipe, replace(report, exports=exports), base_facts(recipe, tmp_path), adapter=adapter)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")) == [
        "adapter/README.md",
        "file/README.md",
    ]


def test_numbers_and_texts_come_back_from_yaml_as_they_were() -> None:
    value = {"small": 1e-6, "text": 'a: "b"\u2028\x07 # \ud83d\ude00 c', "list": ["no", "1e5"]}
    back = yaml.safe_load(flow(value))  # type: ignore[arg-type]  # a dict of the right kinds
    assert back["small"] == 1e-6
    assert back["list"] == ["no", "1e5"]
    assert json.dumps(back)


@pytest.mark.parametrize(
    "text", ["0.07 nats/token", "https://example.org/a/b", "recipes/quickstart/base", "and/or", "16 / 32", "owner/name"]
)
def test_what_is_no_absolute_path_is_left_alone(text: str) -> None:
    assert discreet(text) == text
