import importlib.util
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "recipes/quickstart/data"
COPIED = {"to", "town", "place", "artist", "song", "text", "message", "title", "note", "with", "item", "value"}
"""Fields whose values a request says word for word and whose words are divided among the splits."""

Rows = list[dict[str, str]]


@pytest.fixture(scope="session")
def make_task() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("make_task", ROOT / "scripts/make_task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_task"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_task"]


@pytest.fixture(scope="session")
def task() -> dict[str, Rows]:
    """The committed rows by split."""
    return {
        split: [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "validation", "test")
    }


def leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every value inside a call that is not null, with the name of its field."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, key)
    elif value is not None:
        yield key, value


def copied_values(rows: Rows) -> set[tuple[str, str]]:
    calls = (json.loads(row["completion"]) for row in rows)
    return {(key, str(value)) for call in calls for key, value in leaves(call) if key in COPIED}


def calls_of(rows: Rows, intent: str) -> list[tuple[str, dict[str, object]]]:
    return [(row["prompt"], json.loads(row["completion"])) for row in rows if row["intent"] == intent]


def test_the_committed_rows_are_what_seed_0_makes(
    make_task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_task.py", "--out", str(tmp_path / "new"), "--seed", "0"])
    began = time.monotonic()
    make_task.main()
    assert time.monotonic() - began < 5
    for path in sorted(DATA.glob("*.jsonl")):
        made, committed = (sha256(f.read_bytes()).hexdigest() for f in (tmp_path / "new" / path.name, path))
        assert made == committed, f"{path.name} is stale: run python scripts/make_task.py --out recipes/quickstart/data"
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_another_seed_makes_other_rows_and_divides_the_words_otherwise(make_task: ModuleType) -> None:
    tables = make_task.read_tables()
    names = [set(make_task.lexicons(tables, seed=seed)["test"].words["names"]) for seed in (0, 1)]
    assert names[0] != names[1]
    first, second = ([next(make_task.rows("train", tables, seed=seed)) for _ in range(1)] for seed in (0, 1))
    assert first != second


def test_there_are_enough_rows(task: dict[str, Rows]) -> None:
    assert {split: len(rows) for split, rows in task.items()} == {"train": 6000, "validation": 500, "test": 500}


def test_every_row_is_a_request_and_a_call_of_its_intent(task: dict[str, Rows]) -> None:
    for rows in task.values():
        for row in rows:
            assert list(row) == ["prompt", "completion", "intent", "template"]
            call = json.loads(row["completion"])
            assert call["intent"] == row["intent"] == row["template"].split("/")[0]
            assert json.dumps(call) == row["completion"]
            assert row["prompt"].isascii()
            assert not set("{}[]") & set(row["prompt"]), row["prompt"]


def test_the_ten_intents_are_asked_for_about_equally_often(task: dict[str, Rows]) -> None:
    for rows in task.values():
        counts = Counter(row["intent"] for row in rows)
        assert len(counts) == 10
        # A tenth each; of 500 rows the standard deviation is 6.7.
        assert all(0.04 < count / len(rows) < 0.16 for count in counts.values()), counts


def test_no_prompt_stands_twice(task: dict[str, Rows]) -> None:
    prompts = [row["prompt"] for rows in task.values() for row in rows]
    assert len(set(prompts)) == len(prompts)


def test_test_rows_ask_for_no_value_that_training_or_validation_ever_asked_for(task: dict[str, Rows]) -> None:
    in_test = copied_values(task["test"])
    assert {key for key, _ in in_test} == COPIED
    assert not in_test & copied_values(task["train"])
    assert not in_test & copied_values(task["validation"])


def test_the_splits_divide_every_pool_without_overlap(make_task: ModuleType) -> None:
    lexicons = make_task.lexicons(make_task.read_tables(), seed=0)
    pools = set(make_task.pools_of(make_task.read_tables().pools, seed=0))
    assert pools == {"names", "towns", "amounts", "adjectives", "things", "objects", "goods", "topics"}
    words = {split: {word for pool in pools for word in lexicon.words[pool]} for split, lexicon in lexicons.items()}
    assert not words["train"] & words["test"]
    assert not words["train"] & words["validation"]
    assert not words["validation"] & words["test"]
    sizes = {split: len(found) / sum(map(len, words.values())) for split, found in words.items()}
    assert sizes == pytest.approx(make_task.POOL_SHARES, abs=0.001)


def spoken_forms(template: str) -> set[str]:
    """A template with all its optional parts and with none, without marks: those do not make it new."""
    whole, bare = template, re.sub(r"\[.*?\]", "", template)
    return {re.sub(r"[^\w{} ]", "", text).lower() for text in (whole, bare)}


def test_each_split_has_templates_of_its_own(make_task: ModuleType) -> None:
    least = {"train": 12, "validation": 2, "test": 4}
    for intent, table in make_task.read_tables().intents.items():
        lines = {split: table[split].strip().split("\n") for split in least}
        assert all(len(lines[split]) >= count for split, count in least.items()), intent
        forms = {split: {form for line in lines[split] for form in spoken_forms(line)} for split in least}
        assert not forms["test"] & (forms["train"] | forms["validation"])
        assert not forms["validation"] & forms["train"]


def test_every_slot_of_a_template_is_a_field_of_its_call(make_task: ModuleType) -> None:
    for intent, table in make_task.read_tables().intents.items():
        for split in ("train", "validation", "test"):
            assert set(re.findall(r"\{(\w+)\}", table[split])) == set(table["fields"].split()), (intent, split)


def test_half_of_the_test_rows_use_a_template_of_their_own(task: dict[str, Rows]) -> None:
    # 500 draws at 0.5: standard deviation 0.022.
    sources = {split: Counter(row["template"].split("/")[1] for row in rows) for split, rows in task.items()}
    assert sources["train"] == {"train": 6000}
    assert set(sources["test"]) == {"train", "test"}
    assert sources["test"]["test"] / 500 == pytest.approx(0.5, abs=0.09)
    assert set(sources["validation"]) == {"train", "validation"}
    assert sources["validation"]["validation"] / 500 == pytest.approx(0.5, abs=0.09)


def test_validation_has_old_and_new_values(task: dict[str, Rows]) -> None:
    values, known = copied_values(task["validation"]), copied_values(task["train"])
    assert 0.3 < len(values - known) / len(values) < 0.9


def test_copied_values_stand_in_the_request(task: dict[str, Rows]) -> None:
    for row in (row for rows in task.values() for row in rows):
        for key, value in leaves(json.loads(row["completion"])):
            if key in COPIED:
                assert str(value) in row["prompt"], (row, value)


def test_dates_and_times_have_one_form_each(task: dict[str, Rows]) -> None:
    date = re.compile(r"today|tomorrow|in \d days|\w+day|\d\d-\d\d")
    for row in (row for rows in task.values() for row in rows):
        call = json.loads(row["completion"])
        for key in ("date", "keep"):
            assert call.get(key) is None or date.fullmatch(call[key]), row
        assert call.get("time") is None or re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", call["time"]), row


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (r"[Aa]t half past seven\b", {"time": "07:30"}),
        (r"[Aa]t quarter past twelve\b", {"time": "12:15"}),
        (r"[Aa]t six\b", {"time": "06:00"}),
        (r"[Aa]t 8 pm\b", {"time": "20:00"}),
        (r"[Aa]t 9:15 am\b", {"time": "09:15"}),
        (r"[Aa]t 12:15(?! [ap]m)", {"time": "12:15"}),
        (r"weather .*\btonight\b", {"date": "today"}),
        (r"\bon my grocery list", {"list": "shopping"}),
        (r"not on the terrace", {"outside": False}),
        (r"(?<!not )on the terrace", {"outside": True}),
        (r"without shuffle", {"shuffle": False}),
        (r"at weekends", {"repeat": "weekends"}),
        (r"table for twelve\b", {"count": 12}),
    ],
)
def test_what_is_said_is_what_the_call_holds(task: dict[str, Rows], said: str, meant: dict[str, object]) -> None:
    found = [row for rows in task.values() for row in rows if re.search(said, row["prompt"])]
    assert found, said
    for row in found:
        call = json.loads(row["completion"])
        assert {key: call.get(key) for key in meant} == meant, row


