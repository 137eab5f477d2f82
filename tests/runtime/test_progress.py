from dataclasses import dataclass, field

import pytest

from qlora_trainer.runtime.progress import Silent, WorkProgress, counted, watched_by, working


@dataclass
class Listening(Silent):
    heard: list[WorkProgress] = field(default_factory=list)

    def work(self, progress: WorkProgress) -> None:
        self.heard.append(progress)

    def counts(self) -> list[tuple[int, int | None]]:
        return [(progress.done, progress.total) for progress in self.heard]


def test_every_item_is_counted_once_it_was_worked_off() -> None:
    observer = Listening()
    with watched_by(observer):
        items = counted("abc", "spelling", unit="letters", total=3)
        assert next(items) == "a"
        assert observer.counts() == [(0, 3)]
        assert list(items) == ["b", "c"]
    assert observer.counts() == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert {(progress.what, progress.unit) for progress in observer.heard} == {("spelling", "letters")}


def test_an_item_can_stand_for_many_units() -> None:
    observer = Listening()
    with watched_by(observer):
        assert list(counted([[1, 2], [3]], "scoring", unit="rows", total=3, size=len)) == [[1, 2], [3]]
    assert observer.counts() == [(0, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("total", [None, 2, 9])
def test_a_total_that_was_not_known_or_was_wrong_ends_at_what_was_done(total: int | None) -> None:
    observer = Listening()
    with watched_by(observer):
        list(counted(range(4), "reading", unit="tensors", total=total))
    assert observer.counts()[-1] == (4, 4)
    assert all(done < total for done, total in observer.counts()[:-1] if total is not None)


def test_a_loop_that_is_left_by_an_error_is_told_as_finished() -> None:
    observer = Listening()

    def fail() -> None:
        for item in counted(range(4), "reading", unit="tensors", total=4):
            if item == 2:
                raise ValueError("bad")

    with watched_by(observer):
        with pytest.raises(ValueError, match="bad"):
            fail()
        assert observer.counts()[-1] == (2, 2)


def test_work_that_cannot_be_counted_begins_and_ends() -> None:
    observer = Listening()
    with watched_by(observer), working("loading weights"):
        assert observer.counts() == [(0, None)]
    assert observer.counts() == [(0, None), (1, 1)]


def test_nobody_is_told_outside_of_the_context() -> None:
    observer = Listening()
    with watched_by(observer):
        pass
    assert list(counted(range(2), "x", unit="y")) == [0, 1]
    assert observer.heard == []


def test_the_inner_observer_is_told_for_as_long_as_its_block_lasts() -> None:
    outer, inner = Listening(), Listening()
    with watched_by(outer):
        with watched_by(inner):
            list(counted([1], "inner", unit="steps"))
        list(counted([1], "outer", unit="steps"))
    assert {progress.what for progress in inner.heard} == {"inner"}
    assert {progress.what for progress in outer.heard} == {"outer"}
