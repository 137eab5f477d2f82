"""TensorBoard's event files, read back by TensorBoard itself."""

from pathlib import Path

import pytest

from qlora_trainer.runtime.tracked_run import Artifact, Table, TrackingPlan
from qlora_trainer.runtime.tracking import Tracker

reading = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra tensorboard"
)
PLAN = TrackingPlan(tensorboard=True, config={"lora": {"rank": 8}, "note": "<b>"})


def told(folder: Path):
    found = reading.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def text(found, name: str) -> str:
    return found.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_numbers_are_points_of_curves_and_none_is_no_point(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, PLAN)
    tracker.log({"train/nats_per_token": 0.5, "train/gradient_norm": None}, 10)
    tracker.log({"train/nats_per_token": 0.25, "train/incident": "loss of row <script>"}, 20)
    tracker.finish()
    found = told(tmp_path)
    assert found.Tags()["scalars"] == ["train/nats_per_token"]
    assert [(point.step, point.value) for point in found.Scalars("train/nats_per_token")] == [(10, 0.5), (20, 0.25)]
    assert text(found, "train/incident") == "loss of row &#60;script&#62;"
    assert '    "note": "<b>"' in text(found, "recipe").replace("      ", "    ")


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    for begin in (0, 3):
        tracker = Tracker(tmp_path, PLAN)
        tracker.resume_from(begin)
        for step in range(begin + 1, 6):
            tracker.log({"x": begin + step / 8}, step)
        tracker.finish()
    points = [(point.step, point.value) for point in told(tmp_path).Scalars("x")]
    assert points == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 3.5), (5, 3.625)]


def test_a_report_made_later_is_added_to_the_history(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, PLAN)
    tracker.log({"x": 0.5}, 1)
    tracker.finish()
    tracker = Tracker(tmp_path, PLAN)
    tracker.table("gap", Table(("stage", "nats"), [("a|b\n*", 1.5), ("c", None)]))
    tracker.summary({"test/nats": 1.5, "run/status": "complete"})
    tracker.page("report", tmp_path / "report.html")
    tracker.artifact(Artifact("adapter", "model", {"sha256": "12"}))
    tracker.finish()
    found = told(tmp_path)
    assert [point.value for point in found.Scalars("x")] == [0.5]
    assert [point.value for point in found.Scalars("test/nats")] == [1.5]
    assert text(found, "gap") == "| stage | nats |\n| --- | --- |\n| a&#124;b<br>&#42; | 1.5 |\n| c |  |"
    assert '| sha256 | "12" |' in text(found, "artifacts/adapter")
    assert text(found, "report").endswith("report.html")
