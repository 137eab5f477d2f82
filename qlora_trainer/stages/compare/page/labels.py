"""Names beside the marks of a chart, placed so that none stands on another or on a mark."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_trainer.pages.svg import Point

LETTER, LINE = 7.7, 15.0
"""Width of a letter and height of a line, in pixels. Measured in Chromium, 12.5 px DejaVu Sans, which is wide: names of
methods take 6.1 to 7.7 a letter."""
GAP = 11.0
"""From the mark's centre to its name."""
REACH = 9
"""Lines that a name may stand away from its mark."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Label:
    """A name, and the mark that it belongs to."""

    text: str
    anchor: Point


@dataclass(frozen=True)
class Placed:
    """A name where it stands.

    Attributes:
        text: the name.
        anchor: centre of its mark.
        start: where the text begins, at half of its height.
        width: of the text.
    """

    text: str
    anchor: Point
    start: Point
    width: float

    @property
    def is_far(self) -> bool:
        """Whether it needs a line to its mark."""
        return abs(self.start[1] - self.anchor[1]) > LINE / 2

    @property
    def near_end(self) -> Point:
        """The end of the text that is next to the mark."""
        x, y = self.start
        return (x - 2, y) if x > self.anchor[0] else (x + self.width + 2, y)

    @property
    def box(self) -> Box:
        """What it covers."""
        x, y = self.start
        return (x, y - LINE / 2, x + self.width, y + LINE / 2)


def place_labels(labels: Sequence[Label], *, within: tuple[Point, Point]) -> list[Placed]:
    """Each name at the first free place: right of its mark or left of it, then line by line further off.

    Where no place is free a name stands right of its mark all the same: the table has it too.

    Args:
        labels: in the order in which they choose.
        within: upper left and lower right corner of what they may cover.
    """
    marks = [_around(label.anchor) for label in labels]
    (left, top), (right, bottom) = within
    placed: list[Placed] = []
    for label in labels:
        taken = [*marks, *(other.box for other in placed)]
        places = list(_places(label))
        free = (
            place
            for place in places
            if place.box[0] >= left and place.box[2] <= right and place.box[1] >= top and place.box[3] <= bottom
            if not any(_meet(place.box, box) for box in taken)
        )
        placed.append(next(free, places[0]))
    return placed


def _places(label: Label) -> Iterator[Placed]:
    (x, y), width = label.anchor, LETTER * len(label.text)
    for line in range(REACH):
        for down in (line, -line) if line else (0,):
            # Further off a name also stands further to the side, so that its line does not cross other marks.
            away = GAP + 3.0 * line
            for start in (x + away, x - away - width):
                yield Placed(label.text, label.anchor, (start, y + down * LINE), width)


def _around(mark: Point) -> Box:
    x, y = mark
    return (x - 5, y - 5, x + 5, y + 5)


def _meet(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
