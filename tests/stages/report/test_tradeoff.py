from dataclasses import replace
from xml.etree.ElementTree import Element, fromstring

import pytest

from qlora_trainer.records import RunReport
from qlora_trainer.stages.report.tradeoff import tradeoff


def drawn(svg: str, css: str) -> list[Element]:
    return [element for element in fromstring(svg).iter() if element.get("class") == css]


def test_every_file_and_the_base_have_a_bar_for_size_and_one_for_speed(report: RunReport) -> None:
    svg = tradeoff(report)
    names = [text.text for text in drawn(svg, "name")]
    assert names == ["16-bit base", *(export.format for export in report.exports)]
    assert len(drawn(svg, "bar export")) + len(drawn(svg, "bar trained")) == 2 * len(report.exports)
    assert len(drawn(svg, "bar stage")) == 2


def test_a_bar_is_as_long_as_its_file_is_large(report: RunReport) -> None:
    base = float(str(drawn(tradeoff(report), "bar stage")[0].get("width")))
    (chosen, _) = drawn(tradeoff(report), "bar trained")
    assert float(str(chosen.get("width"))) / base == pytest.approx(10_700_000 / 18_940_000, abs=0.001)


def test_what_the_recipe_asks_for_is_marked_where_it_asks(report: RunReport) -> None:
    assert len(drawn(tradeoff(report), "asked")) == sum(export.bar is not None for export in report.exports)


def test_where_training_won_too_little_the_loss_above_trained_takes_the_place_of_the_gain(report: RunReport) -> None:
    bare = tuple(replace(export, gain_kept=None, interval=None) for export in report.exports)
    svg = tradeoff(replace(report, exports=bare))
    heads = [text.text for text in drawn(svg, "head")]
    assert heads == ["size", "loss above trained, nats per token", "generated tokens/s"]
    assert drawn(svg, "asked") == []


def test_the_speed_is_of_scoring_where_one_stage_generated_nothing(report: RunReport) -> None:
    first, *rest = report.stages
    svg = tradeoff(replace(report, stages=(replace(first, generated_tokens_per_second=None), *rest)))
    assert drawn(svg, "head")[2].text == "scored tokens/s"


def test_without_files_there_is_no_drawing(report: RunReport) -> None:
    assert tradeoff(replace(report, exports=())) == ""
