"""From a finished run to the hub: what may be sent, packed with its card, then sent in one commit."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qlora_trainer.errors import RunFolderError, VerificationError
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import ExportFigures, RunReport
from qlora_trainer.runtime.atomic import sha256_of_files
from qlora_trainer.runtime.hub import Published, publish, require_repository_name
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.stages import base_model, report

ADAPTER_CONFIG = "adapter_config.json"
BASE_KEY = "base_model_name_or_path"
SETTINGS_FILES = ("adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Asked:
    """What is to be sent, and what is allowed.

    Attributes:
        format: name of the export.
        to: ``owner/name``.
        public: whether everybody may read it.
        base_on_hub: name on the hub of a base that the recipe gives as a local folder; None = not told.
        even_below_bar: send a file that keeps less than its recipe asks for.
        even_unverified: send a file that its runtime did not confirm.
    """

    format: str
    to: str
    public: bool = False
    base_on_hub: str | None = None
    even_below_bar: bool = False
    even_unverified: bool = False


@dataclass(frozen=True)
class Parcel:
    """Files ready to be sent.

    Attributes:
        asked: what for.
        files: content, or where it lies, by path in the repository.
        bytes: of all files.
    """

    asked: Asked
    files: Mapping[str, Path | bytes]
    bytes: int


def pack(recipe: Recipe, asked: Asked, *, trust_remote_code: bool = False) -> Parcel:
    """Checks a file of a finished run and packs it with its card. Sends nothing.

    Only the files that the report lists are packed, each with the bytes that were verified. A local path of the base
    in the adapter's settings gives way to its name on the hub, or to nothing.

    Raises:
        RunFolderError: the run has no report, or another recipe's.
        VerificationError: the file is not verified, is below its bar, or was changed since; all problems at once.
        HubError: ``to`` names no repository.
    """
    require_repository_name(asked.to)
    if asked.base_on_hub is not None:
        require_repository_name(asked.base_on_hub)
    folder = RunFolder(Path(recipe.run.folder) / recipe.run.name)
    made = read_report(folder)
    folder.require_own(recipe.model_dump(mode="json"), shaping=recipe.shaping)
    export = _named(made, asked.format, folder)
    place = folder.merged if asked.format == "merged_16bit" else folder.exports / asked.format
    problems = [*_problems(recipe, export, asked), *_changed(export, place)]
    files: dict[str, Path | bytes] = {name: place / name for name in export.sha256}
    if ADAPTER_CONFIG in files and not problems:
        files[ADAPTER_CONFIG] = _with_base(place / ADAPTER_CONFIG, asked.base_on_hub or recipe.base_model.name)
    problems += [] if problems else _local_paths(files)
    if problems:
        raise VerificationError("\n".join([f"{asked.format} is not sent:", *(f"  {text}" for text in problems)]))
    base = base_model.resolve(recipe.base_model, trust_remote_code=trust_remote_code)
    facts = report.base_facts(recipe, base.folder)
    if asked.base_on_hub is not None:
        facts = replace(facts, hub_name=asked.base_on_hub, label=asked.base_on_hub)
    card = report.render_card(report.CardSubject(recipe, made, facts, export, place=asked.to))
    files[report.CARD_FILE] = card.encode()
    return Parcel(asked, files, sum(map(_size, files.values())))


def push(parcel: Parcel) -> Published:
    """Sends a parcel.

    Raises:
        HubError: there is no login, or the hub failed; nothing of the parcel is there then.
    """
    message = f"{parcel.asked.format}, with the card of its run"
    return publish(parcel.files, parcel.asked.to, public=parcel.asked.public, message=message)


def read_report(folder: RunFolder) -> RunReport:
    """The report of a finished run.

    Raises:
        RunFolderError: there is none, or it is of another version.
    """
    if not folder.report_json.is_file():
        raise RunFolderError(f"{folder.root} holds no report. Carry the recipe out first: qlora-trainer run RECIPE")
    try:
        return TypeAdapter(RunReport).validate_json(folder.report_json.read_bytes())
    except ValidationError as error:
        raise RunFolderError(
            f"{folder.report_json}: damaged or of another version. Write it anew: qlora-trainer report RECIPE"
        ) from error


def _named(made: RunReport, name: str, folder: RunFolder) -> ExportFigures:
    found = {export.format: export for export in made.exports}
    if name not in found:
        has = ", ".join(found) or "no file at all"
        raise RunFolderError(f"{folder.root}: its report has no file {name!r}. It has: {has}")
    return found[name]


def _problems(recipe: Recipe, export: ExportFigures, asked: Asked) -> Iterator[str]:
    if not export.verified and not asked.even_unverified:
        yield f"it is not verified ({export.verification}). Add --even-if-unverified to send it with that warning"
    if export.status == "below_bar" and not asked.even_below_bar:
        yield "it is below the recipe's bar. Add --even-if-below-bar to send it with that warning in its card"
    if export.format == "peft_adapter" and recipe.lora.init == "pissa":
        yield "lora.init: pissa left its base on this machine, and the adapter fits no other. Send a merged file"


def _changed(export: ExportFigures, place: Path) -> Iterator[str]:
    """Files that are not as they were when they were verified."""
    found = sha256_of_files(place) if place.is_dir() else {}
    for name, digest in export.sha256.items():
        if found.get(name) != digest:
            what = "is missing" if name not in found else "was changed since it was measured"
            yield f"{place / name} {what}. Delete {place} and run the recipe again"


def _with_base(config: Path, base: str | None) -> bytes:
    settings = {**json.loads(config.read_text(encoding="utf-8")), BASE_KEY: base}
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()


def _local_paths(files: Mapping[str, Path | bytes]) -> Iterator[str]:
    """Settings that would tell strangers where files lie on this machine."""
    for name in SETTINGS_FILES:
        if name in files:
            content = files[name]
            settings = json.loads(content if isinstance(content, bytes) else content.read_bytes())
            for key, value in settings.items():
                if isinstance(value, str) and value.startswith(("/", "~/")) and value.count("/") > 1:
                    yield f"{name}: {key} holds a local path, {value}. Take it out of the base model and run again"


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
