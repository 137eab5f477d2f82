"""``chat``, ``generate`` and ``serve``: a finished run put to use.

``prompts`` reads what is asked, ``speaking`` shows answers while they are written.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from qlora_trainer.cli.guard import guarded
from qlora_trainer.cli.run_path import RunPath, recipe_of
from qlora_trainer.cli.screen import heading, make_console, tell_error, write
from qlora_trainer.errors import DataError

if TYPE_CHECKING:
    from qlora_trainer.cli.speaking import Speakers
    from qlora_trainer.pipeline import Sampling

LEAVING = ("/quit", "/exit", "/bye")
"""What other chats are left with."""

CHAT_HELP = """Talk to a model of a finished run; answers come word by word.

RUN is the run's folder or its recipe. Without --at the file answers that the report recommends. Answers are the most
likely ones, the same each time, unless --temperature says otherwise. An empty line, /quit or Ctrl-D ends, /new forgets.

\b
Examples:
  qlora-trainer chat runs/quickstart
  qlora-trainer chat runs/quickstart --at trained --compare base
  qlora-trainer chat runs/quickstart --at gguf_q4_1 --temperature 0.7"""

GENERATE_HELP = """Answer prompts with a model of a finished run: from --prompt, a file, or standard input.

A file of --prompts ending in .jsonl has a "prompt" or "messages" in each row; of any other file, as of standard input,
each line is a prompt. --json writes one object a line: the prompt, and the answer of each model.

\b
Examples:
  qlora-trainer generate runs/quickstart --prompt "Book a table for two at seven"
  qlora-trainer generate runs/quickstart --prompts test.jsonl --compare base --json > answers.jsonl"""

SERVE_HELP = """Print the exact commands that serve a model of a finished run; starts nothing.

\b
Examples:
  qlora-trainer serve runs/quickstart
  qlora-trainer serve runs/quickstart --at peft_adapter"""

At = Annotated[
    str | None,
    typer.Option("--at", metavar="MODEL", help="base, quantized, trained, merged, or the name of an export."),
]
Compare = Annotated[
    str | None, typer.Option("--compare", metavar="MODEL", help="A second model that answers too, side by side.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 = the most likely token, always.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many most likely tokens; 0 = all.")]
TopP = Annotated[float, typer.Option("--top-p", min=1e-6, max=1.0, help="Draw from this much probability.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the draws; the same seed, the same text.")]
System = Annotated[str | None, typer.Option("--system", help="A system message that stands first.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model. Read it first.")
]


def add_talk_verbs(app: typer.Typer) -> None:
    """Adds the three commands to the application."""
    app.command("chat", help=CHAT_HELP, short_help="Talk to a model of a finished run.")(_chat)
    app.command("generate", help=GENERATE_HELP, short_help="Answer prompts with a model of a run.")(_generate)
    app.command("serve", help=SERVE_HELP, short_help="Print the commands that serve a model of a run.")(_serve)


def _chat(
    run: RunPath,
    *,
    at: At = None,
    compare: Compare = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
) -> None:
    with guarded():
        console = make_console()
        speakers, sampling = _opened(run, (at, compare), (temperature, top_k, top_p, seed), trust=trust_remote_code)
        write(
            console, f"{' and '.join(speakers.names)} of {run}. An empty line or /quit ends, /new forgets.", style="dim"
        )
        _converse(console, speakers, sampling, system=system, max_new_tokens=max_new_tokens)


def _generate(
    run: RunPath,
    *,
    at: At = None,
    compare: Compare = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="A file of prompts.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
) -> None:
    from qlora_trainer.cli.prompts import gathered, with_system  # noqa: PLC0415

    with guarded():
        asked = [with_system(messages, system) for messages in gathered(prompt or [], prompts)]
        speakers, sampling = _opened(run, (at, compare), (temperature, top_k, top_p, seed), trust=trust_remote_code)
        console = make_console()
        for messages in asked:
            if as_json:
                speakers.tell_json(console, messages, sampling, max_new_tokens=max_new_tokens)
            else:
                speakers.tell(console, messages, sampling, max_new_tokens=max_new_tokens)


def _serve(run: RunPath, *, at: At = None) -> None:
    from qlora_trainer.runtime.run_folder import RunFolder  # noqa: PLC0415
    from qlora_trainer.serving import models_of, serve_commands  # noqa: PLC0415

    with guarded():
        console = make_console()
        recipe = recipe_of(run)
        folder = RunFolder(Path(recipe.run.folder) / recipe.run.name)
        models = models_of(folder, recipe)
        name = models.named(at)
        write(
            console,
            f"{name} of {folder.root}; other models: {', '.join(each for each in models.names if each != name)}",
        )
        for found in serve_commands(recipe, folder, name):
            heading(console, found.server)
            write(console, "\n".join((f"  {found.command}", *(f"  ({note})" for note in found.notes))))


def _opened(
    run: Path, names: tuple[str | None, str | None], drawing: tuple[float, int, float, int], *, trust: bool
) -> tuple["Speakers", "Sampling"]:
    """The models that answer, and how they choose their words."""
    recipe = recipe_of(run)
    # Here, after the recipe was found good: torch and its libraries take seconds.
    from qlora_trainer import pipeline  # noqa: PLC0415
    from qlora_trainer.cli.speaking import Speakers  # noqa: PLC0415

    temperature, top_k, top_p, seed = drawing
    at, compare = names
    wanted = [at] if compare is None else [at, compare]
    voices = [pipeline.talk(recipe, name, trust_remote_code=trust) for name in wanted]
    sampling = pipeline.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return Speakers(voices), sampling


def _converse(
    console: Console, speakers: "Speakers", sampling: "Sampling", *, system: str | None, max_new_tokens: int
) -> None:
    """Asks and answers until an empty line, a word of ``LEAVING`` or the end of the input."""
    from qlora_trainer.cli.prompts import with_system  # noqa: PLC0415

    ask = _asker(console)
    histories: list[list[dict[str, str]]] = [[] for _ in speakers.names]
    while (said := ask()) is not None and said not in LEAVING:
        if said == "/new":
            histories = [[] for _ in speakers.names]
            continue
        going = [[*history, {"role": "user", "content": said}] for history in histories]
        asked = [with_system(history, system) for history in going]
        try:
            answers = speakers.tell_each(console, asked, sampling, max_new_tokens=max_new_tokens)
        except DataError as error:
            if not sys.stdin.isatty():
                raise
            # What could not be answered was not said; the conversation is still there.
            tell_error(f"{error} (/new)")
            continue
        histories = [
            [*history, {"role": "assistant", "content": answer}] for history, answer in zip(going, answers, strict=True)
        ]


def _asker(console: Console) -> Callable[[], str | None]:
    """What gives the next line of the reader's, None at the end; without a terminal no prompt sign is shown."""

    def ask() -> str | None:
        try:
            line = console.input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return None
        return line.strip() or None

    return ask