def test_a_day_and_a_month_become_month_and_day(task: dict[str, Rows]) -> None:
    spoken = re.compile(r"[Oo]n (?:(\d+) ([A-Z][a-z]+)|([A-Z][a-z]+) (\d+))\b")
    checked = 0
    for row in (row for rows in task.values() for row in rows):
        call = json.loads(row["completion"])
        said = [f"{match[1] or match[4]} {match[2] or match[3]} 2000" for match in spoken.finditer(row["prompt"])]
        wanted = {datetime.strptime(text, "%d %B %Y").strftime("%m-%d") for text in said}
        held = {call[key] for key in ("date", "keep") if re.fullmatch(r"\d\d-\d\d", call.get(key) or "")}
        assert held == wanted, row
        checked += len(wanted)
    assert checked > 1000


def test_an_alarm_leaves_out_just_the_days_that_are_excepted(task: dict[str, Rows]) -> None:
    weekday = re.compile(r"\b([A-Z][a-z]+day)\b")
    for prompt, call in calls_of(task["test"] + task["train"], "set_alarm"):
        named = [name.lower() for name in weekday.findall(prompt)]
        assert named == (call["except"] or []), prompt


def test_a_booking_that_is_kept_is_not_the_one_that_is_cancelled(task: dict[str, Rows]) -> None:
    kept = [call for _, call in calls_of(task["train"], "cancel_booking") if call["keep"] is not None]
    assert len(kept) > 50
    assert all(call["keep"] != call["date"] for call in kept)


def test_what_is_not_mentioned_is_null(task: dict[str, Rows], make_task: ModuleType) -> None:
    closed = make_task.read_tables().closed
    for intent, field in (("play_music", "shuffle"), ("book_table", "outside"), ("set_alarm", "repeat")):
        calls = calls_of(task["train"], intent)
        for prompt, call in calls:
            mentioned = any(phrase in prompt.lower() for phrase in closed[field])
            assert mentioned == (call[field] is not None), (prompt, call)
        absent = sum(call[field] is None for _, call in calls) / len(calls)
        assert 0.1 < absent < 0.9


def test_rows_are_short(task: dict[str, Rows]) -> None:
    # With the quickstart's tokenizer and chat template: 73 tokens on average, 112 at most.
    lengths = [len(row["prompt"]) + len(row["completion"]) for rows in task.values() for row in rows]
    assert 120 < sum(lengths) / len(lengths) < 170
    assert max(lengths) <= 240
