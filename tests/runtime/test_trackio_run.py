"""trackio's own database, written in a process of its own and read back by trackio."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason="needs the extra trackio, which is not installed"
)

TELLING = """
import sys
from pathlib import Path
from qlora_trainer.runtime.tracked_run import Artifact, Table, TrackingPlan
from qlora_trainer.runtime.tracking import Tracker
folder = Path(sys.argv[1]) / "run"
(folder / "adapter").mkdir(parents=True)
(folder / "adapter" / "weights").write_text("12")
plan = TrackingPlan(trackio=True, project="project", group="group", tags=("one",), config={"rank": 8})
for begin in (0, 3):
    tracker = Tracker(folder, plan)
    tracker.resume_from(begin)
    for step in range(begin + 1, 6):
        tracker.log({"x": begin + step / 8, "y": None}, step)
    tracker.finish()
tracker = Tracker(folder, plan)
tracker.table("gap", Table(("stage", "nats"), [("a", 1.5), ("b", None)]))
tracker.summary({"test/nats": 1.5})
tracker.artifact(Artifact("adapter", "model", {"sha256": "12"}, folder / "adapter"))
tracker.finish()
"""
READING = """
import json
import trackio
(run,) = trackio.Api().runs("project")
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("project", run.name, run_id=run.id)
print(json.dumps({"name": run.name, "config": run.config, "x": [[row["step"], row["x"]] for row in rows if "x" in row],
                  "others": sorted({key for row in rows for key in row} - {"step", "timestamp"})}))
"""


def test_a_resumed_run_is_one_run_with_each_step_once_and_nothing_is_printed(tmp_path: Path) -> None:
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TELLING, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.stdout, done.stderr) == ("", "")
    reading = [sys.executable, "-c", READING]
    done = subprocess.run(reading, check=True, capture_output=True, text=True, timeout=60, env=environment)
    found = json.loads(done.stdout)
    assert found["name"] == f"run-{(tmp_path / 'run' / 'wandb_run_id.txt').read_text().strip()}"
    assert found["x"] == [[1, 0.125], [2, 0.25], [3, 0.375], [4, 3.5], [5, 3.625]]
    assert found["others"] == ["artifacts/adapter", "gap", "test/nats", "x"]
    assert found["config"]["rank"] == 8
    assert found["config"]["tags"] == ["one"]
