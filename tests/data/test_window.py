from typing import Literal

import pytest

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.data.window import fit_window
from qlora_trainer.errors import DataError
from tests.models import BOS_ID

ROW = EncodedRow((BOS_ID, 5, 6, 7, 8, 9), (*[IGNORE_INDEX] * 4, 8, 9), (BOS_ID, 5, 6, 7), "prompt", "completion")


def fitted(
    row: EncodedRow,
    window: int,
    overlong: Literal["drop", "truncate_prompt"] = "drop",
    bos_id: int | None = BOS_ID,
) -> EncodedRow | None:
    kept = fit_window([row], window=window, overlong=overlong, bos_id=bos_id, places=["a.jsonl:1"])[0]
    return kept[0] if kept else None


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt"])
def test_a_row_as_long_as_the_window_stays_as_it_is(overlong: Literal["drop", "truncate_prompt"]) -> None:
    assert fitted(ROW, 6, overlong) is ROW


def test_a_longer_row_is_dropped() -> None:
    assert fitted(ROW, 5) is None


def test_a_cut_row_loses_the_beginning_of_its_prompt_but_bos() -> None:
    expected = EncodedRow((BOS_ID, 7, 8, 9), (*[IGNORE_INDEX] * 2, 8, 9), (BOS_ID, 7), "prompt", "completion")
    assert fitted(ROW, 4, "truncate_prompt") == expected


def test_a_cut_row_without_bos_loses_its_first_tokens() -> None:
    cut = fitted(ROW, 4, "truncate_prompt", bos_id=None)
    assert cut is not None
    assert (cut.token_ids, cut.prompt_ids) == ((6, 7, 8, 9), (6, 7))


def test_a_row_whose_completion_fills_the_window_is_dropped_rather_than_cut() -> None:
    assert fitted(ROW, 3, "truncate_prompt") is None
    assert fitted(ROW, 3, "truncate_prompt", bos_id=None) is not None
    assert fitted(ROW, 2, "truncate_prompt", bos_id=None) is None


def test_refused_rows_are_told_with_their_lengths() -> None:
    with pytest.raises(DataError, match=r"refuse: 2 problems\n  a:1: 6 tokens, the window is 5\n  a:3: 6 tokens"):
        fit_window([ROW, ROW], window=5, overlong="refuse", bos_id=None, places=["a:1", "a:3"])
    assert fit_window([ROW], window=6, overlong="refuse", bos_id=None, places=["a:1"]) == [(ROW,)]


@pytest.mark.parametrize("window", [2, 3, 4, 5, 9, 10])
def test_the_pieces_of_a_document_train_each_token_but_the_first_once(window: int) -> None:
    document = EncodedRow(tuple(range(10)), (IGNORE_INDEX, *range(1, 10)), (0,), "", "text")
    pieces = fit_window([document], window=window, overlong="split", bos_id=0, places=[""])[0]
    assert all(2 <= len(piece.token_ids) <= window and piece.labels[0] == IGNORE_INDEX for piece in pieces)
    assert [label for piece in pieces for label in piece.labels if label != IGNORE_INDEX] == list(range(1, 10))
    for piece in pieces:
        trained = zip(piece.labels[1:], piece.token_ids[1:], strict=True)
        assert all(label == token for label, token in trained)
    joined = [*pieces[0].token_ids, *(token for piece in pieces[1:] for token in piece.token_ids[1:])]
    assert joined == list(range(10))
