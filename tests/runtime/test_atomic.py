import errno
import os
import signal
import subprocess
import sys
from hashlib import sha256

import pytest

from qlora_trainer.errors import RunFolderError
from qlora_trainer.runtime import atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill_the_disk():
    """The kernel's own 'No space left on device'."""
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def fail_after_writing(path, error):
    path.write_text("half")
    raise error


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "file.txt"
    atomic.write_text(path, "one")
    atomic.write_text(path, "zwei ä")
    assert path.read_bytes() == "zwei ä".encode()
    assert names(path.parent) == ["file.txt"]


def test_the_old_file_stays_until_the_block_ends(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic.writing_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_whoever_reads_the_old_file_reads_it_to_its_end(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with path.open() as reader:
        atomic.write_text(path, "new")
        assert reader.read() == "old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic.writing_file(path) as partial:
        fail_after_writing(partial, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_written_folder_replaces_the_old_one_whole(tmp_path):
    folder = tmp_path / "folder"
    for content in ("old", "new"):
        with atomic.writing_folder(folder) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / content).write_text(content)
    assert names(folder / "sub") == ["new"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(error), atomic.writing_folder(folder) as partial:
        fail_after_writing(partial / "half", error)
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["folder"]


KILLED = """
import os, signal
from pathlib import Path
from qlora_trainer.runtime import atomic
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
root = Path({root!r})
{body}
"""


def run_until_killed(root, body):
    child = subprocess.run([sys.executable, "-c", KILLED.format(root=str(root), body=body)], check=False)
    assert child.returncode == -signal.SIGKILL


@pytest.fixture
def old_state(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "content").write_text("old")
    (tmp_path / "file").write_text("old")
    return tmp_path


def write_again(root):
    with atomic.writing_folder(root / "folder") as partial:
        assert names(partial) == []
        (partial / "content").write_text("new")
    atomic.write_text(root / "file", "new")
    assert (root / "folder" / "content").read_text() == (root / "file").read_text() == "new"
    assert names(root) == ["file", "folder"]


def test_a_process_killed_while_writing_leaves_the_old_state_whole(old_state):
    run_until_killed(
        old_state,
        "with atomic.writing_folder(root / 'folder') as folder, atomic.writing_file(root / 'file') as file:\n"
        "    (folder / 'content').write_text('half'); file.write_text('half'); die()",
    )
    assert (old_state / "folder" / "content").read_text() == (old_state / "file").read_text() == "old"
    assert ".folder.partial" in names(old_state)
    write_again(old_state)


BETWEEN_THE_RENAMES = """
rename = Path.rename
def rename_or_die(self, target):
    return die() if self.name == '.folder.partial' else rename(self, target)
Path.rename = rename_or_die
with atomic.writing_folder(root / 'folder') as folder:
    (folder / 'content').write_text('half')
"""


def test_a_folder_moved_aside_by_a_killed_process_is_put_back(old_state):
    run_until_killed(old_state, BETWEEN_THE_RENAMES)
    assert not (old_state / "folder").exists()
    atomic.restore_all(old_state)
    assert (old_state / "folder" / "content").read_text() == "old"
    write_again(old_state)


def test_an_error_after_such_a_kill_still_leaves_the_old_folder(old_state):
    run_until_killed(old_state, BETWEEN_THE_RENAMES)
    with pytest.raises(ValueError, match="again"), atomic.writing_folder(old_state / "folder"):
        raise ValueError("again")
    assert (old_state / "folder" / "content").read_text() == "old"


def test_restoring_removes_an_outdated_copy(old_state):
    (old_state / ".folder.old").mkdir()
    atomic.restore_all(old_state)
    assert names(old_state) == ["file", "folder"]
    assert (old_state / "folder" / "content").read_text() == "old"


@pytest.mark.parametrize("writing", [atomic.writing_file, atomic.writing_folder])
def test_a_full_disk_is_told_with_the_place_the_free_room_and_the_mend(old_state, writing):
    target = old_state / ("file" if writing is atomic.writing_file else "folder")
    with pytest.raises(RunFolderError, match=r"No space left.*\d MiB free.*Make room") as caught, writing(target):
        fill_the_disk()
    assert str(target) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert names(old_state) == ["file", "folder"]
    assert (old_state / "folder" / "content").read_text() == (old_state / "file").read_text() == "old"


def test_a_file_where_a_folder_is_needed_is_told(old_state):
    with pytest.raises(RunFolderError, match="file stands where a folder is needed"):
        atomic.write_text(old_state / "file" / "below", "text")
    with pytest.raises(RunFolderError, match="file stands where a folder is needed"):
        atomic.write_text(old_state / "file" / "far" / "below", "text")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_closed_place_is_told(tmp_path, monkeypatch, code):
    # The tests may run as root, whom permissions do not stop.
    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with (
        pytest.raises(RunFolderError, match="Choose a folder"),
        atomic.writing_folder(tmp_path / "folder"),
    ):
        pytest.fail("the block must not start")


def test_an_error_about_another_file_passes_unchanged(tmp_path):
    with pytest.raises(PermissionError), atomic.writing_file(tmp_path / "a" / "file"):
        raise PermissionError(errno.EACCES, "closed", "/elsewhere/source.txt")


def test_files_are_hashed_by_their_relative_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"")
    assert atomic.sha256_of_files(tmp_path) == {"a": sha256(b"").hexdigest(), "sub/b": sha256(b"two").hexdigest()}
