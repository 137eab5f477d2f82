"""Encoded rows that are no longer than the window: dropped, cut or split where they are."""

from collections.abc import Sequence
from typing import Literal

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.data.problems import Problems

Overlong = Literal["drop", "truncate_prompt", "split", "refuse"]
REFUSING = "data.overlong: refuse"


def fit_row(
    row: EncodedRow, *, window: int, overlong: Overlong, bos_id: int | None, place: str, problems: Problems
) -> tuple[EncodedRow, ...]:
    """What becomes of a row: itself where it fits, else nothing, a shorter row or several.

    ``truncate_prompt`` takes tokens away from the beginning of a row (behind bos), but never the whole prompt: a row
    whose completion alone fills the window is dropped. ``split`` cuts a plain text into pieces that overlap by one
    token, which is trained in the first and read in the second, so that each token but the first is trained once.

    Args:
        row: an encoded row.
        window: longest row in tokens.
        overlong: what to do with a longer one.
        bos_id: a leading token that stays where it is.
        place: file and line of the row, for messages.
        problems: gets one more where the row is longer and ``overlong`` is ``refuse``.
    """
    if len(row.token_ids) <= window:
        return (row,)
    match overlong:
        case "refuse":
            problems.add(f"{place}: {len(row.token_ids)} tokens, the window is {window}")
            return ()
        case "truncate_prompt":
            return _cut(row, window, bos_id)
        case "split":
            return _pieces(row, window)
        case "drop":
            return ()


def _cut(row: EncodedRow, window: int, bos_id: int | None) -> tuple[EncodedRow, ...]:
    excess = len(row.token_ids) - window
    kept = 1 if row.token_ids[0] == bos_id else 0
    if kept + excess >= len(row.prompt_ids):
        return ()

    def shorter(ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids[:kept] + ids[kept + excess :]

    return (
        EncodedRow(
            token_ids=shorter(row.token_ids),
            labels=shorter(row.labels),
            prompt_ids=shorter(row.prompt_ids),
            prompt=row.prompt,
            completion=row.completion,
            place=row.place,
        ),
    )


def _pieces(row: EncodedRow, window: int) -> tuple[EncodedRow, ...]:
    step = max(1, window - 1)
    return tuple(
        EncodedRow(
            token_ids=row.token_ids[begin : begin + window],
            labels=(IGNORE_INDEX, *row.labels[begin + 1 : begin + window]),
            prompt_ids=row.prompt_ids if begin == 0 else (),
            prompt="",
            completion=row.completion if begin == 0 else "",
            place=row.place,
        )
        for begin in range(0, len(row.token_ids) - 1, step)
    )


def fit_window(
    rows: Sequence[EncodedRow], *, window: int, overlong: Overlong, bos_id: int | None, places: Sequence[str]
) -> list[tuple[EncodedRow, ...]]:
    """``fit_row`` of each row.

    Raises:
        DataError: ``refuse``, and some rows are longer; names all of them with their lengths.
    """
    problems = Problems()
    fitted = [
        fit_row(row, window=window, overlong=overlong, bos_id=bos_id, place=place, problems=problems)
        for row, place in zip(rows, places, strict=True)
    ]
    problems.refuse(REFUSING)
    return fitted
