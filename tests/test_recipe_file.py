"""Recipe files: what YAML says is what is read, and every problem is told at once with its place and mend."""

# ruff: noqa: E501 - a case and its message stand on one line each

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qlora_trainer.errors import RecipeError
from qlora_trainer.recipe import Recipe
from qlora_trainer.recipe_file import describe, dump, load

SMALLEST = """\
run: {name: tiny}
base_model: {path: models/tiny}
data: {train: rows.jsonl, validation_rows: 10, test_rows: 10}
training: {max_steps: 5}
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_recipe(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, its count checked, the file's name left out."""
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    head, *lines = str(caught.value).splitlines()
    assert head == f"{path}: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return [line.strip().removeprefix(f"{path}:") for line in lines]


def only_problem(path: Path, *overrides: str) -> str:
    found = problems(path, *overrides)
    assert len(found) == 1, found
    return found[0]


# What is read.


def test_a_file_without_problems_is_read(write: Write) -> None:
    recipe = load(write(SMALLEST))
    assert recipe.run.name == "tiny"
    assert recipe.training.max_steps == 5


def test_a_whole_number_stands_for_a_number(write: Write) -> None:
    assert load(write(SMALLEST + "lora: {alpha: 32}")).lora.alpha == 32.0


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "marked.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.encode())
    assert load(path).run.name == "tiny"


def test_words_that_yaml_1_1_takes_for_something_else_stay_text(write: Write) -> None:
    text = SMALLEST + "tracking: {wandb: off, tags: [on, no, y, 2026-01-15, 1:30, 12e3, 0x1F, 1_000, .inf]}"
    tracking = load(write(text)).tracking
    assert tracking.wandb == "off"
    assert tracking.tags == ("on", "no", "y", "2026-01-15", "1:30", "12e3", "0x1F", "1_000", ".inf")


def test_a_date_without_quotes_is_text(write: Write) -> None:
    expected = "expected: {hardware: 2 cores, measured: 2026-11-22, nats_per_token: {base_16bit: 1.5}, within: 0.02}"
    recipe = load(write(SMALLEST + expected))
    assert recipe.expected is not None
    assert recipe.expected.measured == "2026-11-22"


@pytest.mark.parametrize(
    ("written", "meant"), [("3.0e-4", 3.0e-4), ("0.5", 0.5), (".5", 0.5), ("1.5E-2", 0.015), ("0.0003", 3.0e-4)]
)
def test_a_number_that_every_yaml_reader_knows_is_a_number(write: Write, written: str, meant: float) -> None:
    assert load(write(SMALLEST), [f"training.learning_rate={written}"]).training.learning_rate == meant
    assert yaml.safe_load(written) == meant


# Writing a recipe and reading it back.


@pytest.mark.parametrize(
    "more",
    [
        "",
        "lora: {target_modules: [q_proj, v_proj], alpha: 1.0e-7, dropout: 0.1}",
        "tracking: {tags: ['off', '2026-01-15', '3', 'null', '1:30', '', '3e-4', '0123', '- x', 'a: b', '# c', '한국어']}",
        r'run: {name: tiny, folder: "two\nlines \t \"quoted\" \x07"}',
        "expected: {hardware: x, measured: 2026-01-15, nats_per_token: {a: 1.25, b: 2}, within: 0.1, metrics: {f1: 0.5}}",
    ],
)
def test_a_dumped_recipe_is_read_back_equal_by_this_and_by_every_yaml_reader(write: Write, more: str) -> None:
    text = SMALLEST.replace("run: {name: tiny}\n", "") if more.startswith("run:") else SMALLEST
    recipe = load(write(text + more))
    dumped = dump(recipe)
    assert load(write(dumped)) == recipe
    assert yaml.safe_load(dumped) == recipe.model_dump(mode="json")


