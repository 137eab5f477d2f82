"""The real wandb, online against a stand-in for its server, in processes of their own: resumed, killed, unreachable."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.runtime.wandb_server import API_KEY, Server, serving

pytestmark = pytest.mark.slow

TRAINING = """
import logging, os, signal, sys, time
from pathlib import Path
import psutil
from qlora_trainer.runtime import tracking
from qlora_trainer.runtime.tracked_run import Artifact, TrackingPlan

def is_service(child):
    try:
        return child.name() == "wandb-core"
    except psutil.Error:
        return False

def services():
    return [child for child in psutil.Process().children() if is_service(child)]

def wait_for_service():
    for _ in range(400):
        if services() and told._messengers[0]._waiting.empty():
            return services()[0]
        time.sleep(0.05)
    sys.exit("wandb did not start")

logging.basicConfig(level=logging.WARNING, format="%(message)s")
mode, folder, begin, end = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
folder.mkdir(parents=True, exist_ok=True)
told = tracking.Tracker(folder, TrackingPlan(wandb=mode, project="project", run_id=os.environ.get("WANDB_RUN_ID")))
told.resume_from(begin)
slowest = 0.0
for step in range(begin + 1, end + 1):
    began = time.monotonic()
    told.log({"train/nats_per_token": 1 / step}, step)
    if step % 2 == 0:
        told.log({"validation/nats_per_token": 2 / step}, step)
    slowest = max(slowest, time.monotonic() - began)
exec(sys.argv[5])
began = time.monotonic()
told.finish()
print(f"slowest {slowest:.3f} finish {time.monotonic() - began:.3f}")
"""
KILLED = "wait_for_service(); time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
SERVICE_KILLED = """
wait_for_service().kill()
for step in range(end + 1, end + 200):
    told.log({"train/nats_per_token": 1 / step}, step)
"""
SERVICE_HANGS = """
service = wait_for_service()
service.suspend()
told._plan, tracking.FINISH_SECONDS = TrackingPlan(upload_seconds=0.0), 1.0
blob = "x" * 10_000
began = time.monotonic()
for step in range(end + 1, end + 2000):
    told.log({"train/note": blob}, step)
