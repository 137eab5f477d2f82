"""A finished run put to use: ``pipeline.talk``, and the commands ``chat``, ``generate`` and ``serve``."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from qlora_trainer import pipeline
from qlora_trainer.cli.app import make_app
from qlora_trainer.cli.speaking import Speakers
from qlora_trainer.errors import DataError, RunFolderError
from qlora_trainer.pipeline import Sampling
from qlora_trainer.recipe import Data, Recipe
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.serving import models_of, serve_commands
from qlora_trainer.stages.converse import Voice, prompt_ids
from tests.finished import FinishedRun
from tests.test_pipeline import recipe_for

FORMATS = ("peft_adapter", "merged_16bit", "compressed_tensors_w8a16")
GREEDY = Sampling()
ASKED = [{"role": "user", "content": "Remind me at 203"}]


@pytest.fixture(scope="module")
def finished(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunFolder]:
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_for(
        llama_folder, folder, export={"formats": FORMATS}, merge={"into": "dequantized"}, evaluation={"samples": 3}
    )
    pipeline.run(recipe)
    return recipe, RunFolder(folder / "runs" / "tiny")


def invoke(*arguments: object, said: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(make_app(), [str(argument) for argument in arguments], input=said)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def said_by(recipe: Recipe, at: str | None = None) -> str:
    return "".join(pipeline.talk(recipe, at).answer(ASKED, GREEDY, max_new_tokens=8))


# Models.


def test_every_model_of_a_run_speaks(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    names = models_of(folder, recipe).names
    assert names == ("base", "quantized", "trained", "merged", "compressed_tensors_w8a16", "peft_adapter")
    answers = {name: said_by(recipe, name) for name in names}
    assert answers["peft_adapter"] == answers["trained"]
    assert answers["base"] != answers["trained"]
    assert said_by(recipe, "adapter_unmerged") == answers["trained"]
    assert said_by(recipe, "export:merged_16bit") == answers["merged"]


def test_a_streamed_answer_is_the_one_that_the_evaluation_has_measured(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    voice = pipeline.talk(recipe, "trained")
    record = json.loads((folder.stages / "evaluate-adapter_unmerged.json").read_text(encoding="utf-8"))["record"]
    assert len(record["samples"]) == 3
    for sample in record["samples"]:
        asked = [{"role": "user", "content": sample["prompt"]}]
        pieces = list(voice.answer(asked, GREEDY, max_new_tokens=recipe.evaluation.max_new_tokens))
        assert "".join(pieces).strip() == sample["output"]
        assert len(pieces) > 1


def test_without_a_name_the_recommended_file_speaks(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    choice = json.loads(folder.report_json.read_text(encoding="utf-8"))["choice"]["format"]
    assert models_of(folder, recipe).named(None) == {"merged_16bit": "merged"}.get(choice, choice)
    assert pipeline.talk(recipe).name == models_of(folder, recipe).recommended


def test_a_model_that_is_not_there_is_told_with_those_that_are(finished: tuple[Recipe, RunFolder]) -> None:
    with pytest.raises(RunFolderError, match=r"no model 'mergd'. Did you mean merged\? It has: base, quantized"):
        pipeline.talk(finished[0], "mergd")


def test_a_run_that_trained_nothing_cannot_be_talked_to(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no trained adapter"):
        pipeline.talk(recipe_for(llama_folder, tmp_path))


def test_characters_of_several_tokens_come_whole(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, _ = finished
    tokenizer = pipeline.talk(recipe, "base").tokenizer
    text = "né 日本"
    voice = Voice("x", recipe.data, tokenizer, None, Recited([*tokenizer.encode(text), tokenizer.stop_ids[0]]))
    pieces = list(voice.answer(ASKED, GREEDY, max_new_tokens=100))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_recipes_know_one_prompt_and_no_answer_without_a_question(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, _ = finished
    tokenizer = pipeline.talk(recipe, "base").tokenizer
    data = Data(train="x", validation_rows=1, test_rows=1, render="text", text_template="Q: {prompt}\n")
    recited = Recited([tokenizer.stop_ids[0]])
    voice = Voice("x", data, tokenizer, None, recited)
    assert "".join(voice.answer(ASKED, GREEDY, max_new_tokens=5)) == ""
    assert recited.heard == [tokenizer.bos_id, *tokenizer.encode("Q: Remind me at 203\n")]
    with pytest.raises(DataError, match="the last message must be the user's"):
        list(voice.answer([], GREEDY, max_new_tokens=5))


class Recited:
    """Steps that write a text known beforehand."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids, self.heard = token_ids, list[int]()

    def next_logits(self, token_ids: list[int], *, start: int) -> torch.Tensor:
        self.heard = self.heard or list(token_ids)
        said = start + len(token_ids) - len(self.heard)
        return torch.nn.functional.one_hot(torch.tensor(self.token_ids[said]), 400).float()


