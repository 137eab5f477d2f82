"""Problems of many rows as one message: how many there are, and the first ten of them."""

from collections.abc import Sequence
from pathlib import Path

from qlora_trainer.errors import DataError

SHOWN_PROBLEMS = 10


class Problems:
    """Counts problems and keeps the first ten; there may be one for each of millions of rows."""

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[str] = []

    def add(self, problem: str) -> None:
        """One more problem, in a sentence without a full stop."""
        self.count += 1
        if len(self.shown) < SHOWN_PROBLEMS:
            self.shown.append(problem)

    def text(self, place: Path | str) -> str:
        """One message: the file or the work at hand, how many problems there are, and the first ten of them."""
        count = "1 problem" if self.count == 1 else f"{self.count} problems"
        hidden = self.count - len(self.shown)
        more = [f"  and {hidden} more"] if hidden else []
        return "\n".join([f"{place}: {count}", *(f"  {problem}" for problem in self.shown), *more])

    def refuse(self, place: Path | str) -> None:
        """Nothing where there is no problem.

        Raises:
            DataError: with ``text``.
        """
        if self.count:
            raise DataError(self.text(place))


def listed_problems(place: Path | str, problems: Sequence[str]) -> str:
    """``Problems.text`` of problems that are all at hand."""
    found = Problems()
    for problem in problems:
        found.add(problem)
    return found.text(place)


def json_kind(value: object) -> str:
    """What a JSON value is, in words, with an article; other values by their type's name."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return "a text"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return f"of type {type(value).__name__}"


def shortened(text: str, limit: int = 60) -> str:
    """The text's beginning, for a message."""
    stripped = text.strip()
    return stripped if len(stripped) <= limit else f"{stripped[:limit]}..."
