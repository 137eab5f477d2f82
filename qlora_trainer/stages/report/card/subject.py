"""What a model card is about: a file of a run, its base and its recipe."""

import re
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.recipe import Recipe
from qlora_trainer.records import ExportFigures, RunReport

ADAPTERS = ("peft_adapter", "gguf_adapter")
LICENCE_LINE = re.compile(r"^(license|license_name|license_link):\s*['\"]?([\w.:/+-]+)['\"]?\s*$", re.MULTILINE)
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class BaseFacts:
    """The base model, as far as a card may tell of it.

    Attributes:
        hub_name: ``owner/name``; None where the base is a local folder.
        label: what it is called in sentences: that name, or the folder's.
        licence: ``license``, ``license_name`` and ``license_link`` as the base's own card gives them; empty where the
            folder has no card, or one without a licence.
    """

    hub_name: str | None
    label: str
    licence: dict[str, str]


@dataclass(frozen=True)
class CardSubject:
    """One card's matter.

    Attributes:
        recipe: what was asked for.
        report: what came of it.
        base: the base model.
        export: the file set; None for the adapter that lies in the run's folder itself.
        place: what the loading commands name: ``owner/name`` on the hub, ``.`` beside the files.
    """

    recipe: Recipe
    report: RunReport
    base: BaseFacts
    export: ExportFigures | None
    place: str = "."

    @property
    def format(self) -> str:
        """Name of the format."""
        return "peft_adapter" if self.export is None else self.export.format

    @property
    def is_adapter(self) -> bool:
        """Whether the file needs a base beside it."""
        return self.format in ADAPTERS

    @property
    def stage(self) -> str:
        """The report's row that measured this."""
        return "adapter_unmerged" if self.export is None else f"export:{self.format}"


def base_facts(recipe: Recipe, folder: Path) -> BaseFacts:
    """Facts of the base model in ``folder``, read from its own README.md where it has one."""
    name = recipe.base_model.name
    return BaseFacts(name, name or folder.resolve().name, _licence(folder / "README.md"))


def _licence(card: Path) -> dict[str, str]:
    """The licence lines of a card's YAML head; plain names and addresses only, anything else is not repeated."""
    if not card.is_file():
        return {}
    head = FRONT_MATTER.search(card.read_text(encoding="utf-8", errors="replace"))
    return dict(LICENCE_LINE.findall(head[1])) if head else {}
