from dataclasses import replace

import pytest

from qlora_trainer.recipe import Ladder
from qlora_trainer.records import ExportFigures, RunReport
from qlora_trainer.stages.report.bars import bar_in_words, bars, lowest_bar, meets, status_of

LADDER = Ladder(bar_int4=0.97, bar_int8=0.99, max_kl=0.02, max_loss_difference=0.003)


@pytest.fixture
def nf4(report: RunReport) -> ExportFigures:
    return replace(report.exports[1], bar=0.97)


def test_formats_of_few_bits_have_bars_and_others_none() -> None:
    found = bars(LADDER)
    assert (found["gguf_q5_1"], found["gptq_w4_g64"], found["gguf_q8_0"]) == (0.97, 0.97, 0.99)
    assert [name for name, bar in found.items() if bar is None] == [
        "peft_adapter",
        "merged_16bit",
        "gguf_f16",
        "gguf_adapter",
    ]
    assert lowest_bar(LADDER) == 0.97


@pytest.mark.parametrize(("low", "met"), [(0.97, True), (0.9699, False)])
def test_a_bar_is_met_by_the_lower_end(nf4: ExportFigures, low: float, met: bool) -> None:
    assert meets(replace(nf4, interval=(low, 1.0)), bar=0.97, ladder=LADDER) is met


@pytest.mark.parametrize(
    ("kl", "high", "met"), [(0.02, 0.003, True), (0.0201, 0.003, False), (0.02, 0.0031, False), (0.0, -0.1, True)]
)
def test_without_a_gain_both_bounds_hold(nf4: ExportFigures, kl: float, high: float, met: bool) -> None:
    far = replace(nf4, gain_kept=None, interval=None, kl_to_trained=kl, loss_above_trained_interval=(high - 0.01, high))
    assert meets(far, bar=0.97, ladder=LADDER) is met


def test_faithful_comes_before_good(nf4: ExportFigures) -> None:
    low = replace(nf4, interval=(0.5, 0.6))
    assert status_of(nf4, LADDER) == "complete"
    assert status_of(low, LADDER) == "below_bar"
    assert status_of(replace(low, verified=False), LADDER) == "unverified"
    assert status_of(replace(low, bar=None), LADDER) == "complete"


@pytest.mark.parametrize(("bar", "text"), [(0.98, "98 %"), (0.995, "99.5 %"), (0.9975, "99.75 %"), (0.57, "57 %")])
def test_a_bar_is_told_as_it_was_given(bar: float, text: str) -> None:
    assert bar_in_words(bar) == text
