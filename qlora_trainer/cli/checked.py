"""Shows what ``check`` found."""

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from qlora_trainer.cli.screen import has_colour, heading, printable, size, write
from qlora_trainer.errors import RecipeError
from qlora_trainer.preflight import Budget, Preflight
from qlora_trainer.recipe import bytes_of


def planned_bytes(text: str | None) -> int | None:
    """What ``--memory`` says, in bytes.

    Raises:
        RecipeError: it is no amount of memory.
    """
    try:
        return None if text is None else bytes_of(text)
    except ValueError as error:
        raise RecipeError(f"--memory {error}") from error


def show_preflight(console: Console, found: Preflight, *, recipe_text: str) -> None:
    """Prints everything but the problems: recipe, memory, disk, plan, audit, example, notes."""
    heading(console, "Recipe, defaults included")
    write(console, _indented(recipe_text))
    for budget in found.memory:
        _show_budget(console, budget)
        if budget.purpose == "training":
            _show_rooms(console, found)
    if found.disk is not None:
        _show_budget(console, found.disk)
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
    """Item, bytes, and share of the whole."""
    heading(console, f"Prediction: {budget.purpose}, {budget.place}")
    total = budget.needed.total
    shown = [(name, count, f"{count / total:>7.1%}") for name, count in budget.needed.items.items() if count]
    lines = [*shown, ("in all", total, ""), ("free", budget.free_bytes, "")]
    width = max(len(name) for name, _, _ in lines)
    write(console, "\n".join(f"  {name:<{width}}  {size(count):>12} {share}".rstrip() for name, count, share in lines))


def _show_rooms(console: Console, found: Preflight) -> None:
    """What else would fit: one line for each checkpointing policy."""
    if found.cut is None:
        return
    rows = found.cut.micro_batch_size
    heading(console, "What fits into that memory, by training.checkpointing")
    heads = ("", "predicted peak", "largest micro-batch", f"longest window for {rows} at a time")
    write(console, f"  {heads[0]:<12}{heads[1]:>16}{heads[2]:>21}{heads[3]:>{len(heads[3]) + 2}}")
    for room in found.rooms:
        mark = "  <- this recipe" if room.checkpointing == found.cut.checkpointing else ""
        largest = f"{room.largest_micro_batch:,} rows" if room.largest_micro_batch else "none"
        longest = f"{room.longest_window:,} tokens" if room.longest_window else "none"
        write(
            console,
            f"  {room.checkpointing:<12}{size(room.needed_bytes):>16}{largest:>21}{longest:>{len(heads[3]) + 2}}{mark}",
        )


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
