from dataclasses import replace
from pathlib import Path

import pytest

from qlora_trainer.errors import RunFolderError
from qlora_trainer.records import RunReport
from qlora_trainer.stages.report import Measurements, Notes, write


def test_three_files_are_written_and_nothing_else(
    tmp_path: Path, report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    write(tmp_path, report, measurements=measurements, notes=notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    for path in tmp_path.iterdir():
        assert "compressed_tensors_w8a16" in path.read_text("utf-8")
    page = (tmp_path / "report.html").read_text("utf-8")
    # Two plots and the map of what survived.
    assert [css in page for css in ('class="whisker', 'class="curve', 'class="heat h0" role')] == [True] * 3


def test_writing_again_gives_the_same_bytes(
    tmp_path: Path, report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    write(tmp_path, report, measurements=measurements, notes=notes)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write(tmp_path, report, measurements=measurements, notes=notes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_half_a_surrogate_pair_in_a_row_does_not_lose_the_report(
    tmp_path: Path, report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    write(tmp_path, report, measurements=measurements, notes=replace(notes, audit=("odd \ud83d text",)))
    assert "odd \\ud83d text" in (tmp_path / "report.html").read_text("utf-8")


def test_a_folder_that_is_a_file_is_one_clear_error(
    tmp_path: Path, report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(RunFolderError, match=r"report\.json"):
        write(tmp_path / "run", report, measurements=measurements, notes=notes)
