"""The study of sizes and bits, the table of recovery, and what both share, on a tiny model."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree.ElementTree import fromstring

import pytest
import torch

from qlora_trainer.numerics.integer_weight import GridSpec
from tests.test_pipeline import recipe_for

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODULES = ("tuned_bases", "plot_study", "pretrain_base", "bench_recovery", "study_size_vs_bits")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    modules = {}
    for name in MODULES:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    yield modules
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def bases(
    scripts: dict[str, ModuleType], llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("bases")
    with scripts["tuned_bases"].bases_of(recipe_for(llama_folder, folder, compare={"model": "base"})) as made:
        yield made


def spec(bits: int) -> GridSpec:
    return GridSpec(bits, 32, "none", torch.float16)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_8_bits_lie_nearer_to_the_16_bit_model_than_fewer_do(bases: Any, method: str) -> None:
    whole = bases.losses(bases.sixteen_bit()).nats

    def distance(bits: int) -> float:
        nats = bases.losses(bases.integers(method, spec(bits))).nats
        return float((torch.tensor(nats) - torch.tensor(whole)).norm())

    # Of 4 and 2 bits either may be nearer: the tiny model knows nothing that could be lost.
    assert distance(8) < min(distance(4), distance(2)) / 2


def test_every_base_of_the_table_is_tuned_by_the_same_loop(scripts: dict[str, ModuleType], bases: Any) -> None:
    tuned = {}
    for base in scripts["bench_recovery"].BASES:
        model, size = scripts["bench_recovery"].opened(bases, base)
        tuned[base] = (size, bases.tuned(model, base, seed=0).trained)
    # With double quantization NF4 takes 4.13 bits and the code books; a bfloat16 scale for 64 weights makes it 4.25.
    assert tuned["nf4"][0] < tuned["int8"][0] < tuned["16bit"][0]
    assert tuned["gptq_int4"][0] < tuned["int8"][0]
    budgets = {(made.steps, made.tokens, made.trainable_parameters) for _, made in tuned.values()}
    assert len(budgets) == 1


def test_a_seed_repeats_its_training_and_another_does_not(bases: Any) -> None:
    first, again, other = (bases.tuned(bases.sixteen_bit(), "16bit", seed=seed).losses.value for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_gap_is_paired_by_row_and_by_seed(scripts: dict[str, ModuleType]) -> None:
    shared = scripts["tuned_bases"]
    reference = [shared.Losses((1.0, 5.0, 9.0), (1, 1, 2)), shared.Losses((2.0, 6.0, 10.0), (1, 1, 2))]
    worse = [shared.Losses(tuple(nats + labels for nats, labels in zip(one.nats, one.labels, strict=True)), one.labels)
             for one in reference]  # fmt: skip
    found = shared.gap(worse, reference)
    assert found["value"] == pytest.approx(1.0)
    assert found["interval"] == pytest.approx([1.0, 1.0])
    assert found["by_seed"] == pytest.approx([1.0, 1.0])


def cells(scripts: dict[str, ModuleType], loss: float, parameters: int) -> dict[str, Any]:
    def cell(one: Any) -> dict[str, Any]:
        rows = {"nats": (loss + 1 / one.bits, loss + 2 / one.bits), "labels": (1, 1)}
        size = parameters * one.bits // 8
        facts = {"bits": one.bits, "method": one.method, "bytes": size, "matrix_bytes": size // 2}
        return {**facts, "text": rows, "task_before": rows, "task_after": [rows, rows]}

    named = {each.name: cell(each) for each in scripts["study_size_vs_bits"].CELLS}
    return {"parameters": parameters, "pretraining": {"nats_per_token": loss}, "cells": named}


def test_the_larger_model_at_few_bits_wins_where_its_loss_is_lower(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    sizes = {"h64": cells(scripts, 3.0, 2**20), "h128": cells(scripts, 2.0, 2**21)}
    found = scripts["study_size_vs_bits"].summary(sizes, {"tokens": 1.0})
    first = found["larger_at_few_bits"][0]
    assert (first["larger"], first["smaller"], first["bytes_ratio"]) == ("h128 gptq4", "h64 gptq8", 1.0)
    assert first["text"]["value"] == pytest.approx(-1.0 + 1.5 / 4 - 1.5 / 8)
    (tmp_path / "study.json").write_text(json.dumps(found))
    drawn = fromstring(scripts["plot_study"].plot(tmp_path / "study.json").read_text())
    dots = [node for node in drawn.iter() if node.tag.endswith("circle")]
    # Two panels, two sizes, 16 bit once for each of the two methods' lines.
    assert len(dots) == 2 * 2 * (len(scripts["study_size_vs_bits"].CELLS) + 1)


def test_the_gap_after_is_to_the_16_bit_base_that_was_tuned_alike(scripts: dict[str, ModuleType]) -> None:
    def turn(before: float, after: float) -> dict[str, Any]:
        rows = {"before": {"nats": [before] * 3, "labels": [1] * 3}, "after": {"nats": [after] * 3, "labels": [1] * 3}}
        return {**rows, "bytes": 1, "seconds": 1.0, "peak_bytes": 1, "trainable_parameters": 1, "tokens": 1}

    turns = {"16bit": [turn(3.0, 0.5), turn(3.0, 0.75)], "nf4": [turn(3.5, 0.75), turn(3.5, 0.75)]}
    reference, nf4 = scripts["bench_recovery"].summary(turns, steps=1)["rows"]
    assert (reference["gap_before"]["value"], reference["gap_after"]["value"]) == (0.0, 0.0)
    assert (nf4["gap_before"]["value"], nf4["gap_after"]["value"]) == (0.5, 0.125)
    assert nf4["gap_after"]["by_seed"] == [0.25, 0.0]
