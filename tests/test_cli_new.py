"""``new``: what is chosen from base, data and machine, and that the recipe can be run as it was written."""

import json
import shutil
from pathlib import Path

import pytest
import typer

from qlora_trainer import preflight
from qlora_trainer.cli import new_verb
from qlora_trainer.errors import BaseModelError, DataError
from qlora_trainer.preflight import Wish, check, propose, proposing, room
from qlora_trainer.recipe import Recipe
from qlora_trainer.recipe_file import dump_short, load
from tests.public_models import FAMILIES, write_tokenizer
from tests.test_cli import invoke

GIB = 2**30


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    machine(monkeypatch, 16 * GIB)
    return tmp_path


def machine(monkeypatch: pytest.MonkeyPatch, free: int, device: str = "cpu") -> None:
    monkeypatch.setattr(proposing, "free_memory", lambda: room.Memory(device, free, "memory of this machine"))


def rows(path: str, first: str = "prompt", second: str = "completion", count: int = 60) -> str:
    lines = [json.dumps({first: f"Call {number}", second: f"call({number})"}) for number in range(count)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def proposed(base: Path | str, data: str, **columns: str) -> Recipe:
    recipe = propose(Wish("mine", str(base), data, **columns)).recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    return recipe


def test_a_recipe_is_written_that_can_be_checked_and_has_a_reason_for_each_choice(
    here: Path, llama_folder: Path
) -> None:
    code, out, err = invoke("new", "mine.yaml", "--base", llama_folder, "--data", rows("train.jsonl"))
    assert (code, err) == (0, "")
    for choice in ("data.window", "training.micro_batch_size", "export.formats", "training.epochs", "prompt"):
        assert choice in out
    assert "Ready: qlora-trainer check mine.yaml" in out
    recipe = load("mine.yaml")
    assert check(recipe).problems == ()
    assert recipe.run.name == "mine"
    # The longest row: bos, three tokens for the roles, the letters; 64 is the next multiple of 64.
    assert recipe.data.window == 64
    assert recipe.data.test_rows == 6
    assert recipe.export.formats[-1] == "compressed_tensors_w4a16_g64"


@pytest.mark.parametrize("pair", proposing.COLUMN_PAIRS)
def test_known_column_names_are_found(here: Path, llama_folder: Path, pair: tuple[str, str]) -> None:
    data = proposed(llama_folder, rows("train.jsonl", *pair)).data
    assert (data.format, data.prompt_column, data.completion_column) == ("prompt_completion", *pair)


def test_unknown_column_names_are_asked_for(here: Path, llama_folder: Path) -> None:
    file = rows("train.jsonl", "q", "a")
    with pytest.raises(DataError, match="has the columns q, a"):
        proposed(llama_folder, file)
    assert proposed(llama_folder, file, prompt_column="q", completion_column="a").data.prompt_column == "q"


def test_conversations_are_found(here: Path, llama_folder: Path, tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} says"} for role in ("user", "assistant", "user", "assistant")]
    lines = [json.dumps({"messages": [{"role": "user", "content": f"{n}"}, turns[1], *turns[2:]]}) for n in range(60)]
    Path("train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert proposed(llama_folder, "train.jsonl").data.train_turns == "all"
    thinking = shutil.copytree(llama_folder, tmp_path / "thinking")
    write_tokenizer(thinking, FAMILIES["qwen3"])
    (thinking / "generation_config.json").write_text('{"eos_token_id": 0}', encoding="utf-8")
    assert proposed(thinking, "train.jsonl").data.format == "messages"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"instruction": "Add {n}.", "input": "", "output": "Done."}, "instruction"),
        ({"conversations": [{"from": "human", "value": "Add {n}."}, {"from": "gpt", "value": "Done."}]}, "sharegpt"),
        ({"text": "Once upon a time there were {n}."}, "text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_kinds_of_rows_are_found_by_their_columns(
    row: dict[str, object], kind: str, here: Path, llama_folder: Path
) -> None:
    lines = [json.dumps(row).replace("{n}", str(n)) for n in range(60)]
    Path("train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert proposed(llama_folder, "train.jsonl").data.format == kind


def test_files_beside_the_training_rows_are_used(here: Path, llama_folder: Path) -> None:
    rows("validation.jsonl", count=5)
    data = proposed(llama_folder, rows("train.jsonl")).data
    assert (data.validation, data.validation_rows, data.test, data.test_rows) == ("validation.jsonl", None, None, 6)


def test_less_memory_gives_a_smaller_micro_batch_and_the_same_step(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = rows("train.jsonl")
    roomy = proposed(llama_folder, file).training
    # The libraries alone take half a GiB of what is predicted.
    machine(monkeypatch, int(0.5595 * GIB))
    tight = proposed(llama_folder, file).training
    assert tight.micro_batch_size < roomy.micro_batch_size == 16
    assert tight.batch_size == roomy.batch_size == 16


def test_a_small_model_on_a_processor_computes_in_float32(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert proposed(llama_folder, rows("train.jsonl")).quantization.compute_dtype == "float32"
    machine(monkeypatch, 16 * GIB, "cuda")
    assert proposed(llama_folder, "train.jsonl").quantization.compute_dtype == "bfloat16"


def test_a_base_without_a_template_is_trained_as_text(here: Path, llama_folder: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(llama_folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    assert proposed(plain, rows("train.jsonl")).data.render == "text"


def test_a_hub_model_that_is_not_here_gets_small_choices_and_is_told(here: Path) -> None:
    code, out, _ = invoke("new", "mine.yaml", "--base", "owner/model", "--data", rows("train.jsonl"))
    assert code == 0
    assert "the base is not on this machine yet" in out
    recipe = load("mine.yaml")
    assert (recipe.base_model.name, recipe.training.micro_batch_size) == ("owner/model", 1)


def test_questions_are_asked_on_a_terminal_and_never_elsewhere(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = invoke("new", "--base", llama_folder)
    assert code == 2
    assert "new needs --data, RECIPE" in err
    answers = iter([rows("train.jsonl"), "asked.yaml"])
    monkeypatch.setattr(new_verb.sys, "stdin", Terminal())
    monkeypatch.setattr(typer, "prompt", lambda _question: next(answers))
    new_verb.new(None, base=str(llama_folder))
    assert load("asked.yaml").run.name == "asked"


class Terminal:
    def isatty(self) -> bool:
        return True


def test_nothing_is_overwritten(here: Path, llama_folder: Path) -> None:
    Path("mine.yaml").write_text("mine", encoding="utf-8")
    code, _, err = invoke("new", "mine.yaml", "--base", llama_folder, "--data", rows("train.jsonl"))
    assert code == 2
    assert "not overwritten" in err
    assert Path("mine.yaml").read_text(encoding="utf-8") == "mine"


def test_a_folder_that_is_no_model_is_told_before_anything_is_written(here: Path) -> None:
    with pytest.raises(BaseModelError, match="there is no folder"):
        proposed("./nowhere", rows("train.jsonl"))


def test_what_the_check_finds_ends_with_its_exit_code(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = preflight.Preflight((), None, (), (), (), (), ("the disk is full",))
    monkeypatch.setattr(preflight, "check", lambda _recipe: found)
    code, _, err = invoke("new", "mine.yaml", "--base", llama_folder, "--data", rows("train.jsonl"))
    assert code == 2
    assert "the disk is full" in err


def test_a_short_text_says_what_was_given_and_reads_back_equal(here: Path, llama_folder: Path) -> None:
    recipe = proposed(llama_folder, rows("train.jsonl"))
    text = dump_short(recipe, title="Two\nlines.")
    assert text.startswith("# Two lines.\nrun:\n")
    assert "max_gradient_norm" not in text
    Path("short.yaml").write_text(text, encoding="utf-8")
    assert load("short.yaml") == recipe
