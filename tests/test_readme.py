"""README.md cannot rot: its Python runs, its commands can be parsed, the files and settings that it names are there."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from qlora_trainer import recipe_file
from qlora_trainer.cli.app import make_app
from tests.listings import commands, python_listings, run_listing

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(commands(README)))


def parsed(arguments: list[str]) -> tuple[str, dict[str, object]]:
    """The verb and its arguments, as the program reads them; nothing is carried out."""
    group: Any = typer.main.get_command(make_app())
    params: dict[str, object] = group.commands[arguments[0]].make_context(arguments[0], arguments[1:]).params
    return arguments[0], params


def test_the_page_shows_how_to_begin() -> None:
    assert any(command.startswith("qlora-trainer check ") for command in COMMANDS)
    assert any(command.startswith("qlora-trainer run ") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_can_be_given(command: str) -> None:
    arguments = shlex.split(command)[1:]
    arguments = arguments[: arguments.index("|")] if "|" in arguments else arguments
    if not arguments or arguments == ["--version"]:
        return
    verb, params = parsed(arguments)
    if verb == "recipes" and params["what"] in ("show", "copy"):
        assert recipe_file.shipped_recipe(str(params["name"])).is_file()
    overrides = params.get("overrides")
    if isinstance(overrides, list | tuple) and overrides:
        recipe_file.load(REPOSITORY / "recipes" / "quickstart.yaml", [str(text) for text in overrides])
    named = [Path(part) for part in arguments if part.startswith("recipes/")]
    assert all((REPOSITORY / path).is_file() for path in named)


@pytest.mark.parametrize("code", python_listings(README))
def test_a_listing_of_the_page_runs(
    code: str, tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_listing(code, tmp_path, llama_folder, monkeypatch)


def test_commands_and_listings_are_found_however_they_stand_on_the_page() -> None:
    page = (
        "Say `qlora-trainer recipes` first.\n\n    qlora-trainer check mine.yaml   # a second\n\n"
        "```\nqlora-trainer run mine.yaml --set 'export.formats=[gguf_q8_0]'\n```\n```python\nprint(1)\n```\n"
    )
    assert commands(page) == [
        "qlora-trainer recipes",
        "qlora-trainer check mine.yaml",
        "qlora-trainer run mine.yaml --set 'export.formats=[gguf_q8_0]'",
    ]
    assert python_listings(page) == ["print(1)\n"]


def test_a_command_that_the_program_does_not_know_is_found() -> None:
    with pytest.raises(KeyError, match="chekc"):
        parsed(["chekc", "mine.yaml"])
    # typer's own copy of click has no public names.
    with pytest.raises(Exception, match="--sett"):
        parsed(["check", "mine.yaml", "--sett", "a=b"])
