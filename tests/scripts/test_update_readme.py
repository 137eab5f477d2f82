"""README.md shows what scripts/results holds, and names nothing that is not there."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_readme", REPOSITORY / "scripts" / "update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_results() -> None:
    assert script().updated(README) == README


def test_every_file_that_the_readme_names_is_there() -> None:
    named = re.findall(r"`((?:recipes|tests|scripts)/[\w./-]+)`|\]\(([\w./-]+)\)", README)
    paths = {first or second for first, second in named} - {"scripts/results"}
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (REPOSITORY / path).exists()] == []


def test_the_two_commands_come_first() -> None:
    commands = [line.split()[0] for line in README.splitlines() if line.startswith("    scripts/")]
    assert commands[:2] == ["scripts/quickstart", "scripts/check"]
