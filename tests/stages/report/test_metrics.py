from pathlib import Path

from qlora_trainer.stages.report.metrics import read_series


def test_every_figure_is_read_by_its_name_in_order_of_steps(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 20, "a": 2, "b": 0.5}\n{"step": 10, "a": 1}\n')
    assert read_series(file) == {"a": ((10, 1.0), (20, 2.0)), "b": ((20, 0.5),)}


def test_a_repeated_step_counts_as_it_was_last(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10, "a": 1}\n{"step": 10, "a": 3}\n')
    assert read_series(file) == {"a": ((10, 3.0),)}


def test_half_lines_words_and_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "a": NaN, "b": "x", "c": 1}\n[1]\n{"a": 4}\n{"step": 2, "c"')
    assert read_series(file) == {"c": ((1, 1.0),)}


def test_a_run_without_metrics_has_no_series(tmp_path: Path) -> None:
    assert read_series(tmp_path / "metrics.jsonl") == {}
