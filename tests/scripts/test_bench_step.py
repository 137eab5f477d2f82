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

SCRIPT = Path(__file__).parents[2] / "scripts/bench_step.py"


@pytest.fixture(scope="session")
def bench_step() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bench_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_step"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_step"]


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
    options = argparse.Namespace(quick=True, tokenizer=inputs, data=inputs / "rows.jsonl", steps=1)
    bench_step.prepare(folder, options)
    return folder


def rows_of_lengths(*lengths: int) -> list[EncodedRow]:
    return [EncodedRow((number,) * length, (number,) * length, (), "", "") for number, length in enumerate(lengths)]


def step(**changes: float) -> dict[str, float]:
    figures = {"seconds": 2.0, "cpu_seconds": 4.0, "padded_tokens": 40, "tokens": 30, "label_tokens": 20}
    return {**figures, "token_id_sum": 7, "nats_per_token": 5.0, "gradient_norm": 0.25, **changes}


def turn(*steps: dict[str, float], peak_bytes: int = 1000) -> dict[str, Any]:
    return {"threads": 1, "trainable_parameters": 1, "peak_bytes": peak_bytes, "steps": list(steps)}


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
    assert figures["padded_tokens_per_second"] == pytest.approx(40 / 3)
    assert figures["peak_bytes"] == 20


def test_comparison_says_how_many_times_as_fast_ours_is(bench_step: ModuleType) -> None:
    ours = turn(step(), step(seconds=2.0), peak_bytes=300)
    peer = turn(step(), step(seconds=5.0, nats_per_token=5.0004), peak_bytes=400)
    compared = bench_step.compare({"ours": [ours], "peer": [peer]})
    assert compared["times_as_fast"] == 2.5
    assert compared["share_of_peer_memory"] == 0.75
    assert compared["largest_differences"] == pytest.approx(
        {"nats_before_training": 0.0, "nats_while_training": 4e-4, "gradient_norm": 0.0}
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"label_tokens": 21}, "label_tokens"),
        ({"token_id_sum": 8}, "token_id_sum"),
        ({"nats_per_token": 5.0002}, "nats_before_training"),
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


def test_our_turn_trains_on_the_prepared_rows_with_and_without_checkpointing(
    bench_step: ModuleType, prepared: Path
) -> None:
    job = json.loads((prepared / "job.json").read_text())
    turns = [bench_step.run_ours(prepared, gradient_checkpointing=wanted) for wanted in (True, False)]
    assert [len(taken["steps"]) for taken in turns] == [2, 2]
    for kind in ("nats_per_token", "gradient_norm", "token_id_sum"):
        with_it, without = ([taken_step[kind] for taken_step in taken["steps"]] for taken in turns)
        assert with_it == without, "recomputed activations are the same bits"
    for number, taken_step in enumerate(turns[0]["steps"]):
        batch = job["token_ids"][4 * number : 4 * number + 4]
        assert taken_step["tokens"] == sum(map(len, batch))
        assert taken_step["padded_tokens"] == 4 * max(map(len, batch))
        trained = [label != -100 for labels in job["labels"][4 * number : 4 * number + 4] for label in labels[1:]]
        assert taken_step["label_tokens"] == sum(trained)
        # An untrained model gives every token of 4,096 about the same chance: ln 4096 = 8.32 nats.
        assert taken_step["nats_per_token"] == pytest.approx(8.32, abs=0.2)


@pytest.mark.bench
def test_quick_comparison_ends_with_a_table_and_a_result(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    result = tmp_path / "result.json"
    options = ["--quick", "--threads", "1", "--rounds", "1", "--steps", "2"]
    paths = ["--tokenizer", str(inputs), "--data", str(inputs / "rows.jsonl"), "--out", str(result)]
    done = subprocess.run([sys.executable, SCRIPT, *options, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("times as fast") == 2
    written = json.loads(result.read_text())
    for configuration in ("with_checkpointing", "without_checkpointing"):
        compared = written[configuration]
        assert compared["times_as_fast"] > 0
        assert {side: len(compared[side]["turns"][0]["steps"]) for side in ("ours", "peer")} == {"ours": 3, "peer": 3}
        # Importing torch and transformers alone takes 300 MB.
        assert all(compared[side]["peak_bytes"] > 3e8 for side in ("ours", "peer"))


def test_a_quick_run_never_replaces_the_committed_result(
    bench_step: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--quick"])
    with pytest.raises(SystemExit):
        bench_step.main()
    assert "--out" in capsys.readouterr().err