slowest = time.monotonic() - began
"""
HURRIED = "told._plan, tracking.FINISH_SECONDS = TrackingPlan(upload_seconds=0.0), 2.0"
SERVICE_HAS_NO_DISK = """
import resource
service = wait_for_service()
# As a full disk does to it: nothing can be written to a file any more.
resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (0, 0))
for step in range(end + 1, end + 2000):
    told.log({"train/note": "x" * 1000}, step)
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def train(
    mode: str,
    folder: Path,
    begin: int,
    end: int,
    *,
    then: str = "",
    url: str,
    code: int = 0,
    more: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """A process that tells of steps behind ``begin`` up to ``end``; ``then`` happens before it finishes.

    ``more`` are variables of its environment.
    """
    home = str(folder.parent)
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment |= dict.fromkeys(("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"), home)
    environment |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": API_KEY, **more}
    command = [sys.executable, "-c", TRAINING, mode, str(folder), str(begin), str(end), then]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told_twice(last: int) -> list[int]:
    """Steps of the lines of metrics.jsonl: even steps have two."""
    return [step for step in range(1, last + 1) for _ in range(2 - step % 2)]


def test_a_resumed_online_run_is_the_same_run_and_has_each_step_once(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("online", folder, 0, 7, url=server.url)
    train("online", folder, 4, 9, url=server.url)
    ((run_id, run),) = server.runs.items()
    assert run_id == (folder / "wandb_run_id.txt").read_text().strip()
    assert run.starts == 2
    assert [row["step"] for row in run.history] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [row["_step"] for row in run.history] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [row.get("validation/nats_per_token") for row in run.history[:4]] == [None, 1.0, None, 0.5]
    assert steps_in(folder) == told_twice(9)


def test_what_a_killed_process_did_not_send_is_sent_by_the_resumed_one(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("online", folder, 0, 7, then=KILLED, url=server.url, code=-signal.SIGKILL)
    train("online", folder, 6, 9, url=server.url)
    ((_, run),) = server.runs.items()
    assert [row["step"] for row in run.history] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert steps_in(folder) == told_twice(9)


def test_the_last_part_of_a_killed_offline_run_holds_the_whole_history(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("offline", folder, 0, 7, then=KILLED, url=server.url, code=-signal.SIGKILL)
    train("offline", folder, 6, 9, url=server.url)
    assert server.runs == {}
    parts = sorted(folder.glob("wandb/offline-run-*"))
    assert len(parts) == 2
    environment = {**os.environ, "HOME": str(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
    for part in parts:
        command = [sys.executable, "-m", "wandb", "sync", str(part)]
        subprocess.run(command, check=False, capture_output=True, timeout=120, env=environment)
    ((run_id, run),) = server.runs.items()
    assert run_id == (folder / "wandb_run_id.txt").read_text().strip()
    assert [row["step"] for row in run.history] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_server_that_cannot_be_reached_costs_no_step_and_a_bounded_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # Port 9 (discard) is closed here; the run ends long before wandb gives up to reach it.
    done = train(
        "online",
        folder,
        0,
        50,
        then=HURRIED,
        url="http://127.0.0.1:9",
    )
    _, slowest, _, finish = done.stdout.split()
    assert float(slowest) < 1
    assert float(finish) < 10
    assert steps_in(folder) == told_twice(50)
    assert done.stderr.count("is not used any more in this run; the metrics go on in") == 1


@pytest.mark.parametrize("then", [SERVICE_KILLED, SERVICE_HANGS, SERVICE_HAS_NO_DISK], ids=["killed", "hangs", "disk"])
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_training_goes_on_whatever_becomes_of_wandbs_process(
    mode: str, then: str, server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    began = time.monotonic()
    done = train(mode, folder, 0, 6, then=then, url=server.url)
    assert time.monotonic() - began < 100
    steps = steps_in(folder)
    assert steps == [*told_twice(6), *range(7, steps[-1] + 1)]
    assert len(steps) > 200
    if then == SERVICE_KILLED:
        assert done.stderr.count("is not used any more in this run") == 1
    if then == SERVICE_HANGS:
        assert float(done.stdout.split()[1]) < 20
        assert "no answer within 1 seconds" in done.stderr


LINEAGE = """
for digest in DIGESTS:
    told.artifact(Artifact("base", "model", {"sha256": "b"}, reference="https://hub/owner/model", is_input=True))
    adapter = folder / f"adapter-{digest}"
    adapter.mkdir(exist_ok=True)
    (adapter / "weights").write_text(digest)
    told.artifact(Artifact("run-adapter", "model", {"made_from": {"base": {"sha256": "b"}}}, adapter))
"""


def test_inputs_and_outputs_are_versions_and_the_same_content_is_the_same_version(
    server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train("online", folder, 0, 2, then=LINEAGE.replace("DIGESTS", "('1', '2')"), url=server.url)
    train("online", folder, 2, 3, then=LINEAGE.replace("DIGESTS", "('2',)"), url=server.url)
    (run_id,) = server.runs
    base, first, second = server.versions
    assert [each.name for each in server.versions] == ["base", "run-adapter", "run-adapter"]
    # Used, and not made here: the graph of lineage goes from the base through the run to the adapter.
    assert (base.made_by, set(base.used_by), base.metadata) == (None, {run_id}, {"sha256": "b"})
    assert [each.made_by for each in (first, second)] == [run_id, run_id]
    assert {"identity.json", "model"} <= base.manifest["contents"].keys()
    assert first.manifest["contents"].keys() == {"identity.json", "weights"}
    assert first.digest != second.digest
    assert [each.used_by for each in (first, second)] == [[], []]
    assert [each.state for each in server.versions] == ["COMMITTED"] * 3


def test_an_offline_run_is_synced_with_its_artifacts(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("offline", folder, 0, 3, then=LINEAGE.replace("DIGESTS", "('1',)"), url=server.url)
    (part,) = folder.glob("wandb/offline-run-*")
    environment = {**os.environ, "HOME": str(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
    command = [sys.executable, "-m", "wandb", "sync", str(part)]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
    ((_, run),) = server.runs.items()
    assert [row["step"] for row in run.history] == [1, 2, 3]
    assert [(each.name, each.state) for each in server.versions] == [
        ("base", "COMMITTED"),
        ("run-adapter", "COMMITTED"),
    ]


def test_a_trial_of_a_sweep_is_the_run_that_the_agent_chose(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    parameters = tmp_path / "config.yaml"
    parameters.write_text("training.learning_rate: {value: 0.001}\n")
    # As wandb's agent sets them for every trial; the run's id is also what `sweep` puts into the recipe.
    agent = {"WANDB_SWEEP_ID": "abc123", "WANDB_RUN_ID": "trial1", "WANDB_SWEEP_PARAM_PATH": str(parameters)}
    train("online", folder, 0, 2, url=server.url, more=agent)
    (run_id,) = server.runs
    assert run_id == "trial1" == (folder / "wandb_run_id.txt").read_text().strip()
    assert server.runs["trial1"].sweep == "abc123"
    assert [row["step"] for row in server.runs["trial1"].history] == [1, 2]
