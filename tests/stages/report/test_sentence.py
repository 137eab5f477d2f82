from collections.abc import Callable
from dataclasses import replace

import pytest

from qlora_trainer.recipe import Ladder
from qlora_trainer.records import Choice, Gap, RunReport, StageFigures
from qlora_trainer.stages.report.sentence import Asked, in_words

GAP = Gap(
    quantization_nats=0.0123,
    quantization_interval=(0.010, 0.015),
    learned_nats=2.3104,
    learned_interval=(2.2, 2.4),
    recovered=188.0,
    why_null=None,
)
CHOICE = Choice("compressed_tensors_w4a16_g32", "why")
Words = Callable[..., str]


@pytest.fixture
def words(report: RunReport) -> Words:
    """The sentence of the realistic report without its metrics, some of its parts exchanged."""
    plain: tuple[StageFigures, ...] = tuple(replace(stage, metrics={}) for stage in report.stages)

    fine = tuple(replace(export, status="complete") for export in report.exports)

    def make(gap: Gap = GAP, *, base_bits: int = 4, **changes: object) -> str:
        asked = Asked(base_bits=base_bits, ladder=Ladder())
        parts = {"stages": plain, "exports": fine, "choice": CHOICE, "asked": asked} | changes
        return in_words(gap, **parts)  # type: ignore[arg-type]  # parts are as the function names them

    return make


def test_a_run_that_went_well_tells_cost_gain_and_what_is_kept(words: Words) -> None:
    assert words() == (
        "Storing the model in 4 bits cost 0.012 nats per token; training on your task won 2.31, "
        "and the 4-bit file (compressed_tensors_w4a16_g32) keeps 99.4 % of that."
    )


def test_a_cost_that_cannot_be_measured_is_called_so(words: Words) -> None:
    assert words(replace(GAP, quantization_interval=(-0.001, 0.02)), base_bits=8) == (
        "Storing the model in 8 bits cost nothing that these test rows can show; training on your task won 2.31 nats "
        "per token, and the 4-bit file (compressed_tensors_w4a16_g32) keeps 99.4 % of that."
    )


def test_a_quantized_base_that_happens_to_be_better_is_no_cost(words: Words) -> None:
    text = words(replace(GAP, quantization_nats=-0.02, quantization_interval=(-0.03, -0.01)))
    assert text.startswith("Storing the model in 4 bits happened to lower the loss by 0.020 nats per token; training")


def test_training_that_won_nothing_is_said_plainly(words: Words) -> None:
    text = words(replace(GAP, learned_nats=0.001, learned_interval=(-0.01, 0.02)))
    assert text.endswith("; training won nothing that these test rows can show.")


def test_training_that_did_harm_is_said_plainly(words: Words) -> None:
    text = words(replace(GAP, learned_nats=-0.5, learned_interval=(-0.6, -0.4)))
    assert text.endswith("; training made the model worse on your task, by 0.50 nats per token.")


def test_no_recommended_file_is_said_plainly(words: Words) -> None:
    assert words(choice=None).endswith(
        "won 2.31, but no verified file is sure to keep as much of that as the recipe asks."
    )


def test_a_run_without_exports_promises_nothing_of_files(words: Words) -> None:
    assert words(exports=(), choice=None).endswith("training on your task won 2.31.")


def test_the_adapter_is_named_with_the_base_that_it_needs(words: Words) -> None:
    text = words(choice=Choice("peft_adapter", "why"))
    assert text.endswith("and the adapter beside its quantized base keeps 100.0 % of that.")


def test_exact_matches_are_told_before_and_after_and_from_the_file(words: Words, report: RunReport) -> None:
    assert words(stages=report.stages).endswith(
        " Exactly right answers: 0.3 % before training, 81.2 % after, 79.4 % from the recommended file."
    )
    assert words(stages=report.stages, choice=None).endswith("0.3 % before training, 81.2 % after.")


def test_exact_matches_before_training_come_from_the_16_bit_base_where_the_quantized_has_none(
    words: Words, report: RunReport
) -> None:
    stages = tuple(replace(s, metrics={}) if s.name == "quantized_base" else s for s in report.stages)
    assert "Exactly right answers: 0.4 % before" in words(stages=stages)


def test_every_file_that_is_not_verified_is_warned_of(words: Words, report: RunReport) -> None:
    broken = ("bitsandbytes_nf4", "bitsandbytes_int8")
    exports = tuple(
        replace(export, verified=export.format not in broken, status="complete") for export in report.exports
    )
    assert " Do not use bitsandbytes_nf4 and bitsandbytes_int8: " in words(exports=exports)
    assert "Do not use" not in words()


def test_a_file_below_its_bar_is_told_with_what_it_keeps_and_what_is_asked(words: Words, report: RunReport) -> None:
    assert "below" not in words()
    assert words(exports=report.exports).endswith(
        " compressed_tensors_w4a16_g128 is below the recipe's bar: it keeps 97.37 % (97.32 to 97.41 %) of what "
        "training won, and the recipe asks for 98 % at the lower end of the interval."
    )


def test_a_file_below_its_bar_without_a_gain_is_told_by_its_distance(words: Words, report: RunReport) -> None:
    far = replace(
        report.exports[1], status="below_bar", gain_kept=None, interval=None, loss_above_trained_interval=(0.03, 0.0345)
    )
    assert words(exports=(far,)).endswith(
        " bitsandbytes_nf4 is below the recipe's bar: its KL to the trained model is 0.0301 nats (allowed: 0.01) and "
        "its loss at most 0.0345 nats per token above the trained model's (allowed: 0.005)."
    )