def test_a_dumped_recipe_holds_every_setting_in_the_order_of_the_sections(write: Write) -> None:
    dumped = yaml.safe_load(dump(load(write(SMALLEST))))
    assert list(dumped) == list(Recipe.model_fields)
    assert list(dumped["training"])[:2] == ["learning_rate", "schedule"]
    assert dumped["training"]["learning_rate"] == 2.0e-4


# Overrides.


def test_an_override_replaces_one_setting_and_leaves_the_rest(write: Write) -> None:
    path = write(SMALLEST + "lora: {rank: 8, alpha: 4.0}")
    recipe = load(path, ["lora.rank=64", "tracking.tags=[a, b]", "run.threads="])
    assert recipe.lora.rank == 64
    assert recipe.lora.alpha == 4.0
    assert recipe.tracking.tags == ("a", "b")
    assert recipe.run.threads is None


def test_an_override_follows_the_rules_of_the_file(write: Write) -> None:
    path = write(SMALLEST)
    assert load(path, ["tracking.wandb=off"]).tracking.wandb == "off"
    assert only_problem(path, "training.learning_rate=3e-4") == (
        "--set training.learning_rate=3e-4: training.learning_rate: must be a number, got the text '3e-4'. "
        "YAML reads 3e-4 as text: write 3.0e-4"
    )


def test_an_override_mends_a_broken_setting_of_the_file(write: Write) -> None:
    assert load(write(SMALLEST + "lora: {rank: 008}"), ["lora.rank=8"]).lora.rank == 8


