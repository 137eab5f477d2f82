"""A chat template that the recipe names, in place of the base model's own."""

from dataclasses import replace
from pathlib import Path

from qlora_trainer.errors import RecipeError, reason_of
from qlora_trainer.recipe import Data
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.runtime.atomic import writing_folder
from qlora_trainer.runtime.run_folder import fingerprint

TEMPLATE_FILE = "chat_template.jinja"


def template_source(data: Data) -> str | None:
    """Text of the template that the recipe names; None where it names none.

    Raises:
        RecipeError: the file is not there, or is no text in UTF-8.
    """
    if data.chat_template is None:
        return None
    path = Path(data.chat_template)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"data.chat_template: {path} cannot be read as a text in UTF-8: {reason_of(error)}. Name a file of a Jinja "
            "template; paths start at the folder in which the command is given. Without data.chat_template the base "
            "model's own is used."
        ) from error


def with_chat_template(base: BaseCheckpoint, data: Data) -> BaseCheckpoint:
    """The base with the recipe's chat template in place of its own, for everything that reads or copies its files.

    The folder holds links to the base's files and the template; it lies beside the encoded rows.

    Raises:
        RecipeError: the template cannot be read.
        RunFolderError: the folder cannot be written.
    """
    source = template_source(data)
    if source is None:
        return base
    others = sorted(path for path in base.folder.iterdir() if path.name != TEMPLATE_FILE)
    key = fingerprint([path.absolute() for path in others], source)[:32]
    folder = Path(data.cache_folder) / f"base-{key}"
    if (folder / TEMPLATE_FILE).is_file():
        return replace(base, folder=folder)
    with writing_folder(folder) as partial:
        for path in others:
            (partial / path.name).symlink_to(path.resolve())
        (partial / TEMPLATE_FILE).write_text(source, encoding="utf-8")
    return replace(base, folder=folder)
