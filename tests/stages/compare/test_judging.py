from dataclasses import replace

import pytest

from qlora_trainer.numerics.bootstrap import Resampling
from qlora_trainer.recipe import Compare
from qlora_trainer.records import ComparisonRow, Evaluation, Fidelity, Score
from qlora_trainer.stages.compare.judging import (
    MIB,
    failed_row,
    method_row,
    recommend,
    reference_row,
    with_front,
)
from qlora_trainer.stages.compare.methods import FACTS, REFERENCE

ROWS = 40


def evaluation(stage: str, nats: float, *, size: int = MIB, speed: float = 100.0) -> Evaluation:
    return Evaluation(
        stage=stage,
        runtime="transformers",
        nats_per_token=Score(nats, (nats - 0.1, nats + 0.1)),
        metrics={"exact_match": Score(0.5, (0.4, 0.6))},
        row_nats=tuple(nats * 10 + 0.1 * (row % 3) for row in range(ROWS)),
        row_labels=(10,) * ROWS,
        bytes=size,
        tokens_per_second=1000.0,
        generated_tokens_per_second=speed,
        peak_bytes=50 * MIB,
    )


def row(method: str, *, added: float, size: float, speed: float = 50.0, is_simulated: bool = False) -> ComparisonRow:
    return ComparisonRow(
        method,
        "words",
        8,
        16,
        nats_per_token=Score(1 + added, (0.9, 1.1)),
        added_nats=Score(added, (added - 0.001, added + 0.001)),
        bytes=int(size * MIB),
        decode_tokens_per_second=speed,
        is_simulated=is_simulated,
    )


SIXTEEN = replace(row(REFERENCE, added=0.0, size=10), added_nats=Score(0.0, (0.0, 0.0)))
INT8 = row("rtn_int8", added=0.001, size=5)
GPTQ = row("gptq_int4", added=0.003, size=3, is_simulated=True)
RTN = row("rtn_int4", added=0.05, size=3)
NF4 = row("nf4", added=0.02, size=2.8, speed=80)


def test_added_nats_are_the_paired_difference_to_16_bit() -> None:
    reference = evaluation(REFERENCE, 1.0)
    found = method_row(
        "gptq_int4",
        evaluation("gptq_int4", 1.02),
        Fidelity(0.01, 0.9, 100),
        reference,
        resampling=Resampling(200),
        seconds=3.0,
        layers_16bit=("a",),
        note="note",
    )
    assert found.added_nats is not None
    assert found.added_nats.value == pytest.approx(0.02)
    # The same 0.02 in every row: pairing leaves no spread, where each loss alone has one.
    assert found.added_nats.interval == pytest.approx((0.02, 0.02))
    assert (found.kl, found.top1_agreement, found.seconds, found.layers_16bit) == (0.01, 0.9, 3.0, ("a",))
    assert found.is_simulated
    assert not reference_row(reference, seconds=0.0).is_simulated


def test_every_method_has_facts_and_a_row() -> None:
    for method, facts in FACTS.items():
        failed = failed_row(method, ValueError("why"))
        assert (failed.method, failed.weight_bits, failed.failed) == (method, facts.weight_bits, "why")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("CUDA out of memory")],
)
def test_running_out_of_memory_is_named(error: Exception) -> None:
    assert str(failed_row("nf4", error).failed).startswith("out of memory")


def test_the_front_holds_what_nothing_beats_in_size_and_loss() -> None:
    failed = failed_row("fp4", ValueError("no"))
    marked = {each.method: each.is_on_front for each in with_front([SIXTEEN, INT8, GPTQ, RTN, NF4, failed])}
    assert marked == {
        "16bit": True,
        "rtn_int8": True,
        "gptq_int4": True,
        "rtn_int4": False,
        "nf4": True,
        "fp4": False,
    }


def test_size_chooses_the_smallest_that_adds_no_more_than_allowed() -> None:
    rows = [SIXTEEN, INT8, GPTQ, RTN, NF4]
    found = recommend(rows, Compare())
    assert found.method == "gptq_int4"
    assert "3.00 MiB (30 % of the 16-bit size), +0.0030 nats [+0.0020, +0.0040]" in found.why
    assert "of 1 smaller ones the best, nf4, adds up to 0.0210 nats" in found.why
    assert recommend(rows, Compare(most_added_nats=0.0035)).method == "rtn_int8"
    assert recommend(rows, Compare(most_added_nats=0.03)).method == "nf4"


def test_quality_chooses_the_least_loss_within_the_ceiling() -> None:
    rows = [SIXTEEN, INT8, GPTQ, RTN, NF4]
    assert recommend(rows, Compare(prefer="quality")).method == "16bit"
    assert recommend(rows, Compare(prefer="quality", most_mib=6.0)).method == "rtn_int8"
    assert recommend(rows, Compare(prefer="quality", most_mib=3.5)).method == "gptq_int4"


def test_latency_counts_only_speeds_that_are_the_method_s_own() -> None:
    rows = [SIXTEEN, replace(INT8, decode_tokens_per_second=60.0), replace(GPTQ, decode_tokens_per_second=900.0), NF4]
    assert recommend(rows, Compare(prefer="latency")).method == "rtn_int8"
    assert recommend(rows, Compare(prefer="latency", most_added_nats=0.03)).method == "nf4"
    bounded = recommend(rows, Compare(prefer="size", least_tokens_per_second=55.0))
    assert bounded.method == "rtn_int8"


def test_where_nothing_meets_the_bounds_the_reason_says_what_each_misses() -> None:
    found = recommend([SIXTEEN, INT8, NF4], Compare(most_mib=1.0))
    assert found.method == "16bit"
    assert not found.is_within_bounds
    assert found.why.startswith("no method meets the recipe's bounds (16bit takes 10.00 MiB; rtn_int8 takes 5.00 MiB")
