"""The command line: what is printed, where, and with which exit code."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

from qlora_trainer import errors, pipeline
from qlora_trainer.cli import app
from qlora_trainer.cli.app import make_app
from qlora_trainer.cli.checked import show_preflight
from qlora_trainer.cli.format_help import FORMATS
from qlora_trainer.cli.guard import guarded
from qlora_trainer.cli.screen import duration, prepare_output, printable, size
from qlora_trainer.cli.summary import show_report
from qlora_trainer.cli.verbs import VERBS
from qlora_trainer.cli.watching import LiveWatch, watching
from qlora_trainer.export_formats import FACTS
from qlora_trainer.preflight import Preflight
from qlora_trainer.recipe import Recipe
from qlora_trainer.recipe_file import load
from qlora_trainer.records import ExportFigures, Gap, RunReport, StageFigures, TrainingFigures
from qlora_trainer.runtime.progress import Observer, TrainingProgress

RECIPE = """\
# A recipe for tests.
run: {{name: tiny}}
base_model: {{path: {base}}}
data: {{train: rows.jsonl, validation_rows: 4, test_rows: 6}}
training: {{max_steps: 5}}
expected: {{hardware: 2 cores, measured: 2026-01-15, nats_per_token: {{base_16bit: 1.25}}, within: 0.02, seconds: 90}}
"""
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "wandb", "huggingface_hub", "numpy")

TRAINING = TrainingFigures(
    steps=5,
    tokens=1000,
    label_tokens=400,
    tokens_per_second=100.0,
    label_tokens_per_second=40.0,
    peak_bytes=2**30,
    predicted_peak_bytes=2**30,
    final_nats_per_token=1.5,
    seconds=10.0,
    trainable_parameters=1000,
)
BASE = StageFigures(
    name="base_16bit",
    runtime="transformers",
    nats_per_token=2.5,
    interval=(2.25, 2.75),
    metrics={"exact_match": 0.125, "bleu": 12.5},
    metric_intervals={"exact_match": (0.0625, 0.1875)},
    bytes=3 * 2**20,
    tokens_per_second=1234.0,
    generated_tokens_per_second=None,
    peak_bytes=2**30,
    kl_to_trained=None,
    top1_agreement=None,
)
FILE = ExportFigures(
    format="compressed_tensors_w8a16",
    bits=8,
    path="runs/tiny/exports/compressed_tensors_w8a16",
    bytes=2**20,
    runtime="transformers",
    rung=0,
    gain_kept=0.975,
    interval=(0.9, 1.05),
    why_null=None,
    kl_to_trained=0.00125,
    top1_agreement=0.99,
    verified=True,
    verification="equal",
    sha256={},
)
REPORT = RunReport(
    recipe="tiny",
    status="complete",
    seconds=10.0,
    sentence="Training on your task won 1.00 nats per token.",
    training=TRAINING,
    stages=(BASE, replace(BASE, name="export:compressed_tensors_w8a16", nats_per_token=1.5, kl_to_trained=0.00125)),
    gap=Gap(0.1, (0.0, 0.2), 1.0, (0.9, 1.1), 10.0, None),
    exports=(FILE,),
    choice=None,
    quantization={},
    expected=(),
    environment={},
)


@pytest.fixture
def recipe(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe for a tiny base, its data beside it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Call {number}", "completion": f"call({number})"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(base=llama_folder), encoding="utf-8")
    return path.relative_to(tmp_path)


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(make_app(), [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Callable[..., RunReport | None]) -> None:
    """Puts ``run`` in the place of the pipeline, whose own tests are elsewhere."""
    monkeypatch.setattr(pipeline, "run", run)


# Speed: the whole process, as a user starts it.


def run_process(code: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done, time.monotonic() - began


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["check", "tiny.yaml"]])
def test_help_and_check_answer_without_importing_what_is_slow(recipe: Path, arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['qlora-trainer', *{arguments}]\n"
        "from qlora_trainer.cli import main\n"
        "try: main()\n"
        f"finally: sys.stderr.write(','.join(name for name in {HEAVY} if name in sys.modules))\n"
    )
    done, seconds = run_process(code, recipe.absolute().parent)
    assert (done.returncode, done.stderr) == (0, "")
    # Measured: 0.2 s and 0.6 s on an idle core. This bound is for a machine with other work on it.
    assert seconds < 3


def test_the_module_is_the_command(recipe: Path) -> None:
    code = "import runpy, sys; sys.argv = ['qlora-trainer', '--version']; runpy.run_module('qlora_trainer')"
    done, _ = run_process(code, recipe.absolute().parent)
    assert (done.returncode, done.stdout) == (0, "0.1.0\n")


# check.


def test_check_shows_everything_and_ends_with_the_command_to_run(recipe: Path) -> None:
    code, out, err = invoke("check", recipe, "--set", "training.max_steps=7", "--set", "tracking.tags=[a, b]")
    assert (code, err) == (0, "")
    titles = [line for line in out.splitlines() if line and not line.startswith((" ", "<"))]
    assert titles == [
        "Recipe, defaults included",
        "Prediction: training, memory of this machine",
        "What fits into that memory, by training.checkpointing",
        "Prediction: evaluation, memory of this machine",
        "Prediction: the run, disk of runs",
        "Plan",
        "What the label masks train",
        "The first training row; trained: [[between brackets]]",
        "Ready: qlora-trainer run tiny.yaml --set training.max_steps=7 --set 'tracking.tags=[a, b]'",
    ]


def test_check_prints_the_resolved_recipe_with_overrides(recipe: Path) -> None:
    _, out, _ = invoke("check", recipe, "--set", "training.max_steps=7")
    text = out.partition("Recipe, defaults included\n")[2].partition("\nPrediction")[0]
    assert Recipe.model_validate(yaml.safe_load(text)) == load(recipe, ["training.max_steps=7"])


def test_check_puts_trained_tokens_between_brackets_where_there_is_no_colour(recipe: Path) -> None:
    _, out, _ = invoke("check", recipe)
    example = out.partition("[[between brackets]]\n")[2].splitlines()[0]
    prompt, _, answer = example.partition("<|assistant|>")
    number = prompt.removeprefix("<s><|user|>Call ")
    assert answer == f"[[call({number})</s>]]"


def test_check_colours_trained_tokens_on_a_terminal() -> None:
    console = terminal()
    found = Preflight((), None, (), (), (("Call 7", False), ("call(7)", True)), (), ())
    show_preflight(console, found, recipe_text="")
    out = written(console)
    assert "\x1b[2mCall 7\x1b[0m\x1b[1;32mcall(7)\x1b[0m" in out
    assert "[[" not in out


def test_check_tells_all_problems_and_exits_with_2(recipe: Path) -> None:
    Path("rows.jsonl").unlink()
    code, out, err = invoke("check", recipe, "--set", "base_model.path=nowhere")
    assert code == 2
    assert "Ready" not in out
    assert err.startswith("\ntiny.yaml: 2 problems\n- base_model.path: there is no folder nowhere")
    assert "rows.jsonl" in err


# The verbs that carry a recipe some way.


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_runs_the_pipeline_up_to_its_stage(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, verb: object
) -> None:
    assert isinstance(verb, type(VERBS[0]))
    asked: dict[str, object] = {}

    def run(recipe: Recipe, **options: object) -> RunReport | None:
        asked.update(options, steps=recipe.training.max_steps)
        return REPORT if options["until"] == "report" else None

    stand_in(monkeypatch, run)
    code, out, err = invoke(verb.name, recipe, "--set", "training.max_steps=3")
    assert (code, err) == (0, "")
    assert (asked["until"], asked["steps"], asked["trust_remote_code"]) == (verb.until, 3, False)
    last = out.splitlines()[-1]
    following = f"Next: qlora-trainer {verb.following} tiny.yaml --set training.max_steps=3"
    assert last == following if verb.following else last.startswith("Took ")


def test_remote_code_is_trusted_only_by_the_flag(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted: list[object] = []
    stand_in(monkeypatch, lambda recipe, **options: trusted.append(options["trust_remote_code"]))
    invoke("train", recipe, "--trust-remote-code")
    assert trusted == [True]
    code, _, err = invoke("train", recipe, "--set", "base_model.trust_remote_code=true")
    assert code == 2
    assert "base_model.trust_remote_code: unknown key" in err


def test_a_run_tells_each_stage_and_the_table_in_plain_lines(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(recipe: Recipe, *, observer: Observer, **options: object) -> RunReport:
        observer.stage_started("quantize")
        observer.stage_done("quantize", "14 layers", seconds=1.25, reused=False)
        observer.stage_done("merge", "into the base", seconds=1.25, reused=True)
        observer.note("resuming at step 3")
        return REPORT

    stand_in(monkeypatch, run)
    code, out, err = invoke("run", recipe)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:5] == [
        "tiny.yaml -> runs/tiny",
        "quantize ...",
        "quantize 1.2 s 14 layers",
        "merge reused into the base",
        "note: resuming at step 3",
    ]
    assert "Report: runs/tiny/report.html" in lines
    assert not any(character for character in out if ord(character) < 32 and character != "\n")


def test_a_run_whose_file_is_not_verified_exits_with_1(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = replace(REPORT, status="failed", exports=(replace(FILE, verified=False),))
    stand_in(monkeypatch, lambda recipe, **options: failed)
    code, out, _ = invoke("run", recipe)
    assert code == 1
    assert " NO " in out


@pytest.mark.parametrize("verb", ["run", "report"])
def test_a_run_with_a_file_below_its_bar_exits_with_4(recipe: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    below = replace(REPORT, status="below_bar", exports=(replace(FILE, status="below_bar", bar=0.995),))
    stand_in(monkeypatch, lambda recipe, **options: below)
    code, out, _ = invoke(verb, recipe)
    assert code == 4
    assert "BELOW THE BAR" in out


def test_every_exit_code_is_documented_and_stands_for_one_thing() -> None:
    codes = {app.UNVERIFIED, app.REFUSED, app.BELOW_BAR, *(kind.exit_code for kind in kinds(errors.TrainerError))}
    _, out, _ = invoke("--help")
    told = [line.split()[0] for line in out.partition("Exit codes:\n")[2].partition("\n\n")[0].splitlines()]
    assert told == ["0", *map(str, sorted(codes))]
    for verb in ("run", "report"):
        text = " ".join(invoke(verb, "--help")[1].split())
        assert "The exit code is 1 where an exported file could not be verified, and 4 where" in text


def test_the_help_of_export_lists_every_format_below_its_runtime() -> None:
    listed = {name: runtime for runtime, formats in FORMATS.items() for name in formats}
    assert set(listed) == set(FACTS)
    for name, facts in FACTS.items():
        assert listed[name].startswith("llama.cpp" if facts.runtime == "llama_cpp" else "transformers")
        assert ("GPTQModel" in listed[name]) == (facts.package is not None and "gptqmodel" in facts.package.modules)


def test_the_help_of_a_format_agrees_with_what_it_is() -> None:
    texts = {name: text for formats in FORMATS.values() for name, text in formats.items()}
    for name, facts in FACTS.items():
        if facts.kind != "adapter":
            assert re.search(rf"\b{facts.bits}( bit|-bit)", texts[name]), name
        assert (facts.kind == "library") == ("rounded by" in texts[name]), name


def test_the_help_of_export_keeps_its_lines_and_says_how_to_install() -> None:
    code, out, _ = invoke("export", "--help")
    assert code == 0
    for name, text in FORMATS["llama.cpp"].items():
        assert re.search(rf"^ +{name} +{re.escape(text)}$", out, re.MULTILINE)
    assert 'pip install "qlora-trainer[gguf]"' in out
    assert "pip install gptqmodel optimum" in out
    assert "Rungs: 0 to nearest, 1 GPTQ, 2 GPTQ + tuned scales" in out


def test_a_recipe_with_problems_is_told_before_anything_runs(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda recipe, **options: pytest.fail("must not run"))
    code, out, err = invoke("run", recipe, "--set", "lora.rnak=3")
    assert (code, out) == (2, "")
    assert err == "tiny.yaml: 1 problem\n  --set lora.rnak=3: lora.rnak: unknown key. Did you mean 'rank'?\n"


# Errors.


def kinds(root: type[errors.TrainerError]) -> list[type[errors.TrainerError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in kinds(child))]


@pytest.mark.parametrize("kind", kinds(errors.TrainerError))
def test_an_error_that_can_be_mended_is_told_without_a_traceback(
    kind: type[errors.TrainerError], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, guarded():
        raise kind("what, where, mend \x1b[31m")
    assert caught.value.exit_code == kind.exit_code != 0
    assert capsys.readouterr() == ("", "what, where, mend \\x1b[31m\n")


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, guarded():
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert "run the same command again" in capsys.readouterr().err


def test_an_unexpected_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), guarded():
        _ = 1 / 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "x.yaml"], "No such command 'trian'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "x", "--st", "a"], "No such option: --st"),
    ],
)
def test_a_mistyped_command_is_refused_with_2(arguments: list[str], message: str) -> None:
    code, _, err = invoke(*arguments)
    assert code == 2
    assert message in err


# While a run works.


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=120, markup=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def progress(step: int) -> TrainingProgress:
    return TrainingProgress(
        step=step,
        steps=100,
        nats_per_token=1.2345,
        learning_rate=2e-4,
        label_tokens_per_second=5300.0,
        memory_bytes=3 * 2**29,
        seconds_left=125.0,
    )


def test_training_is_told_now_and_then_and_at_the_end_in_plain_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    with watching(console) as observer:
        for step in range(10, 110, 10):
            observer.training(progress(step))
    assert written(console).splitlines() == [
        f"train: step {step} of 100  1.2345 nats/token  5,300 label tokens/s  1.50 GiB  2 min 05 s left"
        for step in (10, 100)
    ]


def test_a_terminal_shows_a_bar_while_training_and_keeps_finished_stages() -> None:
    console = terminal()
    watch = LiveWatch(console)
    with watch.display:
        watch.stage_started("train")
        watch.training(progress(50))
        watch.display.refresh()
        watch.stage_done("train", "100 steps", seconds=60.0, reused=False)
        watch.stage_done("merge", "[bold] is text", seconds=60.0, reused=True)
    out = written(console)
    assert "1.2345 nats/token" in out
    assert "100 steps" in out
    assert "[bold] is text" in out


def test_a_terminal_is_put_back_in_order_after_an_error() -> None:
    console = terminal()
    watch = watching(console)
    watch.__enter__().stage_started("train")
    watch.__exit__(errors.DataError, errors.DataError("no rows"), None)
    # The cursor is shown again and the bar's line is wiped.
    assert written(console).endswith("\x1b[?25h\r\x1b[1A\x1b[2K")


# What a run gave.


def cells(out: str, first: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.strip().startswith(first))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_table_has_a_row_for_every_stage() -> None:
    console = Console(file=io.StringIO(), width=200, markup=False)
    show_report(console, REPORT, folder=Path("runs/tiny"), seconds=75.0, peak_bytes=2**30)
    out = written(console)
    assert cells(out, "base_16bit") == [
        "base_16bit", "2.5000 [2.250,2.750]", "12.5 [6.2,18.8]", "12.5", "-", "3.0 MiB", "1,234",
    ]  # fmt: skip
    assert cells(out, "export:")[:2] == ["export:compressed_tensors_w8a16", "1.5000 [2.250,2.750]"]
    assert REPORT.sentence in out
    assert "Took 1 min 15 s; at most 1.00 GiB resident" in out


def shown(*exports: ExportFigures) -> str:
    console = Console(file=io.StringIO(), width=200, markup=False)
    show_report(console, replace(REPORT, exports=exports), folder=Path("x"), seconds=1.0, peak_bytes=0)
    return written(console)


ROUNDED = replace(
    FILE,
    rung=2,
    merged_into="original",
    bar=0.995,
    loss_above_trained=0.0123,
    loss_above_trained_interval=(0.01, 0.015),
)


def test_the_table_of_files_tells_how_each_was_made_and_how_good_it_is() -> None:
    assert cells(shown(ROUNDED), "compressed_tensors_w8a16") == [
        "compressed_tensors_w8a16", "2", "original", "97.5 % [90.0,105.0]", "99.5 %", "+0.0123", "yes", "complete",
    ]  # fmt: skip
    adapter = replace(FILE, format="peft_adapter", bits=16)
    assert cells(shown(adapter), "peft_adapter")[1:5] == ["-", "-", "97.5 % [90.0,105.0]", "-"]


def test_a_run_without_exports_has_no_table_of_files() -> None:
    assert "merged into" in shown(ROUNDED)
    assert "merged into" not in shown()


def test_a_file_below_its_bar_has_a_line_of_its_own() -> None:
    out = shown(replace(ROUNDED, status="below_bar"))
    assert cells(out, "compressed_tensors_w8a16")[-2:] == ["yes", "BELOW THE BAR"]
    line = "below the bar: compressed_tensors_w8a16 keeps 97.50 % [90.00,105.00] of what training won; the recipe asks "
    assert f"\n{line}for 99.5 % at the lower end\n" in out
    assert "below the bar" not in shown(ROUNDED)


def test_a_file_below_its_bar_without_a_gain_is_told_by_its_distance() -> None:
    out = shown(replace(ROUNDED, status="below_bar", gain_kept=None, interval=None))
    assert "has KL 0.00125 and a loss up to 0.0150 nats/token above the trained model's" in out


def test_a_file_that_is_not_verified_is_not_told_as_below_the_bar() -> None:
    out = shown(replace(ROUNDED, verified=False, status="unverified"))
    assert cells(out, "compressed_tensors_w8a16")[-2:] == ["NO", "unverified"]
    assert "below the bar" not in out


# recipes.


def test_recipes_are_listed_with_their_first_comment_and_expected_figures(recipe: Path) -> None:
    Path("bad.yaml").write_text("run: 5\n", encoding="utf-8")
    code, out, err = invoke("recipes", ".")
    assert (code, err) == (0, "")
    bad, tiny = out.split("\ntiny.yaml\n")
    assert "cannot be used: bad.yaml: 4 problems" in bad
    assert tiny.startswith("  A recipe for tests.\n  base: ")
    assert "expected on 2 cores, measured 2026-01-15, within 0.02 nats:\n    base_16bit 1.2500\n    1 min 30 s" in tiny


@pytest.mark.parametrize(("folder", "message"), [("nowhere", "there is no folder nowhere"), (".", "holds no *.yaml")])
def test_a_folder_without_recipes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = invoke("recipes", folder)
    assert code == 2
    assert message in err


def test_every_setting_is_documented_on_demand() -> None:
    code, out, _ = invoke("recipes", "--fields")
    assert code == 0
    assert "\nlora:  (optional)\n" in out
    assert "  rank: whole number > 0 (default 16)\n      Rank of B A." in out
    assert "  name: text (required)\n" in out


# Text and streams.


def test_control_characters_are_spelt_out_and_letters_are_not() -> None:
    assert printable("a\x1b[31m\tb\n한국어 é\u202e") == "a\\x1b[31m\\tb\n한국어 é\\u202e"


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.25, "8.2 s"), (125, "2 min 05 s"), (11220, "3 h 07 min"), (3599.9, "1 h 00 min")]
)
def test_durations_are_told_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(3 * 2**20, "3.0 MiB"), (3 * 2**29, "1.50 GiB"), (0, "0.0 MiB")])
def test_sizes_are_told_in_mib_or_gib(count: int, text: str) -> None:
    assert size(count) == text


def test_warnings_go_to_standard_error_and_infos_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    prepare_output()
    logging.getLogger("qlora_trainer.test").warning("mind %s", "this")
    logging.getLogger("qlora_trainer.test").info("never mind")
    assert capsys.readouterr() == ("", "WARNING: mind this\n")
