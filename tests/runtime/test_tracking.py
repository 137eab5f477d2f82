import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from wandb.proto import wandb_internal_pb2

from qlora_trainer.errors import RunFolderError
from qlora_trainer.runtime import tracking
from qlora_trainer.runtime.tracked_run import Artifact, Table, TrackingPlan
from qlora_trainer.runtime.tracking import Tracker

CONFIG = {"lora": {"rank": 8, "target_modules": ["q_proj"]}, "data": {"validation": None}}


def tracker(folder, wandb_mode="off", upload_seconds=60.0):
    names = {"project": "project", "group": "group", "tags": ("one", "two")}
    return Tracker(folder, TrackingPlan(wandb=wandb_mode, **names, config=CONFIG, upload_seconds=upload_seconds))


def own_records(caplog):
    """What this package has logged; threads of the real wandb, which other tests started, may log at any time."""
    return [record for record in caplog.records if record.name.startswith("qlora_trainer.")]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# metrics.jsonl


def test_each_record_is_one_line_with_its_step(tmp_path):
    told = tracker(tmp_path)
    told.log({"train/nats_per_token": 1 / 3, "note": "ä"}, 10)
    told.log({"validation/nats_per_token": None}, 20)
    told.finish()
    assert lines(tmp_path) == [
        {"step": 10, "train/nats_per_token": 1 / 3, "note": "ä"},
        {"step": 20, "validation/nats_per_token": None},
    ]


def test_a_line_is_on_the_disk_as_soon_as_it_is_logged(tmp_path):
    told = tracker(tmp_path)
    for step in (1, 2):
        told.log({}, step)
        assert len(lines(tmp_path)) == step


