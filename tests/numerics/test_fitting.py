"""The largest micro-batch and window that fit by prediction."""

from dataclasses import replace

import pytest

from qlora_trainer.numerics.fitting import full_rows, largest, rooms
from qlora_trainer.numerics.footprint import training_memory
from qlora_trainer.numerics.training_load import POLICIES, TrainingLoad
from tests.numerics.shapes import LLAMA_65B


@pytest.mark.parametrize("bound", [0, 1, 2, 3, 7, 8, 1000])
def test_the_largest_is_found_and_none_is_zero(bound: int) -> None:
    assert largest(lambda number: number <= bound) == bound


def test_what_fits_fits_and_one_more_does_not() -> None:
    load, free = TrainingLoad(rank=64, device="cuda"), 60 * 10**9
    for room in rooms(LLAMA_65B, load, free, rows=1, window=512):
        under = replace(load, checkpointing=room.checkpointing)
        rows, window = room.largest_micro_batch, room.longest_window
        assert training_memory(LLAMA_65B, full_rows(under, rows, 512)).total <= free
        assert training_memory(LLAMA_65B, full_rows(under, rows + 1, 512)).total > free
        assert training_memory(LLAMA_65B, full_rows(under, 1, window)).total <= free
        assert training_memory(LLAMA_65B, full_rows(under, 1, window + 1)).total > free


def test_more_is_computed_again_more_fits() -> None:
    found = rooms(LLAMA_65B, TrainingLoad(rank=64, device="cuda"), 60 * 10**9, rows=1, window=512)
    assert [room.checkpointing for room in found] == list(POLICIES)
    assert found[0].largest_micro_batch < found[1].largest_micro_batch < found[2].largest_micro_batch


def test_where_the_weights_do_not_fit_nothing_does() -> None:
    found = rooms(LLAMA_65B, TrainingLoad(device="cuda"), 24 * 10**9, rows=1, window=512)
    assert {(room.largest_micro_batch, room.longest_window) for room in found} == {(0, 0)}
