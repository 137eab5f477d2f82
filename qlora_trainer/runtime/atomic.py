"""Files and folders that are wholly there or not there: written beside their place, flushed, then renamed.

A process that is killed at any moment leaves either the old content or the new, and at most a hidden
``.<name>.partial`` or ``.<name>.old`` beside it, which the next write removes or puts back.
What is written is not known here.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_trainer.errors import RunFolderError
from qlora_trainer.runtime.memory import free_disk_bytes

_MENDS = {
    errno.ENOSPC: "Make room on this disk, or choose a folder on another one.",
    errno.EDQUOT: "Make room within the quota, or choose a folder on another disk.",
    errno.EACCES: "Choose a folder that can be written, or change its permissions.",
    errno.EPERM: "Choose a folder that can be written, or change its permissions.",
    errno.EROFS: "Choose a folder on a disk that can be written.",
    errno.ENOTDIR: "A file stands where a folder is needed: move it away, or choose another folder.",
    errno.EEXIST: "A file stands where a folder is needed: move it away, or choose another folder.",
    errno.EISDIR: "A folder stands where a file is needed: move it away, or choose another folder.",
}


@contextmanager
def writing_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to; when the block ends well, that file takes the place of ``path``.

    Raises:
        RunFolderError: the disk is full or the place cannot be written; ``path`` is as it was.
    """
    partial = _beside(path, "partial")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        try:
            yield partial
            _flush(partial)
            partial.replace(path)
            _flush(path.parent)
        finally:
            _remove(partial)


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write into; when the block ends well, it takes the place of ``folder``, whole.

    A folder cannot be renamed over another. So the old one is moved aside first, and a process killed between
    the two renames leaves it as ``.<name>.old``: ``restore`` puts it back, and so does the next write.

    Raises:
        RunFolderError: the disk is full or the place cannot be written; ``folder`` is as it was.
    """
    partial = _beside(folder, "partial")
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        restore(folder)
        _remove(partial)
        partial.mkdir()
        try:
            yield partial
            for path in (*partial.rglob("*"), partial):
                _flush(path)
            _put_in_place(partial, folder)
            _flush(folder.parent)
        finally:
            _remove(partial)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8 in place of ``path``, wholly or not at all.

    Raises:
        RunFolderError: the disk is full or the place cannot be written.
    """
    with writing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def restore(folder: Path) -> None:
    """Puts ``folder`` back where a killed process had moved it aside, or removes its outdated copy."""
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    _remove(old)


def restore_all(parent: Path) -> None:
    """``restore`` for every folder that a killed process may have left moved aside in ``parent``."""
    for old in sorted(parent.glob(".*.old")):
        restore(parent / old.name.removeprefix(".").removesuffix(".old"))


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what the system says about a full or closed place into an error that names the mend.

    Other system errors pass through unchanged, and so do those about files that do not lie beside ``path``.

    Raises:
        RunFolderError: an ``OSError`` of the block says that ``path`` cannot be written.
    """
    try:
        yield
    except OSError as error:
        is_elsewhere = error.filename is not None and not _is_near(Path(os.fsdecode(error.filename)), path)
        if error.errno not in _MENDS or is_elsewhere:
            raise
        free = free_disk_bytes(path) / 2**20
        raise RunFolderError(
            f"{path}: cannot be written: {os.strerror(error.errno)} ({free:,.0f} MiB free on its disk). "
            f"{_MENDS[error.errno]}"
        ) from error


def sha256_of_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in ``folder``, by its path relative to it with ``/``, sorted; read in small pieces."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _is_near(file: Path, path: Path) -> bool:
    """Whether ``file`` lies in the folder of ``path``, or is one of the folders above it."""
    parent, place = path.absolute().parent, file.absolute()
    return parent in (place, *place.parents) or place in parent.parents


def _put_in_place(partial: Path, folder: Path) -> None:
    old = _beside(folder, "old")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk and would outlive a power cut."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
