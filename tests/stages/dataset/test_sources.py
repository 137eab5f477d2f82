"""Rows from several places and of several kinds, through one recipe."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.errors import DataError, RecipeError
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.stages import dataset
from qlora_trainer.stages.dataset import TaskRows, audit_lines, load_rows, render_example
from tests.models import tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("base"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(train: object, **data: object) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"name": "test"},
            "base_model": {"path": "base"},
            "data": {"train": train, "validation_rows": 2, "test_rows": 2, **data},
            "training": {"max_steps": 1},
        }
    )


def loaded(base: Path, train: object, **data: object) -> TaskRows:
    return load_rows(recipe(train, **data), base)


def pairs(word: str, count: int) -> list[dict[str, object]]:
    return [{"prompt": f"{word} {number}", "completion": f"{word} done {number}"} for number in range(count)]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
            path.write_text("\n".join(lines))
        case _:
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def sides_without_places(rows: dataset.TaskRows) -> list[list[EncodedRow]]:
    return [[replace(row, place="") for row in side] for side in (rows.train, rows.validation, rows.test)]


def words(rows: list[EncodedRow]) -> Counter[str]:
    return Counter(row.prompt.split(" ")[0] for row in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(here: Path, base: Path, suffix: str) -> None:
    expected = loaded(base, write(here / "expected.jsonl", pairs("Call", 20)))
    found = loaded(base, write(here / f"train{suffix}", pairs("Call", 20)))
    assert sides_without_places(found) == sides_without_places(expected)
    assert all(row.place.startswith(str(here / f"train{suffix}")) for row in found.train)


def test_a_folder_is_all_of_its_files_and_others_are_named(here: Path, base: Path) -> None:
    for number, suffix in enumerate((".jsonl", ".csv", ".parquet")):
        write(here / "rows" / f"{number}{suffix}", pairs(f"Word{number}", 10))
    (here / "rows" / "README.md").write_text("Mine.")
    rows = loaded(base, "rows")
    assert sum(words([*rows.train, *rows.validation, *rows.test]).values()) == 30
    assert rows.notes == ("rows: 1 files are no data files and are not read: README.md",)


def test_several_sources_without_weights_give_each_row_once(here: Path, base: Path) -> None:
    write(here / "a.jsonl", pairs("A", 30))
    write(here / "b.csv", pairs("B", 10))
    rows = loaded(base, ["a.jsonl", "b.csv"])
    assert words([*rows.train, *rows.validation, *rows.test]) == {"A": 30, "B": 10}
    assert [line for line in audit_lines(rows) if line.startswith(("a.", "b."))] == list(rows.sources)
    assert sum(int(line.split(": ")[1].split()[0]) for line in rows.sources) == len(rows.train) == 36


def test_weights_are_shares_of_the_rows_of_an_epoch(here: Path, base: Path) -> None:
    write(here / "a.jsonl", pairs("A", 30))
    write(here / "b.jsonl", pairs("B", 10))
    write(here / "held.jsonl", pairs("Held", 5))
    train = [{"path": "a.jsonl", "weight": 1.0}, {"path": "b.jsonl", "weight": 3.0}]
    held = {"validation": "held.jsonl", "test": "held.jsonl"}
    repeated = loaded(base, train, **held)
    assert words(list(repeated.train)) == {"A": 30, "B": 90}
    assert set(Counter(row.prompt for row in repeated.train if row.prompt.startswith("B")).values()) == {9}
    assert repeated.sources[1] == "b.jsonl: 90 of 120 rows of an epoch (75.0 %), from 10 training rows, each 9.00 times"
    stopped = loaded(base, train, when_used_up="stop", **held)
    assert words(list(stopped.train)) == {"A": 3, "B": 10}
    assert dataset.token_fingerprint(stopped) != dataset.token_fingerprint(repeated)
    assert (len(repeated.validation), len(repeated.test)) == (2, 2)


def test_sources_of_different_formats_and_columns_are_mixed(here: Path, base: Path) -> None:
    write(here / "a.jsonl", [{"q": f"A {number}", "a": "yes"} for number in range(6)])
    turns = [{"role": "user", "content": "B 1"}, {"role": "assistant", "content": "no"}]
    write(here / "b.parquet", [{"chat": turns} for _ in range(3)])
    write(here / "c.json", [{"instruction": "C", "input": f"{number}", "output": "so"} for number in range(4)])
    (here / "d.txt").write_text("D one\n\nD two\n\nD three\n")
    held = write(here / "held.jsonl", pairs("Held", 5))
    rows = loaded(
        base,
        [
            {"path": "a.jsonl", "rename": {"q": "prompt", "a": "completion"}},
            {"path": "b.parquet", "format": "messages", "rename": {"chat": "messages"}},
            {"path": "c.json", "format": "instruction"},
            {"path": "d.txt", "format": "text"},
        ],
        validation=held,
        test=held,
        text_separator="",
    )
    assert len(rows.train) == 6 + 3 + 4 + 3
    assert words(list(rows.train)) == {"A": 6, "B": 3, "C\n\n0": 1, "C\n\n1": 1, "C\n\n2": 1, "C\n\n3": 1, "": 3}
    assert render_example(rows.tokenizer, rows.train[13]) == [("<s>", False), ("D one</s>", True)]


def test_a_long_text_is_split_and_every_token_but_the_first_is_trained_once(here: Path, base: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 40
    (here / "train.txt").write_text(f"{text}\n<|next|>\nShort.")
    (here / "held.txt").write_text("Held.")
    settings = {"format": "text", "text_separator": "<|next|>", "validation": "held.txt", "test": "held.txt"}
    assert "1 of 4 rows dropped: longer than data.window" in loaded(base, "train.txt", window=32, **settings).notes
    rows = loaded(base, "train.txt", window=32, overlong="split", **settings)
    ids = [rows.tokenizer.bos_id, *rows.tokenizer.encode(text.strip("\n")), rows.tokenizer.eos_id]
    labels = [label for row in rows.train for label in row.labels if label != IGNORE_INDEX]
    assert labels[: len(ids) - 1] == ids[1:]
    assert (rows.audit.split, rows.audit.stop_token_trained_share) == (1, 1.0)


def test_text_rows_need_no_chat_template(here: Path, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    (folder / "chat_template.jinja").unlink()
    write(here / "train.jsonl", [{"text": f"Text {number}"} for number in range(9)])
    assert len(loaded(folder, "train.jsonl", format="text").train) == 5


def test_tools_reach_the_template_and_turns_that_say_so_are_not_trained(here: Path, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text("{% if tools %}{{ tools | tojson }}{% endif %}" + template.read_text())
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "First.", "weight": 0},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Second."},
    ]
    rows = loaded(
        folder,
        write(
            here / "train.jsonl",
            [{"messages": turns, "tools": [{"name": f"add{number}"}]} for number in range(9)],
        ),
        format="messages",
    )
    pieces = render_example(rows.tokenizer, rows.train[0])
    assert pieces[0][0].startswith('[{"name": "add')
    assert [text for text, is_trained in pieces if is_trained] == ["Second.</s>"]
    assert rows.notes[0].startswith("9 rows have assistant turns that say they are not to be trained, the first at")


def test_control_tokens_in_the_data_are_noted(here: Path, base: Path) -> None:
    rows = loaded(base, write(here / "train.jsonl", [*pairs("Call", 9), {"prompt": "x</s>", "completion": "y"}]))
    (note,) = rows.notes
    assert note.startswith("1 rows hold the text of a control token")
    assert note.endswith("train.jsonl:10")


def test_a_row_that_begins_with_bos_twice_is_refused_with_its_place(here: Path, base: Path) -> None:
    write(here / "train.jsonl", [*pairs("Call", 9), {"prompt": "<s>x", "completion": "y"}])
    with pytest.raises(DataError, match=r"1 of 10 rows begin with two bos tokens \('<s>'\)(.|\n)*train\.jsonl:10"):
        loaded(base, "train.jsonl", render="text")


def test_rows_of_a_hub_data_set_are_read_from_its_files(
    here: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "snapshot" / "data" / "train-0.parquet", pairs("Train", 9))
    write(tmp_path / "snapshot" / "data" / "test-0.parquet", pairs("Test", 9))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    source = {"hub": "owner/name@main", "files": "data/train-*.parquet"}
    rows = loaded(base, source)
    assert words([*rows.train, *rows.validation, *rows.test]) == {"Train": 9}
    assert dataset.absent_sources(recipe(source).data) == ()


def test_a_hub_data_set_that_is_not_here_is_named(here: Path) -> None:
    asked = recipe({"hub": "owner/name@main", "files": "*.jsonl"})
    assert dataset.absent_sources(asked.data) == ("owner/name@main",)
    assert dataset.file_problems(asked.data) == []


def test_problems_of_every_source_are_told_at_once(here: Path, base: Path) -> None:
    write(here / "a.jsonl", [{"prompt": 1, "completion": "x"}])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x", None], "completion": ["y", "z"]}), here / "b.parquet")
    with pytest.raises(DataError) as caught:
        loaded(base, ["a.jsonl", "b.parquet", "c.jsonl"], test="nowhere")
    assert str(caught.value).splitlines() == [
        "data.train: c.jsonl: there is no such file. Did you mean a.jsonl?",
        "data.train: a.jsonl: 1 problem",
        "  line 1: 'prompt' is a number, needs a text",
        "data.train: b.parquet: 1 problem",
        "  row 2: 'prompt' is null, needs a text",
        "data.test: nowhere: there is no such file. Data files beside it: a.jsonl, b.parquet.",
    ]


# A chat template of the recipe's.

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_template_file_of_the_recipe_takes_the_place_of_the_models(here: Path, base: Path) -> None:
    (here / "mine.jinja").write_text(TEMPLATE)
    write(here / "train.jsonl", pairs("Call", 9))
    rows = loaded(base, "train.jsonl", chat_template="mine.jinja")
    number = rows.train[0].prompt.split()[1]
    assert render_example(rows.tokenizer, rows.train[0]) == [
        (f"[user] Call {number}\n[assistant] ", False),
        (f"Call done {number}</s>", True),
        ("\n", False),
    ]
    (here / "mine.jinja").write_text(TEMPLATE.replace("[", "(").replace("]", ")"))
    other = loaded(base, "train.jsonl", chat_template="mine.jinja")
    assert dataset.token_fingerprint(other) != dataset.token_fingerprint(rows)


def test_a_template_file_that_is_not_there_is_told(here: Path, base: Path) -> None:
    write(here / "train.jsonl", pairs("Call", 9))
    with pytest.raises(RecipeError, match=r"data\.chat_template: none\.jinja cannot be read"):
        loaded(base, "train.jsonl", chat_template="none.jinja")


def test_the_base_with_the_recipes_template_has_every_other_file_of_the_base(here: Path, base: Path) -> None:
    (here / "mine.jinja").write_text(TEMPLATE)
    asked = recipe("train.jsonl", chat_template="mine.jinja").data
    dressed = dataset.with_chat_template(BaseCheckpoint(base, 1, 1), asked)
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in dressed.folder.iterdir()} == names
    for name in names - {"chat_template.jinja"}:
        assert (dressed.folder / name).read_bytes() == (base / name).read_bytes()
    assert (dressed.folder / "chat_template.jinja").read_text() == TEMPLATE
    assert dataset.with_chat_template(BaseCheckpoint(base, 1, 1), asked) == dressed
    assert dataset.with_chat_template(BaseCheckpoint(base, 1, 1), recipe("train.jsonl").data).folder == base
