"""``push``: a verified file of a finished run, with its card, to the Hugging Face hub."""

from typing import TYPE_CHECKING, Annotated

import typer

from qlora_trainer.cli.guard import guarded
from qlora_trainer.cli.run_path import RunPath, recipe_of
from qlora_trainer.cli.screen import make_console, size, write

if TYPE_CHECKING:
    from qlora_trainer.pipeline import Parcel

PUSH_SHORT_HELP = "Send a verified file with its model card to the Hugging Face hub."
PUSH_HELP = """Send a verified file of a finished run, with its model card, to the Hugging Face hub.

Without --yes nothing is sent: the files and their sizes are shown. The repository is made where it is missing, private
unless --public is given, and all files appear in one commit or none. A file that is not verified, or below the recipe's
bar, or changed since it was measured is refused. The login is that of `hf auth login`.

\b
Examples:
  qlora-trainer push runs/quickstart --format peft_adapter --to me/quickstart
  qlora-trainer push runs/quickstart --format gguf_q4_1 --to me/quickstart-gguf --yes --public"""


def push(
    run: RunPath,
    file_format: Annotated[str, typer.Option("--format", help="The export to send.", show_default=False)],
    to: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="The repository.", show_default=False)],
    *,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the recipe, as it was run."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Send it; without this, only show what would be sent.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Let everybody read the repository.")] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="OWNER/NAME", help="Name on the hub of a base that is a folder here."),
    ] = None,
    even_if_below_bar: Annotated[bool, typer.Option("--even-if-below-bar", help="Send it all the same.")] = False,
    even_if_unverified: Annotated[bool, typer.Option("--even-if-unverified", help="Send it all the same.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As for the run.")] = False,
) -> None:
    """Shows the parcel, and sends it with ``--yes``."""
    with guarded():
        recipe = recipe_of(run, overrides or [])
        from qlora_trainer import pipeline  # noqa: PLC0415

        asked = pipeline.Asked(
            format=file_format,
            to=to,
            public=public,
            base_on_hub=base,
            even_below_bar=even_if_below_bar,
            even_unverified=even_if_unverified,
        )
        parcel = pipeline.pack(recipe, asked, trust_remote_code=trust_remote_code)
        console = make_console()
        write(console, _shown(parcel))
        if not yes:
            write(console, "\nNothing was sent. Add --yes to send it.")
            return
        published = pipeline.push(parcel)
        write(console, f"\nSent: {published.url} (commit {published.commit[:8]})")
        for note in published.notes:
            write(console, f"note: {note}")


def _shown(parcel: "Parcel") -> str:
    """The parcel in lines."""
    readers = "public: everybody can read it" if parcel.asked.public else "private"
    head = f"{parcel.asked.format} -> {parcel.asked.to} ({readers}), {size(parcel.bytes)}"
    return "\n".join([head, *(f"  {name}" for name in sorted(parcel.files))])
