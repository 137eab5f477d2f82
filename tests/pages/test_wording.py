import doctest

import pytest

from qlora_trainer.pages import wording


def test_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(wording).failed == 0


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 2, "0"),
        (-0.0461, 2, "-0.046"),
        (0.0999, 2, "0.10"),
        (99.96, 3, "100"),
        (0.0001, 2, "0.00010"),
        (0.0000999, 2, "1.0e-04"),
        (1234.5, 2, "1,234"),
        (float("inf"), 2, "inf"),
    ],
)
def test_a_number_keeps_its_significant_digits(value: float, digits: int, text: str) -> None:
    assert wording.significant(value, digits) == text


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert wording.perplexity(0.0) == "1.00"
    assert wording.perplexity(2.302585) == "10.0"
    assert wording.perplexity(800.0) == "> 10^8"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1024**2 - 1, "1,024 KiB"), (1024**3, "1.00 GiB")],
)
def test_bytes_take_the_largest_unit_that_fits(count: int, text: str) -> None:
    assert wording.size(count) == text


def test_bleu_is_no_percentage_and_other_metrics_are() -> None:
    assert wording.metric("bleu", 31.27) == "31.3"
    assert wording.metric("exact_match", 0.3127) == "31.3 %"


def test_a_share_without_interval_is_a_dash() -> None:
    assert wording.share_of_gain(None, None) == "—"
    assert wording.share_of_gain(0.994, (0.989, 0.998)) == "99.4 % (98.9 to 99.8 %)"


@pytest.mark.parametrize(("seconds", "text"), [(59.94, "59.9 s"), (60.0, "1 min 0 s"), (3599.6, "1 h 0 min")])
def test_a_duration_never_shows_sixty_of_a_unit(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text
