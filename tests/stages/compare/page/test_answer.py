from dataclasses import replace

import pytest

from qlora_trainer.records import Comparison, Recommendation
from qlora_trainer.stages.compare.page.answer import answer, export_format, headline, sentence
from tests.stages.compare.compared import BASE, COMPARISON, method


def recommending(name: str) -> Comparison:
    return replace(COMPARISON, recommendation=Recommendation(name, "words"))


def test_the_answer_tells_what_the_method_costs_and_how_to_get_its_file() -> None:
    given = answer(COMPARISON)
    assert (given.question, given.name, given.tone) == ("Take this method", "gptq_int4", "good")
    assert [(fact.name, fact.value) for fact in given.figures.rows] == [
        ("Costs in loss", "+0.0100"),
        ("Exact match", "50.0 %"),
        ("BLEU", "12.5"),
        ("Costs in space", "3.00 MiB"),
        ("Speed", "not measured"),
        ("Quantizing took", "1.2 s"),
    ]
    (code,) = given.commands
    assert code.text == (
        "qlora-trainer run recipes/tiny.yaml --set 'run.name=tiny' "
        "--set 'export.formats=[compressed_tensors_w4a16_g64]'"
    )


def test_a_method_that_runs_in_its_own_integers_has_a_speed() -> None:
    speed = next(fact for fact in answer(recommending("nf4")).figures.rows if fact.name == "Speed here")
    assert (speed.value, speed.note) == ("100", "generated tokens/s; 16 bit 100")


def test_staying_in_16_bit_is_said_in_words() -> None:
    given = answer(recommending("16bit"))
    assert given.name == "16bit: do not quantize"
    assert given.commands == ()
    assert not any(fact.name == "Costs in loss" for fact in given.figures.rows)


def test_a_base_that_is_not_trained_has_no_file_to_get() -> None:
    assert answer(replace(COMPARISON, model="base")).commands == ()


@pytest.mark.parametrize(
    ("name", "bits", "activations", "wanted"),
    [
        ("nf4", 4, 16, "bitsandbytes_nf4"),
        ("llm_int8", 8, 8, "bitsandbytes_int8"),
        ("rtn_int8", 8, 16, "compressed_tensors_w8a16"),
        ("smoothquant_w8a8", 8, 8, "compressed_tensors_w8a8"),
        ("autoround_int4", 4, 16, "compressed_tensors_w4a16_g64"),
        ("fp4", 4, 16, None),
        ("zeroquant_w4a8", 4, 8, None),
    ],
)
def test_a_format_holds_the_bits_of_a_method_or_there_is_none(
    name: str, bits: int, activations: int, wanted: str | None
) -> None:
    assert export_format(method(name, bits, 0.1, 3.0, activation_bits=activations), COMPARISON) == wanted


@pytest.mark.parametrize("size", [48, None])
def test_groups_that_no_format_has_have_no_format(size: int | None) -> None:
    odd = replace(COMPARISON, settings={"group_size": size})
    assert export_format(method("gptq_int4", 4, 0.1, 3.0), odd) is None


def test_the_sentence_holds_the_best_of_each_number_of_bits() -> None:
    assert sentence(COMPARISON) == (
        "5 methods on the trained model, measured on the same 1,200 test rows: the best at 8 bits, rtn_int8, changes "
        "the loss by +0.0004 nats per token in 62 % of the size; the best at 4 bits, gptq_int4, changes the loss by "
        "+0.0100 nats per token in 38 % of the size."
    )
    alone = replace(COMPARISON, rows=(BASE,))
    assert sentence(alone) == "0 methods on the trained model, measured on the same 1,200 test rows."


def test_the_headline_counts_what_was_measured_and_what_is_on_the_front() -> None:
    facts = {fact.name: fact for fact in headline(COMPARISON).rows}
    assert (facts["Methods measured"].value, facts["Methods measured"].tone) == ("5 of 6", "warn")
    assert facts["On the front"].value == "4"
    assert facts["Test rows"].note == "intervals of 95 %, paired by row"
