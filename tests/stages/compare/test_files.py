import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_trainer.errors import RunFolderError
from qlora_trainer.stages.compare.files import read, write, write_pages
from tests.stages.compare.compared import COMPARISON

RESULTS = Path(__file__).resolve().parents[3] / "scripts" / "results"


def test_all_files_are_written_and_the_json_is_strict(tmp_path: Path) -> None:
    write(COMPARISON, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((tmp_path / "compare.json").read_text(), parse_constant=refuse)
    assert found["rows"][1]["nats_per_token"] == {"value": 1.2346, "interval": [1.1, 1.3]}
    assert found["rows"][-1]["failed"] == "a | b <script> *bold*"
    assert found["outliers"][0]["spread"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare.md", "compare.html"}


def test_what_was_kept_is_read_back_and_gives_the_same_pages(tmp_path: Path) -> None:
    write(COMPARISON, tmp_path)
    again = read(tmp_path / "compare.json")
    assert again == COMPARISON
    (tmp_path / "again").mkdir()
    write_pages(again, tmp_path / "again")
    for name in ("compare.md", "compare.html"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_half_of_a_surrogate_pair_is_spelt_out(tmp_path: Path) -> None:
    write(replace(COMPARISON, recipe="odd \ud800"), tmp_path)
    for name in ("compare.json", "compare.md", "compare.html"):
        assert "ud800" in (tmp_path / name).read_text("utf-8")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("compare_*.json")), ids=lambda path: path.stem)
def test_every_committed_comparison_is_shown_again_without_measuring(path: Path, tmp_path: Path) -> None:
    found = read(path)
    write_pages(found, tmp_path)
    assert len(found.rows) > 5
    html = (tmp_path / "compare.html").read_text("utf-8")
    assert all(f">{row.method}" in html for row in found.rows)


def test_a_file_of_before_settings_were_kept_has_none(tmp_path: Path) -> None:
    write(COMPARISON, tmp_path)
    kept = json.loads((tmp_path / "compare.json").read_text())
    for name in ("settings", "recipe_text", "environment", "command"):
        del kept[name]
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**kept, "commit": "1234", "measured": "2026-11-25"}))
    found = read(path)
    assert (found.settings, found.recipe_text, found.environment, found.command) == ({}, "", {}, "")
    assert math.isinf(found.outliers[0].spread)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Expecting property name"),
        ("[]", "no comparison of methods"),
        ("{}", "'outliers'"),
        ('{"outliers": [], "model": 3}', "  model: Input should be a valid string"),
    ],
)
def test_a_file_that_is_no_comparison_is_refused_with_what_is_wrong(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(RunFolderError, match=r"odd\.json") as refused:
        read(path)
    assert told in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"none\.json: cannot be read: No such file"):
        read(tmp_path / "none.json")
