"""Encoded rows kept on disk, so that the second look at a recipe reads them instead of making them.

A folder of the cache is named by everything that its rows depend on: the content of the data files, of the tokenizer
and of the template, and the settings. It is written whole or not at all and says the digest of each of its files; one
that does not hold what it says is made anew. It may be deleted whenever no run uses it.
"""

import fcntl
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qlora_trainer.data.audit import MaskAudit
from qlora_trainer.data.mixture import mix
from qlora_trainer.data.store import StoredRows
from qlora_trainer.data.tokenizer import TOKENIZER_FILES, TextTokenizer
from qlora_trainer.errors import DataError
from qlora_trainer.recipe import Recipe
from qlora_trainer.runtime.atomic import explained, sha256_of_files, writing_folder
from qlora_trainer.runtime.run_folder import fingerprint
from qlora_trainer.stages.dataset.encoding import encode_files
from qlora_trainer.stages.dataset.files import TaskFiles, find
from qlora_trainer.stages.dataset.rows import TaskRows, fingerprint_of
from qlora_trainer.stages.dataset.template import template_source

logger = logging.getLogger(__name__)

# Raised whenever equal settings give other rows or other files, so that older caches are not mistaken for them.
FORMAT = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What is known of the rows in a folder.

    Attributes:
        files: SHA-256 of each other file.
        audit: of all rows.
        notes: sentences that the reader should see.
        source_rows: training rows of each training source, in order.
        fingerprint: of all rows, as ``rows.fingerprint_of`` computes it.
    """

    files: dict[str, str]
    audit: MaskAudit
    notes: tuple[str, ...]
    source_rows: tuple[int, ...]
    fingerprint: str


_MANIFEST = TypeAdapter(Manifest)


def load_rows(recipe: Recipe, base_folder: Path, *, download: bool = True) -> TaskRows:
    """The rows of the recipe's data section, from the cache or encoded now.

    Args:
        recipe: its ``data`` section, ``run.seed`` and ``evaluation.metrics`` are read; paths of data files start at
            the current folder.
        base_folder: folder of the base model, which holds the tokenizer.
        download: get hub data sets that are not on this machine.

    Raises:
        DataError: a file or its rows cannot be used; holds the problems of all files.
        RecipeError: the base model's tokenizer lacks what the recipe asks for.
        BaseModelError: the tokenizer cannot be loaded.
        RunFolderError: the cache folder cannot be written.
    """
    tokenizer = TextTokenizer.load(base_folder, chat_template=template_source(recipe.data))
    files = find(recipe.data, download=download)
    folder = Path(recipe.data.cache_folder) / cache_key(recipe, files, base_folder)
    with _locked(folder):
        manifest = _kept(folder)
        if manifest is None:
            manifest = _encode(folder, files, recipe, tokenizer)
        train, validation, test = (StoredRows.open(folder, side) for side in ("train", "validation", "test"))
    mixed, sources = _mixed(train, files, manifest.source_rows, recipe)
    return TaskRows(
        train=mixed,
        validation=validation,
        test=test,
        audit=manifest.audit,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        notes=manifest.notes,
        tokenizer=tokenizer,
        sources=sources,
        fingerprint=manifest.fingerprint if mixed is train else fingerprint(manifest.fingerprint, list(mixed.order)),
    )


def cache_key(recipe: Recipe, files: TaskFiles, base_folder: Path) -> str:
    """Name of the cached folder: equal exactly where the written bytes would be equal."""
    tokenizer_files = [path for name in TOKENIZER_FILES if (path := base_folder / name).is_file()]
    return fingerprint(
        FORMAT,
        sys.byteorder,
        [version(package) for package in ("tokenizers", "jinja2")],
        {path.name: _sha256(path) for path in tokenizer_files},
        template_source(recipe.data),
        [(str(path), _sha256(path)) for path in files.paths()],
        recipe.data.model_dump(mode="json", exclude={"cache_folder"}),
        recipe.run.seed,
        "slot_f1" in recipe.evaluation.metrics,
    )[:32]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Name a file that you may read.") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time looks at or writes ``folder``; processes that train together ask at the same time."""
    place = folder.with_name(f".{folder.name}.lock")
    with explained(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _kept(folder: Path) -> Manifest | None:
    """What an earlier call wrote; None where it did not, or the folder is damaged."""
    if not folder.is_dir():
        return None
    try:
        manifest = _MANIFEST.validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        logger.warning("%s: encoded rows without a readable %s, made anew (%s)", folder, MANIFEST, error)
        return None
    found = {name: digest for name, digest in sha256_of_files(folder).items() if name != MANIFEST}
    if found != manifest.files:
        logger.warning("%s: encoded rows that are damaged, made anew", folder)
        return None
    return manifest


def _encode(folder: Path, files: TaskFiles, recipe: Recipe, tokenizer: TextTokenizer) -> Manifest:
    with writing_folder(folder) as partial:
        encoded = encode_files(partial, files, recipe, tokenizer)
        sides = [StoredRows.open(partial, side) for side in ("train", "validation", "test")]
        manifest = Manifest(
            files=sha256_of_files(partial),
            audit=encoded.audit,
            notes=encoded.notes,
            source_rows=encoded.source_rows,
            fingerprint=fingerprint_of(sides),
        )
        (partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def _mixed(
    train: StoredRows, files: TaskFiles, sizes: tuple[int, ...], recipe: Recipe
) -> tuple[StoredRows, tuple[str, ...]]:
    """The training rows of an epoch, and a sentence about each of several sources."""
    sources = files.sides["train"]
    names = [each.place.name for each in sources]
    weights = [each.source.weight for each in sources if each.source.weight is not None]
    if len(sources) == 1:
        return train, ()
    if not weights:
        return train, tuple(f"{name}: {size:,} training rows" for name, size in zip(names, sizes, strict=True))
    empty = [name for name, size in zip(names, sizes, strict=True) if not size]
    if empty:
        raise DataError(f"data.train: no training row is left of {', '.join(empty)}, which has a weight. Remove it")
    order = mix(sizes, weights, when_used_up=recipe.data.when_used_up, seed=recipe.run.seed)
    return train.select(order), _shares(names, sizes, order)


def _shares(names: list[str], sizes: tuple[int, ...], order: Sequence[int]) -> tuple[str, ...]:
    """How often each source's rows stand in an epoch."""
    sentences, begin = [], 0
    for name, size in zip(names, sizes, strict=True):
        given = sum(begin <= row < begin + size for row in order)
        sentences.append(
            f"{name}: {given:,} of {len(order):,} rows of an epoch ({100 * given / len(order):.1f} %), from {size:,} "
            f"training rows, each {given / size:.2f} times"
        )
        begin += size
    return tuple(sentences)
