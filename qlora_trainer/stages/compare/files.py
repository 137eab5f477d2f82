"""The comparison as files: JSON for programs and to be shown again, Markdown and one HTML page for people."""

import json
import math
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from qlora_trainer.errors import RunFolderError
from qlora_trainer.pages.render_html import render_html
from qlora_trainer.pages.render_markdown import render_markdown
from qlora_trainer.pages.visible import writable
from qlora_trainer.records import Comparison
from qlora_trainer.runtime.atomic import write_text
from qlora_trainer.stages.compare.page import lay_out

JSON_FILE = "compare.json"
MARKDOWN_FILE = "compare.md"
HTML_FILE = "compare.html"
_COMPARISON = TypeAdapter(Comparison)


def write(comparison: Comparison, folder: Path) -> None:
    """Writes ``compare.json``, ``compare.md`` and ``compare.html`` into a folder, each whole or not at all.

    Raises:
        RunFolderError: a file cannot be written.
    """
    plain = to_jsonable_python(comparison, inf_nan_mode="null")
    write_text(folder / JSON_FILE, writable(json.dumps(plain, indent=2, ensure_ascii=False)) + "\n")
    write_pages(comparison, folder)


def write_pages(comparison: Comparison, folder: Path) -> None:
    """Writes ``compare.md`` and ``compare.html`` alone.

    Raises:
        RunFolderError: a file cannot be written.
    """
    page = lay_out(comparison)
    write_text(folder / MARKDOWN_FILE, writable(render_markdown(page)))
    write_text(folder / HTML_FILE, writable(render_html(page)))


def read(path: Path) -> Comparison:
    """A comparison as it was kept in a JSON file, whatever else that file holds.

    JSON has no infinity: an outlier's ``spread`` that is null was infinite.

    Raises:
        RunFolderError: the file cannot be read, or is no comparison; tells every field that is wrong.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        for layer in plain["outliers"]:
            layer["spread"] = math.inf if layer["spread"] is None else layer["spread"]
        return _COMPARISON.validate_json(json.dumps(plain))
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        wrong = "".join(f"\n  {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise RunFolderError(f"{path}: no comparison of methods as `compare` writes it:{wrong}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path}: no comparison of methods as `compare` writes it: {error}") from error
