from pathlib import Path

import pytest

from qlora_trainer.errors import DataError
from qlora_trainer.stages.tasks.folders import PROBES, PROBES_FOLDER, folder_fingerprint, with_found_data
from scripts.make_probes import ITEMS, items_of
from scripts.make_probes import PROBES as MAKERS


@pytest.mark.parametrize("name", MAKERS)
def test_the_committed_items_are_those_that_the_script_makes(name: str) -> None:
    committed = (PROBES_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    assert committed == items_of(name)
    assert len(set(committed.splitlines())) == ITEMS


def test_every_probe_has_its_task_file_and_a_word_on_what_it_shows() -> None:
    told = (PROBES_FOLDER / "README.md").read_text(encoding="utf-8")
    for probe in PROBES:
        assert (PROBES_FOLDER / f"{probe.removeprefix('probe_')}.yaml").is_file()
        assert f"`{probe}`" in told
    assert {f"probe_{name}" for name in MAKERS} == set(PROBES)


def test_data_beside_a_task_file_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("{}\n")
    text = "data_files:\n  test: items.jsonl\n  train: absent.jsonl\nother: items\n"
    (tmp_path / "task.yaml").write_text(text)
    with with_found_data(tmp_path) as place:
        found = (place / "task.yaml").read_text()
        assert f"  test: {place / 'items.jsonl'}\n" in found
        assert "  train: absent.jsonl\nother: items\n" in found
    assert not place.exists()
    assert (tmp_path / "task.yaml").read_text() == text


def test_another_item_is_another_task(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("{}\n")
    before = folder_fingerprint(tmp_path)
    (tmp_path / "items.jsonl").write_text("{} \n")
    assert folder_fingerprint(tmp_path) != before
    with pytest.raises(DataError, match="no folder"), with_found_data(tmp_path / "absent"):
        pass
