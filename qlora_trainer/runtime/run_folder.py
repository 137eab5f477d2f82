"""A run is a folder: whose recipe it holds, which stages are done, and where everything lies.

    recipe.yaml  environment.json  stages/<name>.json  checkpoints/  adapter/  merged/  exports/<format>/
    evaluations/  metrics.jsonl  log.txt  report.json  report.md  report.html  compare.json  compare.md  compare.html

What a recipe or a record means is not known here: recipes are nested plain values, records are dataclasses.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from qlora_trainer.errors import RunFolderError
from qlora_trainer.runtime.atomic import explained, restore_all, write_text
from qlora_trainer.runtime.environment import changed_versions, describe_environment
from qlora_trainer.runtime.memory import free_disk_bytes
from qlora_trainer.runtime.record_paths import from_folder, in_folder

logger = logging.getLogger(__name__)

Record = TypeVar("Record")
_TEXTS = TypeAdapter(dict[str, str])
_ABSENT = "absent"


def fingerprint(*parts: object) -> str:
    """SHA-256 in hexadecimal of plain values, dataclasses or paths; the order of keys in a mapping does not matter.

    Sets have no order: sort them first.
    """
    plain = to_jsonable_python(parts, inf_nan_mode="constants")
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run. Making this object touches nothing; ``open`` claims the folder for a recipe.

    Attributes:
        root: the folder.
    """

    root: Path

    @classmethod
    @contextmanager
    def open(cls, root: Path, recipe: Mapping[str, object], *, shaping: tuple[str, ...]) -> Iterator[Self]:
        """Claims ``root`` for a recipe and for this process while the block lasts.

        Writes recipe.yaml and environment.json, and puts back what a killed process had moved aside. A folder
        in which no stage was finished and nothing was saved yet may be claimed by any recipe.

        Args:
            root: folder of the run; made where it is missing.
            recipe: resolved recipe as nested plain values.
            shaping: keys of it, such as ``lora`` or ``run.seed``, that decide what the results are. Everything
                below them must be as it was when the run began; other settings may change.

        Raises:
            RunFolderError: the folder belongs to another recipe (tells each difference), another process
                works in it, or it cannot be written.
        """
        with explained(root / "recipe.yaml"):
            try:
                root.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:
                raise RunFolderError(f"{root}: no folder can be made there. Choose another run.folder.") from error
        with _locked(root):
            folder = cls(root)
            for parent in (folder.root, folder.exports, folder.checkpoints):
                restore_all(parent)
            folder._claim(recipe, shaping)
            folder._write_environment()
            yield folder

    @property
    def checkpoints(self) -> Path:
        """Folder of training's checkpoints."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter in PEFT format."""
        return self.root / "adapter"

    @property
    def merged(self) -> Path:
        """Folder of the merged model in Hugging Face layout."""
        return self.root / "merged"

    @property
    def exports(self) -> Path:
        """Folder of the exports, one folder per format in it."""
        return self.root / "exports"

    @property
    def evaluations(self) -> Path:
        """Folder of what evaluations keep for later comparison."""
        return self.root / "evaluations"

    @property
    def stages(self) -> Path:
        """Folder of the finished stages' records."""
        return self.root / "stages"

    @property
    def metrics(self) -> Path:
        """File of the metrics, one JSON object per line."""
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """File of the log."""
        return self.root / "log.txt"

    @property
    def report_json(self) -> Path:
        """The report as data."""
        return self.root / "report.json"

    @property
    def report_md(self) -> Path:
        """The report as Markdown."""
        return self.root / "report.md"

    @property
    def report_html(self) -> Path:
        """The report as one self-contained page."""
        return self.root / "report.html"

    @property
    def tasks_json(self) -> Path:
        """What the evaluation harness gave of the run's models."""
        return self.root / "tasks.json"

    @property
    def recipe_yaml(self) -> Path:
        """File of the resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def environment_json(self) -> Path:
        """File of the machine and the versions."""
        return self.root / "environment.json"

    @property
    def recipe_text(self) -> str:
        """The resolved recipe as YAML, as ``open`` wrote it."""
        return self.recipe_yaml.read_text(encoding="utf-8")

    @property
    def environment(self) -> dict[str, str]:
        """Machine and versions, as ``open`` wrote them."""
        return _TEXTS.validate_json(self.environment_json.read_bytes())

    def save_record(self, name: str, key: str, record: object) -> None:
        """Keeps the record of a finished stage, in place of an older one; its paths hold where the run is moved to.

        Args:
            name: of the stage; becomes a file name.
            key: fingerprint of everything the record depends on.
            record: a dataclass.
        """
        told = from_folder(record, self.root)
        kept = {"fingerprint": key, "record": to_jsonable_python(told, inf_nan_mode="constants")}
        write_text(self._record_file(name), json.dumps(kept, indent=2) + "\n")

    def load_record(self, name: str, key: str, record_type: type[Record]) -> Record | None:
        """The record of a stage that was finished with the same fingerprint, else None.

        A file that cannot be read is worth a warning and no more: the stage is done again.
        """
        path = self._record_file(name)
        if not path.is_file():
            return None
        try:
            kept = json.loads(path.read_bytes())
            if kept["fingerprint"] != key:
                return None
            return in_folder(TypeAdapter(record_type).validate_json(json.dumps(kept["record"])), self.root)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged or of another version, its stage is done again: %s", path, error)
            return None

    def require_free_disk(self, needed_bytes: int, purpose: str) -> None:
        """Makes sure of room on the folder's disk before the work begins.

        Args:
            needed_bytes: what will be written.
            purpose: what for, such as ``the merged model``.

        Raises:
            RunFolderError: there is less room; tells both figures.
        """
        free = free_disk_bytes(self.root)
        if free < needed_bytes:
            raise RunFolderError(
                f"{self.root}: {purpose} needs {needed_bytes / 2**30:,.2f} GiB, and its disk has "
                f"{free / 2**30:,.2f} GiB free. Make room there, or choose a run.folder on another disk."
            )

    def _record_file(self, name: str) -> Path:
        return self.stages / f"{name}.json"

    def require_own(self, recipe: Mapping[str, object], *, shaping: tuple[str, ...]) -> dict[str, tuple[str, str]]:
        """Refuses a folder that holds results of another recipe; reads only. Arguments as for ``open``.

        Returns:
            Settings that differ and may, by dotted key: the value there and the value now.

        Raises:
            RunFolderError: tells each setting that differs and may not.
        """
        now = json.loads(json.dumps(recipe))
        differing = _differences(self._former_recipe(), now) if self._has_results() else {}
        refused = {key: both for key, both in differing.items() if _is_below(key, shaping)}
        if refused:
            lines = "".join(f"\n  {key}: {was} there, {now} now" for key, (was, now) in refused.items())
            raise RunFolderError(
                f"{self.root} holds results of another recipe, {len(refused)} setting(s) differ:{lines}\n"
                "Give this recipe another run.name, or delete that folder."
            )
        return differing

    def _claim(self, recipe: Mapping[str, object], shaping: tuple[str, ...]) -> None:
        """Writes recipe.yaml where the folder is free or this recipe's own."""
        for key, (was, now) in self.require_own(recipe, shaping=shaping).items():
            logger.info("%s: %s was %s and is %s now", self.root, key, was, now)
        plain = json.loads(json.dumps(recipe))
        write_text(self.recipe_yaml, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def _has_results(self) -> bool:
        """Whether a stage was finished or training saved its state, under a recipe that is known."""
        made = (*self.stages.glob("*.json"), *self.checkpoints.glob("step-*"))
        return bool(made) and self.recipe_yaml.is_file()

    def _former_recipe(self) -> Mapping[str, object]:
        try:
            return TypeAdapter(dict[str, object]).validate_python(yaml.safe_load(self.recipe_yaml.read_bytes()))
        except (yaml.YAMLError, ValidationError) as error:
            raise RunFolderError(
                f"{self.recipe_yaml}: damaged, so that it cannot be told whose results are there. "
                f"Give this recipe another run.name, or delete {self.root}."
            ) from error

    def _write_environment(self) -> None:
        now = describe_environment()
        if self._has_results() and self.environment_json.is_file():
            changes = changed_versions(self.environment, now)
            if changes:
                logger.warning(
                    "%s was begun in another environment, its figures come from both: %s",
                    self.root,
                    "; ".join(changes),
                )
        write_text(self.environment_json, json.dumps(now, indent=2) + "\n")


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system releases however the process ends."""
    path = root / ".lock"
    with explained(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"{root} is in use by process {path.read_text(encoding='ascii').strip() or 'unknown'}. "
                "Wait for it to end, stop it, or give this recipe another run.name."
            ) from error
        with explained(path):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode("ascii"))
        yield
    finally:
        os.close(descriptor)


def _differences(former: Mapping[str, object], recipe: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Settings that differ, by their dotted keys, with both values as text."""
    before, now = dict(_flat(former)), dict(_flat(recipe))
    texts = {key: (_text(before, key), _text(now, key)) for key in {**before, **now}}
    return {key: both for key, both in texts.items() if both[0] != both[1]}


def _flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(flat: Mapping[str, object], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else _ABSENT


def _is_below(key: str, shaping: tuple[str, ...]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in shaping)