def test_an_override_reaches_into_a_section_that_the_file_leaves_empty(write: Write) -> None:
    assert load(write(SMALLEST + "lora:"), ["lora.rank=8"]).lora.rank == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnak=8", "lora.rnak: unknown key. Did you mean 'rank'?"),
        ("lroa.rank=8", "lroa: unknown key. Did you mean 'lora'?"),
        ("lora.rank", "must be section.key=value, such as --set training.max_steps=20"),
        (".rank=8", "must be section.key=value, such as --set training.max_steps=20"),
        ("training.max_steps.x=8", "training.max_steps.x: training.max_steps is a setting itself; '.x' cannot follow it"),
        ("export.formats=[a", "export.formats: is not YAML at column 3 ([a): a bracket is opened and never closed"),
        ("lora.rank=08", 'lora.rank: got 08, which YAML readers take for an octal or a decimal number. Write 8, or "08" if it is text'),
        ("data.text_template={prompt}", "data.text_template: must be text, got a mapping. Put text that begins with { or [ in quotes"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_told_with_what_was_typed(write: Write, override: str, message: str) -> None:
    assert only_problem(write(SMALLEST), override) == f"--set {override}: {message}"


def test_a_setting_given_twice_on_the_command_line_is_refused(write: Write) -> None:
    found = only_problem(write(SMALLEST), "lora.rank=8", "lora.rank=16")
    assert found == "--set lora.rank=16: lora.rank: is also given by --set lora.rank=8. Give one"


# Problems of values.


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("lora: {rnak: 3}", "lora.rnak: unknown key. Did you mean 'rank'?"),
        ("lora: {learning_rate: 0.1}", "lora.learning_rate: unknown key here; 'learning_rate' belongs to training:"),
        ("rank: 3", "rank: unknown key here; 'rank' belongs to lora:"),
        ("merge: {qqqq: 3}", "merge.qqqq: unknown key. merge has into, data_type"),
        ("lora: {rank: 100.0}", "lora.rank: must be a whole number, got 100.0. Write 100"),
        ("lora: {rank: 1e2}", "lora.rank: must be a whole number, got the text '1e2'. YAML reads 1e2 as text: write 100"),
        ("lora: {rank: '16'}", "lora.rank: must be a whole number, got the text '16'. Remove the quotation marks"),
        ("lora: {rank: many}", "lora.rank: must be a whole number, got the text 'many'"),
        ("lora: {rank: true}", "lora.rank: must be a whole number, got true"),
        ("lora: {rank: 0x10}", "lora.rank: must be a whole number, got the text '0x10'. YAML readers disagree about 0x10: write 16"),
        ("lora: {rank: 1_000}", "lora.rank: must be a whole number, got the text '1_000'. YAML readers disagree about 1_000: write 1000"),
        ("lora: {rank: 1:30}", "lora.rank: must be a whole number, got the text '1:30'. Some YAML readers take 1:30 for a number of base 60. Write the number itself"),
        ("lora: {rank: 99999999999999999999}", "lora.rank: must be a whole number, got the text '99999999999999999999'. It is too large"),
        ("lora: {alpha: .inf}", "lora.alpha: must be a number, got the text '.inf'. Only finite numbers are allowed"),
        ("lora: {alpha: 3e-4}", "lora.alpha: must be a number, got the text '3e-4'. YAML reads 3e-4 as text: write 3.0e-4"),
        ("lora: {alpha: 1.5e3}", "lora.alpha: must be a number, got the text '1.5e3'. YAML reads 1.5e3 as text: write 1.5e+3"),
        ("lora: {alpha: 0}", "lora.alpha: must be greater than 0, got 0"),
        ("lora: {dropout: -0.5}", "lora.dropout: must be at least 0, got -0.5"),
        ("lora: {dropout: 1.0}", "lora.dropout: must be less than 1, got 1.0"),
        ("lora: {use_dora: yes}", "lora.use_dora: must be true or false, got the text 'yes'. Write true"),
        ("lora: {use_dora: 'false'}", "lora.use_dora: must be true or false, got the text 'false'. Write false"),
        ("lora: {use_dora: 1}", "lora.use_dora: must be true or false, got 1"),
        ("lora: {init: loftQ}", "lora.init: must be one of default, loftq, pissa, got the text 'loftQ'. Did you mean 'loftq'?"),
        ("lora: {target_modules: all_linear}", "lora.target_modules: must be all-linear or a list of names, got the text 'all_linear'. Did you mean 'all-linear'?"),
        ("lora: {target_modules: 5}", "lora.target_modules: must be all-linear or a list of names, got 5"),
        ("lora: {target_modules: [q_proj, 5]}", 'lora.target_modules[1]: must be text, got 5. Put it in quotes: "5"'),
        ("lora: {target_modules: []}", "lora.target_modules: must not be an empty list"),
        ("lora:", "lora: is empty. Write its settings below it, or remove the line lora:"),
        ("merge: 5", "merge: must hold settings (key: value), got 5. It has into, data_type"),
        ("tracking: {wandb: false}", "tracking.wandb: must be one of off, offline, online, got false. Did you mean 'off'?"),
        ("tracking: {project: true}", 'tracking.project: must be text, got true. Put it in quotes: "true"'),
        ("evaluation: {metrics: bleu}", "evaluation.metrics: must be a list, got the text 'bleu'. Write [bleu]"),
        ("evaluation: {metrics: [blue]}", "evaluation.metrics[0]: must be one of exact_match, slot_f1, token_f1, rouge_l, bleu, got the text 'blue'. Did you mean 'bleu'?"),
        ("evaluation: {bootstrap_resamples: 10}", "evaluation.bootstrap_resamples: must be at least 100, got 10"),
        ("lora: {use_dora: true, init: pissa}", "lora: use_dora needs init: default, got init: pissa"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_line_and_its_mend(write: Write, section: str, message: str) -> None:
    assert only_problem(write(SMALLEST + section)) == f"5: {message}"


def test_a_wrong_name_is_told_in_words(write: Write) -> None:
    found = only_problem(write(SMALLEST), "run.name=two words")
    assert found.endswith("begins with a letter or a digit; got the text 'two words'")


def test_what_is_missing_is_told_with_its_meaning(write: Write) -> None:
    assert problems(write("run: {seed: 3}\ndata: {train: rows.jsonl, validation_rows: 10, test_rows: 10}\n")) == [
        "1: run.name: is missing. Name of the run; its folder is <folder>/<name>.",
        "1: base_model: this section is missing. The 16-bit model to start from: a local folder or a name on the "
        "Hugging Face hub.",
        "1: training: this section is missing. The loop: batches, rates, when to look and when to save.",
    ]


def test_all_problems_are_told_at_once_in_the_order_of_the_lines(write: Write) -> None:
    text = SMALLEST + "lora:\n  rank: 007\n  rnak: 3\n  rank: 9\nmerge: {into: base}\n"
    found = problems(write(text), "training.beta1=2.0")
    assert [line.partition(": ")[0] for line in found] == ["6", "7", "8", "9", "--set training.beta1=2.0"]


# Problems of the text.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("lora:\n  rank: 8\n  alpha: 1.0\n  rank: 16\n", "8: lora.rank: is given twice, first on line 6. Remove one"),
        ("run: {name: again}\n", "5: run: is given twice, first on line 1. Remove one"),
        ("lora: {rank: 010}\n", '5: lora.rank: got 010, which YAML readers take for an octal or a decimal number. Write 10, or "010" if it is text'),
        ("lora:\n\trank: 8\n", "6: is not YAML at column 1 (rank: 8): a tab stands where YAML allows only spaces. Indent with spaces"),
        ("lora: {rank: 8\n", "6: is not YAML at column 1 (the end of the file): a bracket is opened and never closed"),
        ("lora: rank: 8\n", "5: is not YAML at column 11 (lora: rank: 8): a ':' where no key can stand. Check the indentation, and put text that holds ': ' in quotes"),
        ("run: @name\n", "5: is not YAML at column 6 (run: @name): this character cannot begin a value. Put the text in quotes"),
        ("lora: &base {rank: 8}\n", "5: &base names a place for reuse, which recipes do without. Remove it"),
        ("lora: !!python/object:os.system {rank: 8}\n", "5: the tag tag:yaml.org,2002:python/object:os.system is refused: recipes hold plain values. Remove it"),
        ("---\nrun: {name: second}\n", "5: a second document begins here (---). A file holds one recipe; split it"),
        ("lora: {<<: {rank: 8}}\n", "5: lora: the merge key << is refused. Write the settings out"),
        ("? [a, b]\n: 8\n", "5: a list stands where a key belongs. Write key: value"),
        ("lora: {rank: 8\x00}\n", "5: holds the control character '\\x00', which YAML forbids. Remove it"),
    ],
)  # fmt: skip
def test_what_yaml_would_swallow_or_misread_is_refused_with_its_line(write: Write, more: str, message: str) -> None:
    assert only_problem(write(SMALLEST + more)) == message


