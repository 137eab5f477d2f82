import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional

from qlora_trainer.data.batches import (
    BatchPlan,
    collate,
    collate_packed,
    epoch_order,
    evaluation_batches,
    pack_best_fit,
    training_micro_batches,
)
from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow

PLAN = BatchPlan(micro_batch_size=2, gradient_accumulation_steps=3, seed=5)
LENGTHS = [7, 3, 9, 1, 5, 8, 2, 4, 6, 10]


def step_rows(step: int, lengths: list[int] = LENGTHS, plan: BatchPlan = PLAN) -> list[int]:
    return [row for micro_batch in training_micro_batches(step, lengths, plan) for row in micro_batch]


def test_ignore_index_is_the_one_that_torch_ignores_by_default() -> None:
    assert inspect.signature(functional.cross_entropy).parameters["ignore_index"].default == IGNORE_INDEX


def test_a_batch_holds_its_rows_and_pads_them_on_the_right() -> None:
    rows = [
        EncodedRow((1, 2, 3), (IGNORE_INDEX, 2, 3), (1,), "", ""),
        EncodedRow((4,), (IGNORE_INDEX,), (4,), "", ""),
        EncodedRow((5, 6), (IGNORE_INDEX, 6), (5,), "", ""),
    ]
    batch = collate(rows, [2, 0], 9)
    assert torch.equal(batch.token_ids, torch.tensor([[5, 6, 9], [1, 2, 3]]))
    assert torch.equal(batch.labels, torch.tensor([[IGNORE_INDEX, 6, IGNORE_INDEX], [IGNORE_INDEX, 2, 3]]))
    assert (batch.token_ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert batch.row_indexes == (2, 0)
    assert collate(rows, [1], 9).token_ids.shape == (1, 1)


def test_an_epoch_holds_every_row_once() -> None:
    assert sorted(epoch_order(100, 0, 0)) == list(range(100))


def test_an_order_follows_from_seed_and_epoch_alone() -> None:
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert orders[0] == epoch_order(100, 0, 0)
    assert len({tuple(order) for order in orders}) == 4


def test_an_order_is_the_same_on_every_machine() -> None:
    # Recorded with Python 3.11.7; another value here means that a resumed run would see other rows.
    # Regenerate: python -c "from qlora_trainer.data.batches import epoch_order; print(epoch_order(8, 0, 0))"
    assert epoch_order(8, 0, 0) == [0, 2, 1, 4, 6, 7, 3, 5]


def test_changing_a_returned_order_changes_no_later_one() -> None:
    epoch_order(10, 0, 0).clear()
    assert len(epoch_order(10, 0, 0)) == 10


def test_steps_cut_the_epochs_one_behind_the_other() -> None:
    epochs = [row for epoch in range(4) for row in epoch_order(len(LENGTHS), PLAN.seed, epoch)]
    for step in range(6):
        assert sorted(step_rows(step)) == sorted(epochs[step * 6 : (step + 1) * 6])


def test_every_row_is_seen_equally_often_where_steps_and_epochs_end_together() -> None:
    # Five steps of six rows are three epochs of ten.
    assert set(Counter(row for step in range(5) for row in step_rows(step)).values()) == {3}


def test_every_step_has_the_same_number_of_rows_even_if_the_data_is_smaller() -> None:
    assert Counter(step_rows(0, [3, 4])) == {0: 3, 1: 3}


def test_a_step_needs_no_step_before_it() -> None:
    in_order = [training_micro_batches(step, LENGTHS, PLAN) for step in range(20)]
    assert training_micro_batches(17, LENGTHS, PLAN) == in_order[17]
    assert [training_micro_batches(step, LENGTHS, PLAN) for step in range(20)] == in_order


def test_micro_batches_have_their_size_and_the_longest_rows_come_first() -> None:
    micro_batches = training_micro_batches(0, LENGTHS, PLAN)
    assert [len(micro_batch) for micro_batch in micro_batches] == [2, 2, 2]
    lengths = [LENGTHS[row] for micro_batch in micro_batches for row in micro_batch]
    assert lengths == sorted(lengths, reverse=True)


def test_another_cut_of_the_same_batch_size_has_the_same_rows() -> None:
    other = BatchPlan(micro_batch_size=6, gradient_accumulation_steps=1, seed=5)
    assert other.batch_size == PLAN.batch_size == 6
    assert step_rows(3) == step_rows(3, plan=other)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 50])
