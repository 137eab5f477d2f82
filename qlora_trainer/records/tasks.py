"""What the evaluation harness gives of a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        metric: name of the metric, and of the filter where the task has more than one, such as ``exact_match,strict``.
        value: the figure.
        stderr: its standard error over items; None where the harness gives none.
        higher_is_better: None where the task does not say.
        items: each item's own value in the task's order; empty where the metric has none of a single item.
    """

    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    items: tuple[float, ...] = ()


@dataclass(frozen=True)
class TaskEvaluation:
    """One model on one task.

    Attributes:
        task: name of the task.
        stage: name of the model, as in report.json.
        runtime: what ran it.
        scores: the task's metrics.
        items: how many items were asked.
        limit: how many were allowed; None = all.
        shots: solved examples before each item.
        version: of the task, as its file says.
        is_chat: whether items went through the chat template.
        window: most tokens of an item.
        truncated: requests that were longer, whose beginning was cut off.
        harness: version of lm-evaluation-harness.
        content: fingerprint of the model's files.
    """

    task: str
    stage: str
    runtime: str
    scores: tuple[TaskScore, ...]
    items: int
    limit: int | None
    shots: int
    version: str
    is_chat: bool
    window: int
    truncated: int
    harness: str
    content: str


@dataclass(frozen=True)
class TaskRow:
    """One line of the table stage x task.

    ``difference`` is the value minus the 16-bit base's on the same items, with the paired interval of that difference;
    None for the base itself, where it was not asked the same items, and where the metric has no value of single items.
    """

    task: str
    metric: str
    stage: str
    value: float
    stderr: float | None
    items: int
    shots: int
    limit: int | None
    is_chat: bool
    content: str
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
