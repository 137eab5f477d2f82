import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlora_trainer.data.encode import EncodedRow
from tests.models import tiny_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"
SCRIPT = SCRIPTS / "bench_step.py"


@pytest.fixture(scope="session")
def bench_step_turn() -> Iterator[ModuleType]:
    yield from loaded("bench_step_turn")


@pytest.fixture(scope="session")
def bench_step(bench_step_turn: ModuleType) -> Iterator[ModuleType]:
    yield from loaded("bench_step")


def loaded(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny tokenizer and 24 questions of different lengths."""
    folder = tiny_tokenizer(tmp_path_factory.mktemp("inputs"))
    rows = [{"question": "Add one and two. " * (n % 5 + 1), "answer": f"It is {n}. " * (n + 1)} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prepared(bench_step: ModuleType, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    options = argparse.Namespace(quick=True, device="cpu", tokenizer=inputs, data=inputs / "rows.jsonl", steps=1)
    bench_step.prepare(folder, options)
    return folder


def rows_of_lengths(*lengths: int) -> list[EncodedRow]:
    return [EncodedRow((number,) * length, (number,) * length, (), "", "") for number, length in enumerate(lengths)]


def step(**changes: float) -> dict[str, float]:
    figures = {"seconds": 2.0, "cpu_seconds": 4.0, "computed_tokens": 40, "tokens": 30, "label_tokens": 20}
    work = {"token_id_sum": 7, "nats_per_token": 5.0, "gradient_norm": 0.25, "matrix_flops": 600.0}
    return {**figures, **work, **changes}


def turn(*steps: dict[str, float], peak_bytes: int = 1000) -> dict[str, Any]:
    sizes = {"threads": 1, "trainable_parameters": 1, "peak_bytes": peak_bytes}
    return {**sizes, "matrix_flops_per_second": 400.0, "steps": list(steps)}


def test_every_batch_begins_with_one_of_the_longest_rows_that_fit(bench_step: ModuleType) -> None:
    chosen = bench_step.choose_rows(rows_of_lengths(*range(1, 601)), steps=3)
    lengths = [len(row.token_ids) for row in chosen]
    assert len(lengths) == 3 * 4
    assert lengths[::4] == [512, 511, 510]
    assert len(set(lengths)) == len(lengths), "no row stands twice"
    assert all(length < 510 for number, length in enumerate(lengths) if number % 4)


def test_rows_are_chosen_the_same_way_every_time(bench_step: ModuleType) -> None:
    rows = rows_of_lengths(*range(1, 200))
    assert bench_step.choose_rows(rows, steps=2) == bench_step.choose_rows(rows, steps=2)


def test_figures_leave_the_warm_up_out_and_pool_the_turns(bench_step: ModuleType) -> None:
    slow = step(seconds=100.0)
    taken = [
        turn(slow, step(seconds=2.0), peak_bytes=10),
        turn(slow, step(seconds=3.0), step(seconds=4.0), peak_bytes=20),
    ]
    figures = bench_step.figures(taken)
    assert figures["step_seconds"] == 3.0
    assert figures["spread"] == pytest.approx((4 - 2) / 3)
    assert figures["label_tokens_per_second"] == pytest.approx(20 / 3)
    assert figures["tokens_per_second"] == pytest.approx(30 / 3)
    assert figures["peak_bytes"] == 20


def test_comparison_says_how_many_times_as_fast_ours_is(bench_step: ModuleType) -> None:
    ours = turn(step(), step(seconds=2.0), peak_bytes=300)
    peer = turn(step(), step(seconds=5.0, nats_per_token=5.0004), peak_bytes=400)
    checkpointed = turn(step(), step(seconds=6.0), peak_bytes=200)
    compared = bench_step.compare({"peer": [peer], "peer_checkpointed": [checkpointed], "none": [ours]})["none"]
    assert (compared["times_as_fast_as_peer"], compared["share_of_memory_of_peer"]) == (2.5, 0.75)
    assert (compared["times_as_fast_as_peer_checkpointed"], compared["share_of_memory_of_peer_checkpointed"]) == (
        3,
        1.5,
    )
    # 600 operations in 2 seconds, where 800 could have been done.
    assert compared["share_of_matrix_rate"] == 0.75
    assert compared["largest_differences"] == pytest.approx(
        {"nats_before_training": 0.0, "nats_while_training": 4e-4, "gradient_norm": 0.0}
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"label_tokens": 21}, "label_tokens"),
        ({"token_id_sum": 8}, "token_id_sum"),
        ({"nats_per_token": 5.0012}, "nats_before_training"),
        ({"nats_per_token": float("nan")}, "nats_before_training"),
        ({"gradient_norm": 0.2474}, "gradient_norm"),
    ],
    ids=str,
)
def test_sides_that_did_other_work_are_not_compared(
    bench_step: ModuleType, change: dict[str, float], named: str
) -> None:
    # The warm-up step counts too: time is not taken there, but work is.
    with pytest.raises(ValueError, match=named):
        bench_step.differences(turn(step(), step()), turn(step(**change), step()))


def test_losses_may_part_a_little_once_adapters_are_rounded(bench_step: ModuleType) -> None:
    apart = bench_step.differences(turn(step(), step()), turn(step(), step(nats_per_token=5.0049)))
    assert apart["nats_while_training"] == pytest.approx(0.0049)
    with pytest.raises(ValueError, match="nats_while_training"):
        bench_step.differences(turn(step(), step()), turn(step(), step(nats_per_token=5.0051)))


def test_every_rung_trains_on_the_prepared_rows_to_the_same_losses(bench_step_turn: ModuleType, prepared: Path) -> None:
    job = json.loads((prepared / "job.json").read_text())
    turns = {name: bench_step_turn.run(prepared, rung) for name, rung in bench_step_turn.RUNGS.items()}
    lean = turns["none"]["steps"]
    for name, taken in turns.items():
        assert [one["token_id_sum"] for one in taken["steps"]] == [one["token_id_sum"] for one in lean]
        losses, wanted = ([one["nats_per_token"] for one in steps] for steps in (taken["steps"], lean))
        exactly = name in ("selective", "full")  # recomputed activations are the same bits
        assert losses == (wanted if exactly else pytest.approx(wanted, abs=5e-3))
    for number, taken_step in enumerate(lean):
        batch = job["token_ids"][4 * number : 4 * number + 4]
        assert taken_step["tokens"] == taken_step["computed_tokens"] == sum(map(len, batch))
        assert turns["libraries"]["steps"][number]["computed_tokens"] == 4 * max(map(len, batch))
        trained = [label != -100 for labels in job["labels"][4 * number : 4 * number + 4] for label in labels[1:]]
        assert taken_step["label_tokens"] == sum(trained)
        # An untrained model gives every token of 4,096 about the same chance: ln 4096 = 8.32 nats.
        assert taken_step["nats_per_token"] == pytest.approx(8.32, abs=0.2)


def test_matrix_work_is_counted_from_the_models_sizes(bench_step_turn: ModuleType, prepared: Path) -> None:
    job = json.loads((prepared / "job.json").read_text())
    model = bench_step_turn.adapted_model(prepared, job, bench_step_turn.RUNGS["none"])
    rows = rows_of_lengths(3, 5)
    batch = bench_step_turn.collate_packed(rows, [0, 1])
    # Two layers of width 64: queries and output, keys and values of 32, gate, up and down of 128.
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    factors = 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    attention, head = 2 * 6 * 64 * (9 + 25), 4 * 6 * 4096 * 64
    assert batch.label_tokens == 6
    assert bench_step_turn.matrix_flops(model, batch, [3, 5]) == 8 * (4 * linear + 6 * factors) + attention + head


@pytest.mark.bench
def test_quick_comparison_ends_with_a_table_and_a_result(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    result = tmp_path / "result.json"
    options = ["--quick", "--threads", "1", "--rounds", "1", "--steps", "2"]
    paths = ["--tokenizer", str(inputs), "--data", str(inputs / "rows.jsonl"), "--out", str(result)]
    done = subprocess.run([sys.executable, SCRIPT, *options, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of the matrix rate") == 8
    written = json.loads(result.read_text())["turns"]
    assert all(len(found["turns"][0]["steps"]) == 3 for found in written.values())
    # Importing torch and transformers alone takes 300 MB.
    assert all(found["peak_bytes"] > 3e8 for found in written.values())
    assert written["none"]["times_as_fast_as_peer"] > 0


def test_a_quick_run_never_replaces_the_committed_result(
    bench_step: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--quick"])
    with pytest.raises(SystemExit):
        bench_step.main()
    assert "--out" in capsys.readouterr().err
