"""Shows what ``check`` found."""

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from qlora_trainer.cli.screen import has_colour, heading, printable, size, write
from qlora_trainer.preflight import Budget, Preflight


def show_preflight(console: Console, found: Preflight, *, recipe_text: str) -> None:
    """Prints everything but the problems: recipe, memory, disk, plan, audit, example, notes."""
    heading(console, "Recipe, defaults included")
    write(console, _indented(recipe_text))
    for budget in (*found.memory, *([] if found.disk is None else [found.disk])):
        _show_budget(console, budget)
    if found.plan:
        heading(console, "Plan")
        width = max(len(stage.name) for stage in found.plan)
        write(console, "\n".join(f"  {stage.name:<{width}}  {stage.text}" for stage in found.plan))
    if found.audit:
        heading(console, "What the label masks train")
        _show_list(console, found.audit)
    if found.example:
        _show_example(console, found.example)
    if found.notes:
        heading(console, "Notes")
        _show_list(console, found.notes)


def _show_budget(console: Console, budget: Budget) -> None:
    heading(console, f"Prediction: {budget.purpose}, {budget.place}")
    lines = [*budget.needed.items.items(), ("in all", budget.needed.total), ("free", budget.free_bytes)]
    width = max(len(name) for name, _ in lines)
    write(console, "\n".join(f"  {name:<{width}}  {size(count):>12}" for name, count in lines))


def _show_list(console: Console, sentences: Iterable[str]) -> None:
    write(console, "\n".join(f"  - {sentence}" for sentence in sentences))


def _show_example(console: Console, pieces: Iterable[tuple[str, bool]]) -> None:
    """The example with its trained pieces in colour, or in double brackets where there is no colour."""
    coloured = has_colour(console)
    heading(console, f"The first training row; trained: {'in green' if coloured else '[[between brackets]]'}")
    text = Text()
    for piece, is_trained in pieces:
        shown = printable(piece)
        if coloured:
            text.append(shown, style="bold green" if is_trained else "dim")
        else:
            text.append(f"[[{shown}]]" if is_trained else shown)
    console.print(text, soft_wrap=True)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
