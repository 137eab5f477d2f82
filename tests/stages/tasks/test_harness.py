"""Tasks on a tiny model: the same figures as the harness's own class gives, on task files of this test."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'qlora-trainer[eval]'")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError
from qlora_trainer.runners import transformers as runner
from qlora_trainer.stages.tasks import Library, TaskPlan, TaskSubject, open_library, run_task
from qlora_trainer.stages.tasks.folders import with_found_data
from qlora_trainer.stages.tasks.language_model import HarnessModel
from tests.stages.tasks.own_tasks import CHOICE, TASKS, UNTIL, write_tasks

PLAN = TaskPlan(limit=None, batch_size=3, window=64, is_chat=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("own tasks")
    write_tasks(place)
    (place / "sampled.yaml").write_text(
        UNTIL.replace("own_until", "sampled").replace("do_sample: false", "do_sample: true, temperature: 0.7")
    )
    (place / "lost.yaml").write_text(CHOICE.replace("own_choice", "lost").replace("items.jsonl", "nowhere.jsonl"))
    return place


@pytest.fixture(scope="module")
def library(folder: Path) -> Iterator[Library]:
    with open_library((*TASKS, "sampled", "lost"), [folder]) as found:
        yield found


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> torch.nn.Module:
    return runner.load(llama_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def text(llama_folder: Path) -> TextTokenizer:
    return TextTokenizer.load(llama_folder)


@pytest.fixture(scope="module")
def subject() -> TaskSubject:
    return TaskSubject("base_16bit", "transformers", "abc")


@pytest.fixture(scope="module")
def oracle(llama_folder: Path, model: torch.nn.Module, folder: Path) -> Any:
    """What the harness's own class for transformers gives."""
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=PLAN.window)
    with with_found_data(folder) as place:
        manager = TaskManager(include_path=str(place), include_defaults=False)
        return lm_eval.simple_evaluate(model=theirs, tasks=list(TASKS), task_manager=manager, bootstrap_iters=1000)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.filterwarnings("default")  # the oracle's own calls warn of what is deprecated in transformers
def test_figures_are_those_of_the_harnesss_own_class(
    name: str, model: torch.nn.Module, text: TextTokenizer, library: Library, subject: TaskSubject, oracle: Any
) -> None:
    found = run_task(name, model, text, library=library, plan=PLAN, subject=subject)
    theirs = oracle["results"][name]
    assert {score.metric for score in found.scores} >= {
        key.split(",")[0] for key in theirs if key.endswith(",none")
    } - {key.split(",")[0] for key in theirs if "stderr" in key}
    for score in found.scores:
        # The order of sums in a batch of other width: float32, some hundred tokens.
        assert score.value == pytest.approx(theirs[f"{score.metric},none"], rel=1e-5)
        stderr = theirs[f"{score.metric}_stderr,none"]
        if score.stderr is not None and score.items:
            assert score.stderr == pytest.approx(stderr, rel=1e-5)
    assert (found.items, found.harness, found.truncated) == (11, lm_eval.__version__, 0)


def test_answers_are_those_of_the_harnesss_own_class(model: torch.nn.Module, text: TextTokenizer, oracle: Any) -> None:
    asked = HarnessModel(model, text, batch_size=4, window=64)
    samples = sorted(oracle["samples"]["own_until"], key=lambda each: each["doc_id"])
    requests = [type("Request", (), {"args": tuple(each["arguments"][0])})() for each in samples]
    assert asked.generate_until(requests) == [each["resps"][0][0] for each in samples]


def test_each_item_has_its_value_and_the_mean_is_the_figure(
    model: torch.nn.Module, text: TextTokenizer, library: Library, subject: TaskSubject
) -> None:
    plan = TaskPlan(limit=7, batch_size=2, window=64, is_chat=False)
    found = run_task("own_choice", model, text, library=library, plan=plan, subject=subject)
    accuracy = next(score for score in found.scores if score.metric == "acc")
    assert len(accuracy.items) == 7
    assert sum(accuracy.items) / 7 == pytest.approx(accuracy.value)
    assert (found.version, found.shots, found.limit) == ("3", 0, 7)
    # Standard error of a mean of 0s and 1s, from the items themselves.
    share = accuracy.value
    assert accuracy.stderr == pytest.approx(math.sqrt(share * (1 - share) / 6))


def test_requests_longer_than_the_window_are_counted(
    model: torch.nn.Module, text: TextTokenizer, library: Library, subject: TaskSubject
) -> None:
    narrow = TaskPlan(limit=None, batch_size=4, window=8, is_chat=False)
    assert run_task("own_choice", model, text, library=library, plan=narrow, subject=subject).truncated > 0


def test_items_go_through_the_chat_template_where_that_was_asked(
    model: torch.nn.Module, text: TextTokenizer, library: Library, subject: TaskSubject
) -> None:
    def scores(*, is_chat: bool) -> list[float]:
        plan = TaskPlan(limit=None, batch_size=4, window=96, is_chat=is_chat)
        seen: list[float] = []
        asked = run_task(
            "own_rolling" if not is_chat else "own_choice", model, text, library=library, plan=plan, subject=subject
        )
        seen += [score.value for score in asked.scores]
        assert asked.is_chat is is_chat
        return seen

    assert scores(is_chat=True)
    rendered = HarnessModel(model, text, batch_size=1, window=96).apply_chat_template(
        [{"role": "user", "content": "hi"}]
    )
    assert rendered == "<s><|user|>hi<|assistant|>"
    assert HarnessModel(model, text, batch_size=1, window=96).tok_encode(rendered)[0] == text.bos_id


def test_what_cannot_be_asked_is_told_with_the_tasks_name(
    model: torch.nn.Module, text: TextTokenizer, library: Library, subject: TaskSubject
) -> None:
    with pytest.raises(DataError, match=r"task sampled: .*do_sample: false"):
        run_task("sampled", model, text, library=library, plan=PLAN, subject=subject)
    with pytest.raises(DataError, match=r"task lost cannot be asked of base_16bit: .*nowhere\.jsonl"):
        run_task("lost", model, text, library=library, plan=PLAN, subject=subject)
    short = TaskPlan(limit=None, batch_size=4, window=10, is_chat=False)
    with pytest.raises(DataError, match="12 new tokens, and the window is 10"):
        run_task("own_until", model, text, library=library, plan=short, subject=subject)
