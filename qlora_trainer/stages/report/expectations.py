"""What the recipe promised beside what was measured."""

from collections.abc import Iterator, Mapping

from qlora_trainer.recipe import Expected
from qlora_trainer.records import ExpectedFigure, StageFigures
from qlora_trainer.stages.report.inputs import TRAINED

GIB = 1024**3
RESOURCE_SLACK = 0.25
"""Seconds and memory may exceed the promise by this share of it. Chosen, not measured: a busy machine is slower."""


def compare(
    expected: Expected | None, stages: tuple[StageFigures, ...], *, seconds: float, peak_bytes: int
) -> tuple[ExpectedFigure, ...]:
    """Each promised figure that was measured.

    A loss is reproduced within the recipe's ``within``, a task metric within the measured interval; seconds and
    memory may be lower than promised by any amount, and higher by ``RESOURCE_SLACK``.

    Args:
        expected: the recipe's section; None gives nothing.
        stages: every measured stage.
        seconds: of the whole run.
        peak_bytes: largest over training and every evaluation.
    """
    if expected is None:
        return ()
    by_name = {stage.name: stage for stage in stages}
    figures = [
        _figure(
            f"{name}, nats per token",
            expected=promised,
            measured=by_name[name].nats_per_token,
            within=expected.within,
        )
        for name, promised in expected.nats_per_token.items()
        if name in by_name
    ]
    figures += _metrics(expected, by_name)
    if expected.seconds is not None:
        figures.append(_resource("run, seconds", expected=expected.seconds, measured=seconds))
    if expected.peak_gib is not None:
        figures.append(_resource("peak memory, GiB", expected=expected.peak_gib, measured=peak_bytes / GIB))
    return tuple(figures)


def not_measured(expected: Expected | None, stages: tuple[StageFigures, ...]) -> tuple[str, ...]:
    """One sentence for each promised figure that this run did not measure."""
    if expected is None:
        return ()
    names = {stage.name for stage in stages}
    metrics = {metric for stage in stages if stage.name == TRAINED for metric in stage.metrics}
    missing = [f"expected.nats_per_token.{name}" for name in expected.nats_per_token if name not in names]
    missing += [f"expected.metrics.{name}" for name in expected.metrics if name not in metrics]
    return tuple(f"The recipe's {name} could not be compared: this run did not measure it." for name in missing)


def _metrics(expected: Expected, stages: Mapping[str, StageFigures]) -> Iterator[ExpectedFigure]:
    if TRAINED not in stages:
        return
    trained = stages[TRAINED]
    for name, promised in expected.metrics.items():
        if name in trained.metrics:
            low, high = trained.metric_intervals[name]
            measured = trained.metrics[name]
            within = max(high - measured, measured - low)
            yield _figure(f"{TRAINED}, {name}", expected=promised, measured=measured, within=within)


def _figure(name: str, *, expected: float, measured: float, within: float) -> ExpectedFigure:
    return ExpectedFigure(name, expected, measured, within, is_reproduced=abs(measured - expected) <= within)


def _resource(name: str, *, expected: float, measured: float) -> ExpectedFigure:
    within = RESOURCE_SLACK * expected
    return ExpectedFigure(name, expected, measured, within, is_reproduced=measured <= expected + within)
