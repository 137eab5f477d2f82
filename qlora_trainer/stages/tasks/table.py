"""The table stage x task: what each model gave, and by how much it differs from the 16-bit base."""

from collections.abc import Iterable, Iterator, Mapping

from qlora_trainer.numerics.bootstrap import Resampling, ratio_interval
from qlora_trainer.records import TaskEvaluation, TaskRow, TaskScore

BASE = "base_16bit"


def rows_of(evaluations: Iterable[TaskEvaluation], resampling: Resampling) -> tuple[TaskRow, ...]:
    """One row for each figure, each with its paired difference from the 16-bit base's.

    The difference is taken item by item: both models met the same items, so what makes an item hard cancels out.
    """
    evaluations = tuple(evaluations)
    references = {each.task: each for each in evaluations if each.stage == BASE}
    return tuple(
        _row(evaluation, score, references, resampling) for evaluation in evaluations for score in evaluation.scores
    )


def _row(
    evaluation: TaskEvaluation,
    score: TaskScore,
    references: Mapping[str, TaskEvaluation],
    resampling: Resampling,
) -> TaskRow:
    paired = list(_paired(evaluation, score, references.get(evaluation.task)))
    ones = [1] * len(paired)
    return TaskRow(
        task=evaluation.task,
        metric=score.metric,
        stage=evaluation.stage,
        value=score.value,
        stderr=score.stderr,
        items=evaluation.items,
        shots=evaluation.shots,
        limit=evaluation.limit,
        is_chat=evaluation.is_chat,
        content=evaluation.content,
        difference=sum(paired) / len(paired) if paired else None,
        difference_interval=ratio_interval(paired, ones, resampling=resampling) if paired else None,
    )


def _paired(evaluation: TaskEvaluation, score: TaskScore, base: TaskEvaluation | None) -> Iterator[float]:
    if base is None or evaluation.stage == BASE:
        return
    other = next((each.items for each in base.scores if each.metric == score.metric), ())
    if len(other) == len(score.items):
        yield from (mine - theirs for mine, theirs in zip(score.items, other, strict=True))
