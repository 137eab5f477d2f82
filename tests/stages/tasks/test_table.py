import pytest

from qlora_trainer.numerics.bootstrap import Resampling
from qlora_trainer.records import TaskEvaluation, TaskScore
from qlora_trainer.stages.tasks.table import rows_of

RESAMPLING = Resampling(resamples=500, confidence=0.95, seed=0)


def evaluation(stage: str, items: tuple[float, ...], *, task: str = "t", metric: str = "acc") -> TaskEvaluation:
    return TaskEvaluation(
        task=task,
        stage=stage,
        runtime="transformers",
        scores=(TaskScore(metric, sum(items) / max(1, len(items)), 0.1, True, items),),
        items=len(items),
        limit=None,
        shots=0,
        version="1",
        is_chat=False,
        window=64,
        truncated=0,
        harness="0.4.13",
        content="abc",
    )


def test_the_difference_is_paired_with_the_16_bit_base() -> None:
    base = evaluation("base_16bit", (1.0, 0.0, 1.0, 1.0) * 10)
    worse = evaluation("export:gguf_q4_0", (1.0, 0.0, 0.0, 1.0) * 10)
    first, second = rows_of([base, worse], RESAMPLING)
    assert (first.difference, first.difference_interval) == (None, None)
    assert second.difference == pytest.approx(-0.25)
    assert second.difference_interval is not None
    low, high = second.difference_interval
    assert low < -0.25 < high < 0


def test_the_same_answers_differ_by_nothing() -> None:
    base = evaluation("base_16bit", (1.0, 0.0) * 5)
    row = rows_of([base, evaluation("merged_16bit", (1.0, 0.0) * 5)], RESAMPLING)[1]
    assert (row.difference, row.difference_interval) == (0.0, (0.0, 0.0))


def test_there_is_no_difference_without_the_base_on_the_same_items() -> None:
    other = evaluation("merged_16bit", (1.0, 0.0))
    assert rows_of([other], RESAMPLING)[0].difference is None
    assert rows_of([evaluation("base_16bit", (1.0,)), other], RESAMPLING)[1].difference is None
    assert rows_of([evaluation("base_16bit", (1.0, 0.0), task="u"), other], RESAMPLING)[1].difference is None
    assert rows_of([evaluation("base_16bit", ()), evaluation("merged_16bit", ())], RESAMPLING)[1].difference is None
