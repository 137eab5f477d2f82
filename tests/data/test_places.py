from pathlib import Path

import pytest

from qlora_trainer.data.places import find_files
from qlora_trainer.errors import DataError


def written(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def refusal(path: Path, pattern: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        find_files(path, pattern=pattern)
    return str(caught.value)


def test_a_file_is_itself(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl")
    place = find_files(path)
    assert (place.name, place.files, place.skipped) == (str(path), (path,), ())


def test_the_data_files_of_a_folder_are_read_by_their_path_and_the_others_are_named(tmp_path: Path) -> None:
    for name in ("b.csv", "a/2.parquet", "a/1.jsonl", "README.md", ".hidden.jsonl", ".git/c.jsonl"):
        written(tmp_path / name)
    place = find_files(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in place.files] == ["a/1.jsonl", "a/2.parquet", "b.csv"]
    assert place.skipped == ("README.md",)


def test_a_pattern_chooses_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet"):
        written(tmp_path / name)
    place = find_files(tmp_path, pattern="data/train-*.parquet", name="owner/name@main")
    assert ([path.name for path in place.files], place.name) == (
        ["train-0.parquet", "train-1.parquet"],
        "owner/name@main",
    )
    assert "files: data/dev-* names no file there. Its files: data/test-0.parquet, data/train-0" in refusal(
        tmp_path, "data/dev-*"
    )


def test_a_pattern_for_a_file_is_refused(tmp_path: Path) -> None:
    assert "is a file, and files: *.jsonl chooses files of a folder" in refusal(
        written(tmp_path / "a.jsonl"), "*.jsonl"
    )


def test_a_folder_without_data_files_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "notes.md")
    assert "holds no data file (.jsonl, .json, .csv, .parquet, .txt). Its files: notes.md." in refusal(tmp_path)


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl")
    written(tmp_path / "traim.md")
    assert f"Did you mean {tmp_path / 'train.jsonl'}?" in refusal(tmp_path / "trian.jsonl")
    assert "Data files beside it: train.jsonl." in refusal(tmp_path / "other.csv")
    assert "Data files beside it: none." in refusal(Path(tmp_path.parent.parent / "other.csv"))


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    assert f"There is no folder {tmp_path / 'data'} either" in refusal(tmp_path / "data" / "train.jsonl")