def test_an_alias_is_refused_where_it_stands(write: Write) -> None:
    assert problems(write(SMALLEST + "lora: &l {rank: 8}\nmerge: *l\n"))[1].startswith("6: *l refers to another place")


def test_a_recipe_that_refers_to_itself_is_refused(write: Write) -> None:
    assert len(problems(write("run: &r {name: *r}\n"))) == 2


@pytest.mark.parametrize("text", ["", "# only a comment\n", "\n\n", "null\n"])
def test_an_empty_file_is_refused(write: Write, text: str) -> None:
    assert only_problem(write(text)) == " is empty. `qlora-trainer recipes` lists recipes to copy from"


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "a list"), ("quickstart\n", "the text 'quickstart'")])
def test_a_file_that_is_no_mapping_is_refused(write: Write, text: str, kind: str) -> None:
    assert only_problem(write(text)) == f"1: must hold sections (run:, data:, ...), got {kind}"


def test_nesting_without_end_is_refused(write: Write) -> None:
    assert only_problem(write("run: " + "[" * 5000 + "]" * 5000)).startswith("1: is nested hundreds deep")


# Problems of the file.


def test_a_missing_file_brings_up_the_nearest_name(write: Write) -> None:
    path = write(SMALLEST)
    for asked in ("mien.yaml", "mine", "mine.yml"):
        with pytest.raises(RecipeError, match=rf"there is no recipe file .*{asked}. Did you mean {path}\?"):
            load(path.with_name(asked))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"There is no folder {tmp_path / 'nowhere'}"):
        load(tmp_path / "nowhere" / "mine.yaml")