@pytest.mark.parametrize(
    ("room", "problem"), [(3, "answer is cut off"), (0, "Ask more briefly"), (-2, "Ask more briefly")]
)
def test_a_conversation_beyond_the_window_is_told(finished: tuple[Recipe, RunFolder], room: int, problem: str) -> None:
    recipe, _ = finished
    tokenizer = pipeline.talk(recipe, "base").tokenizer
    text = tokenizer.encode("never ending")
    window = len(prompt_ids(ASKED, recipe.data, tokenizer)) + room
    voice = Voice("merged", recipe.data, tokenizer, window, Recited(text))
    pieces: list[str] = []
    with pytest.raises(DataError, match=f"merged reads {window} tokens at most.*{problem}"):
        pieces.extend(voice.answer(ASKED, GREEDY, max_new_tokens=100))
    assert "".join(pieces) == tokenizer.decode(text[: max(0, room)], skip_special=True)


def test_an_answer_that_ends_with_the_window_is_whole(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, _ = finished
    tokenizer = pipeline.talk(recipe, "base").tokenizer
    text = [*tokenizer.encode("whole"), tokenizer.stop_ids[0]]
    window = len(prompt_ids(ASKED, recipe.data, tokenizer)) + len(text)
    voice = Voice("merged", recipe.data, tokenizer, window, Recited(text))
    assert voice.say(ASKED[0]["content"], max_new_tokens=100) == "whole"


def test_models_speak_with_the_chat_template_of_the_recipe(finished: tuple[Recipe, RunFolder], tmp_path: Path) -> None:
    recipe, _ = finished
    own = (Path(f"{recipe.base_model.path}") / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "mine.jinja").write_text(own.replace("{{ bos_token }}", "{{ bos_token }}Mine: "), encoding="utf-8")
    update = {"chat_template": str(tmp_path / "mine.jinja"), "cache_folder": str(tmp_path / "rows")}
    mine = recipe.model_copy(update={"data": recipe.data.model_copy(update=update)})
    heard = [
        prompt_ids(ASKED, voice.data, voice.tokenizer)
        for voice in (pipeline.talk(each, "base") for each in (recipe, mine))
    ]
    tokenizer = pipeline.talk(recipe, "base").tokenizer
    assert heard[1] == [tokenizer.bos_id, *tokenizer.encode("Mine: "), *heard[0][1:]]


# Files for llama.cpp.


@pytest.mark.gguf
def test_a_gguf_file_says_what_the_evaluation_has_measured(gguf_run: FinishedRun) -> None:
    kept = json.loads((gguf_run.root / "stages" / "export-gguf_q8_0.json").read_text(encoding="utf-8"))
    samples = kept["record"]["evaluation"]["samples"]
    assert samples
    voice = pipeline.talk(gguf_run.recipe, "gguf_q8_0")
    assert voice.window == 512, "what the base was made for is less than llama.cpp would be given"
    for sample in samples:
        assert voice.say(sample["prompt"], max_new_tokens=4).strip() == sample["output"]


@pytest.mark.gguf
def test_two_gguf_files_hold_a_conversation_each(gguf_run: FinishedRun) -> None:
    code, out, err = invoke(
        *("chat", gguf_run.root, "--at", "gguf_q8_0", "--compare", "gguf_q6_k", "--max-new-tokens", "6"),
        said="Remind me at 3\nAnd at 4\n/new\nRemind me at 3\n\n",
    )
    assert (code, err) == (0, "")
    answers = {}
    for name in ("gguf_q8_0", "gguf_q6_k"):
        voice = pipeline.talk(gguf_run.recipe, name)
        first = voice.say("Remind me at 3", max_new_tokens=6)
        asked = [
            {"role": "user", "content": "Remind me at 3"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And at 4"},
        ]
        answers[name] = [first, "".join(voice.answer(asked, GREEDY, max_new_tokens=6)), first]
    turns = (f"[{name}]\n{answers[name][turn]}\n" for turn in range(3) for name in answers)
    assert out.partition("forgets.\n")[2] == "".join(turns)


@pytest.mark.gguf
def test_a_prompt_that_a_gguf_file_has_no_room_for_is_told_without_a_traceback(gguf_run: FinishedRun) -> None:
    code, _, err = invoke("chat", gguf_run.root, "--at", "gguf_q8_0", said="at 3 " * 400 + "\nnever asked\n")
    assert code == 2
    assert "gguf_q8_0 reads 512 tokens at most" in err
    code, _, err = invoke("chat", gguf_run.root, "--at", "gguf_adapter", said="x\n")
    assert (code, "Take trained (adapter_unmerged): the same adapter" in err) == (2, True)


# Commands.


def test_generate_answers_prompts_of_the_command_line_of_files_and_of_standard_input(
    finished: tuple[Recipe, RunFolder], tmp_path: Path
) -> None:
    recipe, folder = finished
    expected = said_by(recipe, "trained")
    row = {"messages": [*ASKED, {"role": "assistant", "content": "never asked for"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "lines.txt").write_text(f"{ASKED[0]['content']}\n\n", encoding="utf-8")
    common = ("generate", folder.root, "--at", "trained", "--max-new-tokens", "8")
    for asked, said in (
        (("--prompt", ASKED[0]["content"]), None),
        (("--prompts", tmp_path / "rows.jsonl"), None),
        (("--prompts", tmp_path / "lines.txt"), None),
        ((), f"{ASKED[0]['content']}\n"),
    ):
        assert invoke(*common, *asked, said=said) == (0, f"{expected}\n", "")


def test_two_models_answer_one_below_the_other_or_as_json(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    answers = {name: said_by(recipe, name) for name in ("trained", "base")}
    common = ("generate", folder.root, "--at", "trained", "--compare", "base", "--max-new-tokens", "8")
    _, out, _ = invoke(*common, "--prompt", ASKED[0]["content"], "--json")
    assert json.loads(out) == {"messages": ASKED, "answers": answers}
    _, out, _ = invoke(*common, "--prompt", ASKED[0]["content"])
    assert out.startswith("[trained]\n")
    assert "\n[base]\n" in out


def test_chat_keeps_the_conversation_until_it_is_told_to_forget(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    said = "Remind me at 203\nRemind me at 203\n/new\nRemind me at 203\n/quit\nRemind me at 4\n"
    code, out, _ = invoke("chat", folder.root, "--at", "trained", "--max-new-tokens", "8", said=said)
    first = said_by(recipe, "trained")
    history = [*ASKED, {"role": "assistant", "content": first}, *ASKED]
    second = "".join(pipeline.talk(recipe, "trained").answer(history, GREEDY, max_new_tokens=8))
    assert code == 0
    assert out.partition("forgets.\n")[2] == f"{first}\n{second}\n{first}\n"


def test_two_models_stand_side_by_side_on_a_terminal(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, _ = finished
    data, tokenizer = recipe.data, pipeline.talk(recipe, "base").tokenizer
    stop = tokenizer.stop_ids[0]
    voices = [
        Voice(name, data, tokenizer, None, Recited([*tokenizer.encode(text), stop]))
        for name, text in (("one", "first \x1b[31m"), ("two", "second, longer"))
    ]
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    answers = Speakers(voices).tell_each(console, [ASKED, ASKED], GREEDY, max_new_tokens=40)
    assert answers == ["first \x1b[31m", "second, longer"]
    shown = console.file.getvalue().rsplit("\x1b[2K", 1)[-1]
    row = next(line for line in shown.splitlines() if "first" in line)
    assert r"first \x1b[31m" in row
    assert "second, longer" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "{run}", "--prompts", "none.txt"), "none.txt cannot be read: there is no such file. Name"),
        (("chat", "{run}s"), "Did you mean {run}?"),
        (
            ("chat", "nowhere/run"),
            "there is no run nowhere/run. nowhere holds no run. Name a run's folder, or its recipe",
        ),
        (("generate", "{run}", "--prompts", "bad.jsonl"), "bad.jsonl:2"),
        (("generate", "{run}"), "no prompt in standard input"),
        (("generate", "elsewhere", "--prompt", "x"), "no folder of a run"),
        (("chat", "{run}", "--at", "gguf_q8_0"), "no model 'gguf_q8_0'"),
        (("serve", "{run}", "--at", "quantized"), "lacks what was trained"),
    ],
)
def test_what_cannot_be_asked_is_told(
    finished: tuple[Recipe, RunFolder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\n', encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    code, _, err = invoke(*(part.replace("{run}", str(finished[1].root)) for part in arguments), said="")
    assert code == 2
    assert message.replace("{run}", str(finished[1].root)) in err


# Servers.


def test_a_moved_run_is_served_from_where_it_lies(finished: tuple[Recipe, RunFolder], tmp_path: Path) -> None:
    moved = shutil.copytree(finished[1].root, tmp_path / "moved")
    code, out, _ = invoke("serve", moved, "--at", "merged")
    assert code == 0
    assert f"\n  vllm serve {moved}/merged --dtype float32 --max-model-len 520\n" in out
    assert f"\n  transformers serve {moved}/merged --dtype float32\n" in out


def test_an_adapter_is_served_on_its_base_with_a_rank_that_vllm_has(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    (found,) = serve_commands(recipe, folder, "peft_adapter")
    base = recipe.base_model.path
    adapter = folder.exports / "peft_adapter"
    assert found.command == (
        f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules tiny={adapter} "
        "--quantization bitsandbytes --dtype bfloat16 --max-model-len 520"
    )
    dora = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"use_dora": True})})
    with pytest.raises(RunFolderError, match="no DoRA"):
        serve_commands(dora, folder, "trained")


def test_gguf_files_are_served_by_llama_cpp(finished: tuple[Recipe, RunFolder], tmp_path: Path) -> None:
    recipe, _ = finished
    folder = RunFolder(tmp_path)
    for name, file in (("gguf_q8_0", "model.gguf"), ("gguf_adapter", "adapter.gguf")):
        (folder.exports / name).mkdir(parents=True)
        (folder.exports / name / file).touch()
    (model,) = serve_commands(recipe, folder, "gguf_q8_0")
    assert model.command == f"llama-server -m {tmp_path}/exports/gguf_q8_0/model.gguf -c 520 --jinja --port 8080"
    (adapter,) = serve_commands(recipe, folder, "gguf_adapter")
    assert adapter.command.startswith(f"llama-server -m BASE.gguf --lora {tmp_path}/exports/gguf_adapter/adapter.gguf")


def test_a_hub_base_is_served_at_its_revision(finished: tuple[Recipe, RunFolder]) -> None:
    recipe, folder = finished
    base = recipe.base_model.model_copy(update={"path": None, "name": "owner/model", "revision": "v1"})
    text = recipe.data.model_copy(update={"render": "text"})
    served, _ = serve_commands(recipe.model_copy(update={"base_model": base, "data": text}), folder, "base")
    assert served.command.startswith("vllm serve owner/model --revision v1 ")
    assert "/v1/completions" in served.notes[1]
