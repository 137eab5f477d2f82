"""Arguments and options that several verbs have."""

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Change a setting of the recipe; may be repeated.",
        default_factory=list,
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model. Read it first.")
]

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and warnings, and where the report lies; nothing else.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object a line, for programs; `events` lists what they hold.")
]
