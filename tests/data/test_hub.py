from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from qlora_trainer.data import hub
from qlora_trainer.errors import DataError


def cached(root: Path, *, revision: str) -> Path:
    """A data set in the hub's cache on this machine, as a download leaves it."""
    repository = root / "datasets--owner--name"
    folder = repository / "snapshots" / ("a" * 40)
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text("a" * 40)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["owner/name", "owner/name@main", f"owner/name@{'a' * 40}"])
@pytest.mark.parametrize("download", [True, False])
def test_a_data_set_in_the_cache_is_found_without_the_network(cache: Path, name: str, *, download: bool) -> None:
    folder = cached(cache, revision="main")
    found = hub.fetch(name, "data/*.jsonl", download=download)
    assert found is not None
    assert found.samefile(folder)


def test_what_is_not_there_and_may_not_be_downloaded_is_none(cache: Path) -> None:
    cached(cache, revision="main")
    assert hub.fetch("owner/other", "*.jsonl", download=False) is None
    assert hub.fetch("owner/name@other", "*.jsonl", download=False) is None


def test_a_hub_that_cannot_be_reached_is_told(cache: Path) -> None:
    with pytest.raises(
        DataError, match=r"owner/other@main: is not in the local hub cache, and the hub cannot be reach"
    ):
        hub.fetch("owner/other@main", "*.jsonl", download=True)


def test_a_name_that_is_none_is_told(cache: Path) -> None:
    with pytest.raises(DataError, match="the hub has no such data set or revision for this login"):
        hub.fetch("a name/with blanks/and more", "*.jsonl", download=True)


def test_only_the_named_files_of_the_named_revision_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(name: str, **settings: object) -> str:
        asked.update(name=name, **settings)
        raise LocalEntryNotFoundError("absent")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.fetch("owner/name@refs/convert/parquet", "default/train/*.parquet", download=False) is None
    assert asked == {
        "name": "owner/name",
        "repo_type": "dataset",
        "revision": "refs/convert/parquet",
        "allow_patterns": ["default/train/*.parquet"],
        "local_files_only": True,
    }
