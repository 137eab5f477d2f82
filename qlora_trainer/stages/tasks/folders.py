"""Folders of task files: those of the package and the user's own, with their data beside them."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_trainer.errors import DataError
from qlora_trainer.runtime.atomic import sha256_of_files
from qlora_trainer.runtime.run_folder import fingerprint

PROBES_FOLDER = Path(__file__).parent / "probes"
PROBES = ("probe_in_context", "probe_chain_of_thought", "probe_instructions", "probe_repeated_facts")
"""The package's own tasks; ``--tasks probes`` names them all. What they can show stands in their README."""

# A line such as `test: items.jsonl` of a task file.
DATA_FILE = re.compile(r"^(\s*[\w-]+:\s*)([\w./-]+\.(?:jsonl?|csv|parquet|txt))(\s*)$", re.MULTILINE)


def folder_fingerprint(folder: Path) -> str:
    """Of every file in a folder of tasks: another text or another item is another task."""
    return fingerprint(sha256_of_files(folder))


@contextmanager
def with_found_data(folder: Path) -> Iterator[Path]:
    """A copy of a folder of tasks for the harness to read, in which data files are named by their whole path.

    The harness looks for them where the program was started, while their authors mean: beside the task file.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"--task-folder: there is no folder {folder}. Give one that holds the tasks' YAML files")
    with TemporaryDirectory(prefix="tasks-") as place:
        copied = Path(place) / folder.name
        shutil.copytree(folder, copied)
        for path in (*copied.rglob("*.yaml"), *copied.rglob("*.yml")):
            path.write_text(_found(path.read_text(encoding="utf-8"), path.parent), encoding="utf-8")
        yield copied


def _found(text: str, folder: Path) -> str:
    def whole(line: re.Match[str]) -> str:
        path = folder / line[2]
        return f"{line[1]}{path}{line[3]}" if path.is_file() else line[0]

    return DATA_FILE.sub(whole, text)
