import doctest
from dataclasses import replace

import pytest

from qlora_trainer.stages.compare.page import reading
from qlora_trainer.stages.compare.page.reading import (
    Bounds,
    layers_in_words,
    measured,
    metrics_of,
    reference,
    standing_of_the_chosen,
)
from tests.stages.compare.compared import COMPARISON


def test_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(reading).failed == 0


def test_measured_rows_are_those_with_figures_and_16_bit_is_the_reference() -> None:
    assert [row.method for row in measured(COMPARISON)] == [row.method for row in COMPARISON.rows[:-1]]
    assert reference(COMPARISON).method == "16bit"
    assert metrics_of(COMPARISON) == ("exact_match", "bleu")


@pytest.mark.parametrize(
    ("settings", "bounds"),
    [
        ({}, Bounds(None, None)),
        ({"most_added_nats": 1, "most_mib": None}, Bounds(1.0, None)),
        ({"most_added_nats": 0.5, "most_mib": 1.5}, Bounds(0.5, 1.5 * 2**20)),
    ],
)
def test_the_bounds_are_those_that_were_kept(settings: dict[str, object], bounds: Bounds) -> None:
    assert Bounds.of(replace(COMPARISON, settings=settings)) == bounds


def test_a_method_outside_of_the_bounds_is_not_called_recommended() -> None:
    outside = replace(COMPARISON, recommendation=replace(COMPARISON.recommendation, is_within_bounds=False))
    assert (standing_of_the_chosen(COMPARISON), standing_of_the_chosen(outside)) == ("recommended", "of least loss")


def test_no_layer_is_lost_in_words() -> None:
    names = [f"model.layers.{block}.{kind}" for block in (0, 2, 3, 9) for kind in ("q", "down")]
    assert layers_in_words([*names, "lm_head"]) == "q of blocks 0, 2 to 3, 9; down of blocks 0, 2 to 3, 9; lm_head"
    assert layers_in_words(["h.7.q"]) == "q of block 7"
    assert layers_in_words([]) == ""