def test_evaluation_sees_every_row_once_longest_first(batch_size: int) -> None:
    batches = evaluation_batches(LENGTHS, batch_size)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(10))
    assert [LENGTHS[row] for row in rows] == sorted(LENGTHS, reverse=True)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}


def test_rows_of_equal_length_keep_their_order() -> None:
    assert evaluation_batches([4, 4, 4], 2) == [[0, 1], [2]]


def test_packed_rows_stand_one_behind_the_other_and_nothing_predicts_their_first_tokens() -> None:
    rows = [EncodedRow((1, 2, 3), (1, 2, 3), (), "", ""), EncodedRow((5, 6), (IGNORE_INDEX, 6), (5,), "", "")]
    batch = collate_packed(rows, [1, 0])
    assert torch.equal(batch.token_ids, torch.tensor([[5, 6, 1, 2, 3]]))
    assert torch.equal(batch.labels, torch.tensor([[IGNORE_INDEX, 6, IGNORE_INDEX, 2, 3]]))
    assert (batch.boundaries, batch.row_indexes) == ((0, 2, 5), (1, 0))
    assert batch.label_tokens == collate(rows, [1, 0], 9).label_tokens == 3


def test_each_row_goes_where_it_leaves_the_least_room() -> None:
    # 9 opens a pack, 8 another; 2 fits into both and goes to 8's, where nothing is left; 1 goes to 9's.
    assert pack_best_fit([0, 1, 2, 3], [9, 8, 2, 1], capacity=10) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
def test_packs_hold_every_row_of_the_step_in_no_more_micro_batches_than_rows_side_by_side(
    micro_batch_size: int,
) -> None:
    plan = BatchPlan(micro_batch_size, 6 // micro_batch_size, seed=5, longest_row=max(LENGTHS))
    padded = BatchPlan(micro_batch_size, 6 // micro_batch_size, seed=5)
    for step in range(40):
        packs = training_micro_batches(step, LENGTHS, plan)
        assert sorted(row for pack in packs for row in pack) == sorted(step_rows(step, plan=padded))
        assert all(sum(LENGTHS[row] for row in pack) <= micro_batch_size * max(LENGTHS) for pack in packs)
        assert len(packs) <= plan.gradient_accumulation_steps


class _Counted(list[int]):
    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        raise AssertionError("all lengths are gone through")


@pytest.mark.parametrize("longest_row", [10, None])
def test_what_a_step_costs_does_not_grow_with_the_number_of_rows(longest_row: int | None) -> None:
    plan = BatchPlan(micro_batch_size=2, gradient_accumulation_steps=3, seed=5, longest_row=longest_row)
    few, many = _Counted(LENGTHS), _Counted(LENGTHS * 100)
    for lengths in (few, many):
        training_micro_batches(0, lengths, plan)
    assert max(few.reads, many.reads) <= 5 * plan.batch_size


@pytest.mark.parametrize("longest_row", [10, None])
def test_processes_share_a_step_without_a_row_twice(longest_row: int | None) -> None:
    plan = BatchPlan(micro_batch_size=2, gradient_accumulation_steps=3, seed=5, longest_row=longest_row)
    shares = [training_micro_batches(4, LENGTHS, plan, share=(number, 2)) for number in range(2)]
    rows = [row for share in shares for micro_batch in share for row in micro_batch]
    assert sorted(rows) == sorted(step_rows(4))
    assert all(len(share) == 2 for share in shares if longest_row is None)