def test_resuming_drops_later_steps_and_the_half_line_of_a_killed_process(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    told = tracker(tmp_path)
    for step in (10, 20, 20, 30):
        told.log({"x": step}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "x"')
    again = tracker(tmp_path)
    again.resume_from(20)
    again.log({"x": 21}, 21)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 20, 21]
    assert "2 lines after step 20 dropped" in caplog.text


def test_a_whole_record_without_its_line_end_is_written_again_and_not_glued(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    told = tracker(tmp_path)
    told.resume_from(2)
    told.log({}, 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_resuming_from_the_beginning_forgets_a_run_without_checkpoints(tmp_path):
    told = tracker(tmp_path)
    told.log({}, 5)
    told.resume_from(0)
    assert lines(tmp_path) == []


def test_resuming_where_all_lines_stay_leaves_the_file_alone(tmp_path):
    told = tracker(tmp_path)
    told.resume_from(0)
    assert not (tmp_path / "metrics.jsonl").exists()
    told.log({}, 5)
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    told.resume_from(5)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


@pytest.mark.parametrize("line", ["[1]", '"text"', '{"step": "1"}', "{}", "\x00\x00"])
def test_a_line_without_a_step_is_dropped_on_resume(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 1}}\n')
    tracker(tmp_path).resume_from(1)
    assert lines(tmp_path) == [{"step": 1}]


def test_a_full_disk_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: cannot be written: No space left"):
        tracker(tmp_path).log({}, 1)


def test_without_wandb_it_is_not_imported(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom qlora_trainer.runtime.tracking import Tracker\n"
        "from qlora_trainer.runtime.tracked_run import Artifact, Table\n"
        "told = Tracker(Path(sys.argv[1]))\n"
        "told.log({'x': 1.0}, 1)\ntold.table('t', Table(['a'], [[1.0]]))\n"
        "told.artifact(Artifact('a', 'model', folder=Path(sys.argv[1])))\ntold.finish()\n"
        "sys.exit(bool({'wandb', 'torch', 'tensorboard', 'trackio'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# The real wandb, offline


@pytest.fixture(scope="module")
def wandb_home(tmp_path_factory):
    """Keeps what wandb writes beside its runs out of the user's folders, and has no login."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(home))
        patch.delenv("WANDB_API_KEY", raising=False)
        yield home


@pytest.fixture(scope="module")
def offline_run(wandb_home, tmp_path_factory):
    """A finished offline run and the records that its .wandb file holds."""
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    (folder / "adapter" / "sub").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(b"12345")
    (folder / "adapter" / "sub" / "config").write_bytes(b"1")
    told = tracker(folder, "offline")
    for step in range(10, 110, 10):
        told.log({"train/nats_per_token": 1 / step, "validation/nats_per_token": None}, step)
    told.table("gap", Table(("stage", "nats", "kl"), [("base_16bit", 1.5, 0.1), ("adapter_unmerged", 1, None)]))
    told.artifact(Artifact("adapter", "adapter", folder=folder / "adapter"))
    told.finish()
    told.finish()
    return folder, finished_records(folder)


def finished_records(folder):
    """All records of the run; wandb's process may write the last of them a moment after the run was finished."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    for _ in range(200):
        records = list(read_records(file.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.05)
    return pytest.fail(f"{file} was not finished within 10 seconds")


def read_records(content):
    """Records of a .wandb file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    block, begin = 32 * 1024, 7
    payload = b""
    while begin < len(content):
        room = block - begin % block
        if room < 7:
            begin += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, begin)
        payload += content[begin + 7 : begin + 7 + length]
        begin += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(payload)
            payload = b""


def values(items):
    """Key and value of wandb's items, nested keys joined by dots."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_the_history_holds_what_was_logged(offline_run):
    folder, records = offline_run
    rows = [values(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    # The table stands in the row of the last step.
    logged = [{key: value for key, value in row.items() if not key.startswith(("_", "gap"))} for row in rows]
    assert logged == lines(folder)
    assert [row["_step"] for row in rows] == [line["step"] for line in lines(folder)] == list(range(10, 110, 10))


def test_the_table_holds_its_rows(offline_run):
    folder, _ = offline_run
    (file,) = folder.glob("wandb/offline-run-*/files/media/table/gap_*.table.json")
    assert json.loads(file.read_text()) == {
        "columns": ["stage", "nats", "kl"],
        "data": [["base_16bit", 1.5, 0.1], ["adapter_unmerged", 1, None]],
    }


def test_the_config_is_the_recipe(offline_run):
    _, records = offline_run
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {key: value for key, value in values(runs[0].config.update).items() if key != "_wandb"} == CONFIG
    assert (runs[0].project, runs[0].run_group) == ("project", "group")
    assert (runs[0].display_name, list(runs[0].tags)) == ("my-run", ["one", "two"])


def test_the_summary_holds_the_last_values(offline_run):
    _, records = offline_run
    summary = {}
    for record in records:
        summary |= values(record.summary.update)
    assert summary["train/nats_per_token"] == 1 / 100
    assert summary["step"] == 100


def test_the_artifact_holds_the_files_where_they_are(offline_run):
    folder, records = offline_run
    artifacts = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    artifacts += [
        record.request.log_artifact.artifact for record in records if record.WhichOneof("record_type") == "request"
    ]
    (adapter,) = [artifact for artifact in artifacts if artifact.name == "adapter"]
    entries = {entry.path: entry.local_path for entry in adapter.manifest.contents}
    assert adapter.type == "adapter"
    assert entries == {
        "weights": str(folder / "adapter" / "weights"),
        "sub/config": str(folder / "adapter" / "sub" / "config"),
    }


def test_the_run_lies_in_its_folder(offline_run, wandb_home):
    folder, _ = offline_run
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "metrics.jsonl", "wandb", "wandb_run_id.txt"]
    assert not list(wandb_home.rglob("*.wandb"))


def test_a_resumed_run_keeps_its_id_and_says_nothing(offline_run, capfd, caplog):
    folder, _ = offline_run
    told = tracker(folder, "offline")
    told.log({"x": 1.0}, 110)
    told.artifact(Artifact("adapter", "adapter", folder=folder / "adapter"))
    told.finish()
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    first, second = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert first.name == second.name == f"run-{(folder / 'wandb_run_id.txt').read_text().strip()}.wandb"
    assert first != second


WITHOUT_LOGIN = """
import logging
import sys
from pathlib import Path
from qlora_trainer.runtime.tracked_run import TrackingPlan
from qlora_trainer.runtime.tracking import Tracker
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
told = Tracker(Path(sys.argv[1]), TrackingPlan(wandb="online"))
told.log({"x": 1.0}, 1)
told.finish()
"""


def test_online_without_a_login_is_one_warning_and_no_prompt(wandb_home, tmp_path):
    # In a process of its own: wandb remembers the login of its process, whatever test it was made by.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-c", WITHOUT_LOGIN, str(tmp_path)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=120, env=environment, stdin=subprocess.DEVNULL
    )
    assert lines(tmp_path) == [{"step": 1, "x": 1.0}]
    assert done.stdout == ""
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert warning.startswith("WARNING wandb failed at start")
    assert "not logged in. Run `wandb login` once, or set tracking.wandb: offline" in warning


STOPPED = """
import sys
import time
from pathlib import Path
import psutil
from qlora_trainer.runtime import tracking
from qlora_trainer.runtime.tracked_run import TrackingPlan
told = tracking.Tracker(Path(sys.argv[1]), TrackingPlan(wandb="offline", upload_seconds=0.0))
def is_service(child):
    try:
        return child.name() == "wandb-core"
    except psutil.Error:
        return False
while not (services := [child for child in psutil.Process().children() if is_service(child)]):
    time.sleep(0.05)
(service,) = services
service.suspend()
tracking.FINISH_SECONDS = 1.0
told.finish()
print("went on after", service.pid)
"""


@pytest.mark.slow
def test_a_process_whose_wandb_hangs_still_ends(wandb_home, tmp_path):
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    # Without the variable that would let it share the service of this process.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    child = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=environment)
    assert child.stdout.startswith("went on after")
    assert "no answer within 1 seconds" in child.stderr
    assert "Traceback" not in child.stderr


# A wandb that fails


class BrokenWandb:
    """Stands in for the wandb module: notes its calls, and fails or hangs at one of them."""

    def __init__(self, failing, failure):
        self.calls = []
        for name in ("login", "init", "define_metric", "log", "Table", "Artifact", "log_artifact", "finish"):
            setattr(self, name, self.call(name, failure if name == failing else None))
        self.teardown = self.call("teardown", None)

    def Settings(self, **settings):
        return settings

    def call(self, name, failure):
        def called(*_, **__):
            self.calls.append(name)
            if failure is not None:
                failure()
            return SimpleNamespace(**vars(self), add_file=lambda *_, **__: None)

        return called


def fail():
    raise ConnectionError("the server is on fire")


def hang():
    time.sleep(60)


@pytest.fixture
def install(monkeypatch):
    def put(failing, failure=fail):
        broken = BrokenWandb(failing, failure)
        monkeypatch.setitem(sys.modules, "wandb", broken)
        # The process of the real wandb, which tests above have started, has nothing to do with this one.
        monkeypatch.setattr(psutil.Process, "children", lambda _: [])
        return broken

    return put


def train(folder, mode="online", upload_seconds=60.0):
    """What a training does with a tracker."""
    told = tracker(folder, mode, upload_seconds)
    for step in (1, 2, 3):
        told.log({"x": 0.5}, step)
    told.table("gap", Table(("a",), [(1.0,)]))
    told.artifact(Artifact("adapter", "adapter", folder=folder))
    told.finish()


@pytest.mark.parametrize(
    "failing", ["login", "init", "define_metric", "log", "Table", "Artifact", "log_artifact", "finish"]
)
def test_a_failing_wandb_is_one_warning_and_training_goes_on(tmp_path, install, caplog, failing):
    broken = install(failing)
    train(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    (warning,) = own_records(caplog)
    assert warning.levelname == "WARNING"
    assert "ConnectionError: the server is on fire" in warning.getMessage()
    assert broken.calls.count(failing) == 1


def test_a_wandb_that_failed_is_still_ended(tmp_path, install):
    assert install("log").calls == []
    broken = install("log")
    train(tmp_path)
    assert broken.calls[-2:] == ["finish", "teardown"]


def test_a_working_wandb_is_no_warning(tmp_path, install, caplog):
    working = install("none of them")
    train(tmp_path)
    assert own_records(caplog) == []
    began = ["login", "init", "define_metric"]
    assert working.calls == [*began, "log", "log", "log", "Table", "log", "Artifact", "log_artifact", "finish"]


def test_a_missing_wandb_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(tmp_path, "offline")
    assert len(lines(tmp_path)) == 3
    assert [record.levelname for record in own_records(caplog)] == ["WARNING"]
    assert "ModuleNotFoundError" in caplog.text


@pytest.mark.parametrize("hanging", ["init", "finish"])
def test_a_hanging_wandb_is_given_up_after_a_while(tmp_path, install, monkeypatch, caplog, hanging):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
    broken = install(hanging, hang)
    began = time.monotonic()
    train(tmp_path, upload_seconds=0.0)
    assert time.monotonic() - began < 10
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    (warning,) = own_records(caplog)
    assert "no answer within" in warning.getMessage()
    assert broken.calls[-1] == "teardown"


def test_an_interruption_is_not_swallowed(tmp_path, install):
    def interrupt():
        signal.raise_signal(signal.SIGINT)

    install("log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
