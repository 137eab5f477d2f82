"""Encoded rows that are kept: when they are reused, when they are made anew, and what is never kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_trainer.errors import DataError, RunFolderError
from qlora_trainer.recipe import Recipe
from qlora_trainer.stages.dataset import TaskRows, cache, load_rows, token_fingerprint
from tests.models import tiny_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    return tiny_tokenizer(tmp_path / "base")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 50 training rows, the current one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_rows(folder / "train.jsonl", 50)
    return folder


def write_rows(path: Path, count: int, *, word: str = "Call") -> None:
    rows = [{"prompt": f"{word} {number}", "completion": f"Calling {number}"} for number in range(count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def recipe(*, seed: int = 0, learning_rate: float = 1e-3, **data: object) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"name": "test", "seed": seed},
            "base_model": {"path": "base"},
            "data": {"train": "train.jsonl", "validation_rows": 5, "test_rows": 10, **data},
            "training": {"max_steps": 1, "learning_rate": learning_rate},
        }
    )


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one whenever files are encoded."""
    made: list[str] = []
    encode = cache.encode_files

    def counted(folder: Path, *rest: object) -> object:
        made.append(folder.name)
        return encode(folder, *rest)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(cache, "encode_files", counted)
    return made


def plain(rows: TaskRows) -> tuple[object, ...]:
    sides = tuple(tuple(side) for side in (rows.train, rows.validation, rows.test))
    return (*sides, rows.audit, rows.notes, rows.stop_ids, rows.pad_id, token_fingerprint(rows))


def test_the_second_time_rows_are_read_and_are_the_same(base: Path, encodings: list[str]) -> None:
    first = plain(load_rows(recipe(), base))
    assert plain(load_rows(recipe(learning_rate=2e-3), base)) == first
    assert len(encodings) == 1


@pytest.mark.parametrize(
    "settings", [{"seed": 1}, {"window": 99}, {"train_rows": 9}, {"render": "text"}, {"overlong": "refuse"}]
)
def test_another_setting_of_the_rows_makes_others(
    base: Path, encodings: list[str], settings: dict[str, object]
) -> None:
    load_rows(recipe(), base)
    load_rows(recipe(**settings), base)  # type: ignore[arg-type]  # seed is among them
    assert len(encodings) == 2


def test_another_content_of_the_same_file_makes_others(base: Path, here: Path, encodings: list[str]) -> None:
    first = token_fingerprint(load_rows(recipe(), base))
    stamp = (here / "train.jsonl").stat().st_mtime_ns
    write_rows(here / "train.jsonl", 50, word="Ring")
    os.utime(here / "train.jsonl", ns=(stamp, stamp))
    assert token_fingerprint(load_rows(recipe(), base)) != first
    assert len(encodings) == 2


def test_another_template_or_stop_token_of_the_base_makes_others(base: Path, encodings: list[str]) -> None:
    load_rows(recipe(), base)
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<|'", "'\\n<|'"))
    load_rows(recipe(), base)
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert load_rows(recipe(), base).stop_ids == (1, 3)
    assert len(encodings) == 3


def kept(here: Path) -> Path:
    (folder,) = (path for path in (here / "runs/encoded_rows").iterdir() if path.is_dir())
    return folder


@pytest.mark.parametrize("name", ["train.tokens", "test.rows", "validation.texts", "manifest.json"])
@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_a_damaged_cache_is_told_and_made_anew(
    base: Path, here: Path, encodings: list[str], caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    first = plain(load_rows(recipe(), base))
    path = kept(here) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "byte":
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[:-4])
        case _:
            path.unlink()
    again = plain(load_rows(recipe(), base))
    assert again == first
    # A changed byte of the manifest may be one of a note, which nothing rests on; here it is told all the same.
    assert len(encodings) == 2 or (name, damage) == ("manifest.json", "byte")
    assert "made anew" in caplog.text or len(encodings) == 1
    assert plain(load_rows(recipe(), base)) == first


def test_rows_that_are_refused_are_not_kept(base: Path, here: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match=r"50 of 50 rows are longer than data\.window"):
            load_rows(recipe(window=4), base)
    assert [path for path in (here / "runs/encoded_rows").iterdir() if path.is_dir()] == []


def test_a_cache_folder_that_cannot_be_written_is_told(base: Path, here: Path) -> None:
    (here / "taken").write_text("")
    with pytest.raises(RunFolderError, match="taken"):
        load_rows(recipe(cache_folder="taken"), base)


PEAK = """\
import resource, sys
from pathlib import Path
from qlora_trainer.recipe import Recipe
from qlora_trainer.stages import dataset
rows = dataset.load_rows(Recipe.model_validate_json(sys.argv[1], strict=False), Path(sys.argv[2]))
assert sum(len(row.token_ids) for row in rows.train) > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_of_encoding_does_not_grow_with_the_rows(base: Path, here: Path) -> None:
    def peak_bytes(count: int) -> int:
        write_rows(here / "train.jsonl", count, word="Call somebody in the evening, but do not call on a Monday, " * 4)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, recipe().model_dump_json(), str(base)],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    # Rows of about 150 tokens. Measured with 6,000 and 60,000 rows of 80 tokens: 77 and 81 MiB; held as Python tuples
    # 60,000 rows took 749 MiB, so 20,000 rows more would take at least 200 MiB more.
    assert peak_bytes(24_000) - peak_bytes(4_000) < 16 * 2**20


def test_processes_that_ask_at_the_same_time_encode_once(base: Path, here: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom qlora_trainer.recipe import Recipe\n"
        "from qlora_trainer.stages import dataset\nfrom qlora_trainer.stages.dataset import cache\n"
        "encode = cache.encode_files\n"
        "cache.encode_files = lambda *given: (print('encoded'), encode(*given))[1]\n"
        f"rows = dataset.load_rows(Recipe.model_validate_json({recipe().model_dump_json()!r}, strict=False), "
        f"Path({str(base)!r}))\nprint(dataset.token_fingerprint(rows))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0].split() for process in running]
    assert sum(output.count("encoded") for output in outputs) == 1
    assert {output[-1] for output in outputs} == {token_fingerprint(load_rows(recipe(), base))}