def test_a_folder_is_no_recipe_and_its_recipes_are_named(write: Write) -> None:
    path = write(SMALLEST)
    with pytest.raises(RecipeError, match=f"is a folder, not a recipe file. It holds {path}"):
        load(path.parent)


def test_a_data_file_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"rows\.jsonl is a data file by its name.* qlora-trainer new mine\.yaml --data"
    ):
        load(tmp_path / "rows.jsonl")


def test_a_file_that_is_not_utf_8_is_refused_with_the_line_of_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(SMALLEST.encode() + "# caf\xe9\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=rf"latin.yaml:5: not UTF-8 \(byte 0xe9 at offset {len(SMALLEST) + 5}\)"):
        load(path)


def test_a_file_far_too_large_for_a_recipe_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_bytes(b"a" * (1 << 21))
    with pytest.raises(RecipeError, match="has 2,097,152 bytes; that is no recipe"):
        load(path)


# The documentation of fields.


def test_every_setting_is_described_with_what_can_be_written() -> None:
    sections = {section.name: section for section in describe()}
    assert list(sections) == list(Recipe.model_fields)
    assert sections["data"].is_required
    assert not sections["lora"].is_required
    lora = {field.name: field for field in sections["lora"].fields}
    assert (lora["rank"].kind, lora["rank"].default) == ("whole number > 0", "16")
    assert lora["dropout"].kind == "number >= 0, < 1"
    assert lora["target_modules"].kind == "all-linear or list of text"
    assert lora["init"].kind == "default | loftq | pissa"
    assert all(field.meaning for section in sections.values() for field in section.fields)


def test_an_override_takes_a_setting_away_with_null(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "run: {name: tiny}\nbase_model: {name: owner/model}\ndata: {train: a.jsonl, validation_rows: 1, test_rows: 1}\n"
        "training: {max_steps: 5}\n",
        encoding="utf-8",
    )
    recipe = load(path, ["base_model.name=null", "base_model.path=here"])
    assert (recipe.base_model.name, recipe.base_model.path) == (None, "here")


def test_the_settings_of_a_source_are_described_behind_the_first_that_takes_one() -> None:
    data = {field.name: field for section in describe() if section.name == "data" for field in section.fields}
    assert data["train"].kind.startswith("text or {path, hub, files, weight, format, rename} or list of text or {")
    assert (data["train.weight"].kind, data["train.weight"].default) == ("number > 0", "absent")
    assert "validation.weight" not in data


# Sources of rows.


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("7", ['data.train: must be text, got 7. Put it in quotes: "7"']),
        ("[]", ["data.train: must not be an empty list"]),
        ("{path: a.jsonl, wieght: 2.0}", ["data.train.wieght: unknown key. Did you mean 'weight'?"]),
        ("{path: 3}", ['data.train.path: must be text, got 3. Put it in quotes: "3"']),
        ("{hub: owner/name}", ["data.train: 'hub' needs 'files', such as files: data/train-*.parquet"]),
        ("{path: a.jsonl, hub: owner/name}", ["data.train: give exactly one of 'path'"]),
        (
            "[a.jsonl, {path: b.jsonl, format: mesages}, 7]",
            [
                "data.train[1].format: must be one of prompt_completion, messages, sharegpt, instruction, text, got the text "
                "'mesages'. Did you mean 'messages'?",
                'data.train[2]: must be text, got 7. Put it in quotes: "7"',
            ],
        ),
        ("[{path: a.jsonl, weight: 1.0}, b.jsonl]", ["data: train: give a weight to every source or to none"]),
    ],
)
def test_a_source_that_cannot_be_is_told_once_with_its_mend(write: Write, train: str, expected: list[str]) -> None:
    found = problems(write(SMALLEST.replace("train: rows.jsonl", f"train: {train}")))
    assert len(found) == len(expected)
    for problem, text in zip(found, expected, strict=True):
        assert text in problem
