"""How a command speaks: while it works, quietly, and to programs."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_trainer import errors, pipeline
from qlora_trainer.cli.json_lines import EVENTS, JsonLines
from qlora_trainer.cli.watching import LiveWatch, PlainWatch, watching
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import Choice, Comparison, RunReport
from qlora_trainer.runtime.progress import Observer, TrainingProgress, WorkProgress
from tests.stages.compare.compared import COMPARISON
from tests.test_cli import FILE, REPORT, invoke, progress, recipe, stand_in, terminal, written

__all__ = ["recipe"]  # a fixture


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def scoring(done: int, total: int | None = 600) -> WorkProgress:
    return WorkProgress("scoring", done, total, "rows")


def run_through(observer: Observer) -> None:
    """Everything that an observer can be told of."""
    observer.stage_started("export gguf_q8_0")
    observer.stage_started("export gguf_q8_0 rung 0 original")
    observer.work(scoring(0))
    observer.work(scoring(300))
    observer.work(scoring(600))
    observer.training(progress(50))
    observer.note("resuming at step 3")
    observer.stage_done("export gguf_q8_0 rung 0 original", "validation 1.5", seconds=2.0, reused=False)
    observer.stage_done("export gguf_q8_0", "verified", seconds=3.0, reused=True)


# While a run works.


def test_plain_lines_tell_of_long_work_every_ten_seconds_and_of_short_work_never() -> None:
    console, clock = Console(file=io.StringIO(), force_terminal=False, width=200), Clock()
    watch = PlainWatch(console, clock)
    for done in range(0, 600, 10):
        watch.work(scoring(done))
        clock.now += 0.5
    watch.work(scoring(600))
    for done in (0, 300, 600):
        watch.work(scoring(done))
        clock.now += 3
    lines = written(console).splitlines()
    assert [line.split("  ")[1] for line in lines] == ["scoring: 200 of 600 rows", "scoring: 400 of 600 rows"]
    assert "  20.0/s  " in lines[0]
    assert lines[0].endswith("20.0 s left")


def test_plain_lines_hold_no_control_characters() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    with watching(console) as observer:
        run_through(observer)
    assert not any(ord(character) < 32 and character != "\n" for character in written(console))


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with watching(Console(file=io.StringIO(), force_terminal=True)) as observer:
        assert isinstance(observer, PlainWatch)


def drawn(watch: LiveWatch) -> list[str]:
    """The live lines as they stand."""
    console = Console(file=io.StringIO(), width=100)
    console.print(watch.display.get_renderable())
    return [" ".join(line.split()) for line in written(console).splitlines()]


def test_a_terminal_shows_the_stages_at_work_below_each_other_and_what_they_do() -> None:
    watch = LiveWatch(terminal())
    watch.stage_started("export x")
    watch.stage_started("export x rung 0")
    watch.work(scoring(0))
    stage, rung, work = drawn(watch)
    assert stage.startswith("export x ")
    assert rung.startswith("rung 0 ")
    assert work.startswith("scoring 0:00:00 0 of 600 rows ")
    watch.work(scoring(600))
    watch.stage_done("export x rung 0", "done", seconds=1.0, reused=False)
    (stage,) = drawn(watch)
    assert stage.startswith("export x ")


def test_a_part_that_was_never_finished_goes_with_its_stage() -> None:
    watch = LiveWatch(terminal())
    watch.stage_started("merge")
    watch.work(WorkProgress("loading weights", 0, None, "steps"))
    watch.stage_done("merge", "done", seconds=1.0, reused=False)
    assert drawn(watch) == []


def test_a_line_fits_into_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=50, markup=False)
    watch = LiveWatch(console)
    watch.stage_started("export compressed_tensors_w4a16_g128 rung 4 original")
    watch.training(progress(50))
    narrow = Console(file=io.StringIO(), width=50)
    narrow.print(watch.display.get_renderable())
    lines = written(narrow).splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= 50


def test_no_colour_where_the_reader_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = terminal()
    watch = LiveWatch(console)
    with watch.display:
        run_through(watch)
        watch.display.refresh()
    # 3x and 4x are colours; bold (1) and dim (2) are none.
    assert not any(f"\x1b[{code}" in written(console) for code in (*range(30, 50), *range(90, 108), "38;", "48;"))


# --json.


def lines_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_every_event_has_the_fields_that_are_documented() -> None:
    out, clock = io.StringIO(), Clock()
    lines = JsonLines(out, clock)
    lines.stage_started("evaluate base_16bit")
    lines.work(scoring(0))
    clock.now += 2
    lines.work(scoring(300))
    lines.training(progress(5))
    lines.note("mind")
    lines.stage_done("evaluate base_16bit", "1.0 nats/token", seconds=1.0, reused=False)
    told = lines_of(out.getvalue())
    assert [line["event"] for line in told] == ["stage_started", "work", "training", "note", "stage_done"]
    for line in told:
        assert set(line) == {"event", "time", *EVENTS[line["event"]]}
    work = told[1]
    assert (work["stage"], work["done"], work["total"]) == ("evaluate base_16bit", 300, 600)
    assert (work["per_second"], work["seconds_left"]) == (150.0, 2.0)


def test_work_is_told_once_a_second() -> None:
    out, clock = io.StringIO(), Clock()
    lines = JsonLines(out, clock)
    for done in range(100):
        lines.work(scoring(done))
        clock.now += 0.1
    assert 8 <= len(lines_of(out.getvalue())) <= 10


def test_a_figure_that_is_no_number_is_null() -> None:
    out = io.StringIO()
    JsonLines(out).training(replace(progress(5), nats_per_token=float("nan")))
    assert lines_of(out.getvalue())[0]["nats_per_token"] is None


def test_a_run_in_json_says_what_it_gave(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(recipe: Recipe, *, observer: Observer, **options: object) -> RunReport:
        run_through(observer)
        return replace(REPORT, choice=Choice(FILE.format, "why"))

    stand_in(monkeypatch, run)
    code, out, err = invoke("run", recipe, "--json")
    assert (code, err) == (0, "")
    told = lines_of(out)
    for line in told:
        assert set(line) == {"event", "time", *EVENTS[line["event"]]}
    assert told[0]["event"] == "run_started"
    last = told[-1]
    assert (last["event"], last["status"], last["choice"], last["exit_code"]) == ("ended", "complete", FILE.format, 0)
    assert last["report"] == "runs/tiny/report.json"


def test_a_verb_without_a_report_ends_all_the_same(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda recipe, **options: None)
    last = lines_of(invoke("train", recipe, "--json")[1])[-1]
    assert (last["event"], last["report"], last["exit_code"]) == ("ended", None, 0)


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("below_bar", 4)])
def test_the_exit_code_of_a_run_stands_in_its_last_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    stand_in(monkeypatch, lambda recipe, **options: replace(REPORT, status=status))
    ended, out, _ = invoke("run", recipe, "--json")
    assert (ended, lines_of(out)[-1]["exit_code"]) == (code, code)


def raising(error: BaseException) -> Callable[..., None]:
    def run(recipe: Recipe, **options: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.DataError("rows.jsonl: bad"), 2),
        (errors.TrainingError("loss is nan"), 3),
        (errors.Interrupted("saved"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_a_line_too_and_keeps_its_exit_code(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    stand_in(monkeypatch, raising(error))
    ended, out, err = invoke("run", recipe, "--json")
    last = lines_of(out)[-1]
    assert (ended, last["event"], last["exit_code"]) == (code, "error", code)
    assert last["message"] == err.strip()


def test_a_recipe_with_problems_is_an_error_line(recipe: Path) -> None:
    code, out, err = invoke("run", recipe, "--json", "--set", "lora.rnak=3")
    (line,) = lines_of(out)
    assert (code, line["event"]) == (2, "error")
    assert "Did you mean 'rank'?" in line["message"]
    assert line["message"] == err.strip()


def test_check_in_json_holds_the_recipe_and_all_predictions(recipe: Path) -> None:
    code, out, err = invoke("check", recipe, "--json")
    (line,) = lines_of(out)
    assert (code, err, line["exit_code"], line["problems"]) == (0, "", 0, [])
    assert set(line) == {"event", "time", *EVENTS["check"]}
    training = line["memory"][0]
    assert training["purpose"] == "training"
    assert training["needed"]["total"] >= sum(training["needed"]["items"].values()) > 0


def test_check_in_json_tells_every_problem(recipe: Path) -> None:
    code, out, err = invoke("check", recipe, "--json", "--set", "base_model.path=nowhere")
    (line,) = lines_of(out)
    assert (code, line["exit_code"]) == (2, 2)
    assert "there is no folder nowhere" in line["problems"][0]
    assert "tiny.yaml: 1 problem" in err


def test_the_events_are_listed_on_demand() -> None:
    code, out, _ = invoke("events")
    assert code == 0
    for event, fields in EVENTS.items():
        part = out.partition(f"\n{event}\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in part.splitlines()] == list(fields)


# compare.


def compared(recipe: Recipe, *, observer: Observer, command: str, **options: object) -> Comparison:
    run_through(observer)
    return replace(COMPARISON, command=command)


def test_a_comparison_tells_people_the_table_and_where_the_page_lies(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "compare", compared)
    code, out, err = invoke("compare", recipe)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "tiny.yaml -> runs/tiny"
    assert any(line.strip().startswith("gptq_int4 *") for line in lines)
    assert "awq_int4: not measured: a | b <script> *bold*" in lines
    page = Path("runs/tiny/compare.html")
    assert f"Page: {page}  (text: {page.with_suffix('.md')})" in lines


def test_a_comparison_in_json_says_what_it_gave(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "compare", compared)
    code, out, err = invoke("compare", recipe, "--json")
    assert (code, err) == (0, "")
    told = lines_of(out)
    for line in told:
        assert set(line) == {"event", "time", *EVENTS[line["event"]]}
    assert told[0]["event"] == "run_started"
    assert "stage_started" in {line["event"] for line in told}
    last = told[-1]
    assert (last["event"], last["recommended"], last["exit_code"]) == ("compared", "gptq_int4", 0)
    assert last["is_within_bounds"]
    assert last["failed"] == {"awq_int4": "a | b <script> *bold*"}
    assert (last["comparison"], last["page"]) == ("runs/tiny/compare.json", "runs/tiny/compare.html")


def test_a_quiet_comparison_prints_where_its_result_lies_and_nothing_else(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "compare", compared)
    assert invoke("compare", recipe, "--quiet") == (0, "runs/tiny/compare.json\n", "")
    assert invoke("compare", recipe, "-q")[0] == 0


def test_a_comparison_knows_the_command_that_repeats_it(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def keep(recipe: Recipe, *, command: str, **options: object) -> Comparison:
        commands.append(command)
        return COMPARISON

    monkeypatch.setattr(pipeline, "compare", keep)
    invoke("compare", recipe, "--set", "compare.methods=[nf4, fp4]", "-q")
    assert commands == ["qlora-trainer compare tiny.yaml --set 'compare.methods=[nf4, fp4]'"]


@pytest.mark.parametrize(("flag", "told"), [("--json", '"event": "error"'), ("--quiet", "")])
def test_a_comparison_that_fails_keeps_its_exit_code_in_every_voice(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, flag: str, told: str
) -> None:
    monkeypatch.setattr(pipeline, "compare", raising(errors.BaseModelError("no numbers")))
    code, out, err = invoke("compare", recipe, flag)
    assert (code, err) == (2, "no numbers\n")
    assert told in out


# --quiet.


def test_a_quiet_run_prints_where_the_report_lies_and_nothing_else(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(recipe: Recipe, *, observer: Observer, **options: object) -> RunReport:
        run_through(observer)
        return replace(REPORT, status="below_bar")

    stand_in(monkeypatch, run)
    assert invoke("run", recipe, "--quiet") == (4, "runs/tiny/report.json\n", "")
    assert invoke("run", recipe, "-q")[0] == 4


def test_a_quiet_verb_without_a_report_prints_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda recipe, **options: None)
    assert invoke("train", recipe, "--quiet") == (0, "", "")


def test_a_quiet_check_prints_problems_only(recipe: Path) -> None:
    assert invoke("check", recipe, "--quiet") == (0, "", "")
    code, out, err = invoke("check", recipe, "--quiet", "--set", "base_model.path=nowhere")
    assert (code, out) == (2, "")
    assert err.startswith("tiny.yaml: 1 problem\n- base_model.path")


def test_a_quiet_error_is_still_told(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, raising(errors.TrainingError("loss is nan")))
    assert invoke("run", recipe, "--quiet") == (3, "", "loss is nan\n")


def test_quiet_and_json_exclude_each_other(recipe: Path) -> None:
    code, _, err = invoke("run", recipe, "--quiet", "--json")
    assert code == 2
    assert "exclude each other" in " ".join(err.split())


def test_training_progress_is_told_with_the_names_of_its_record() -> None:
    assert set(EVENTS["training"]) == set(TrainingProgress.__dataclass_fields__)
    assert set(WorkProgress.__dataclass_fields__) < set(EVENTS["work"])
