import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlora_trainer.errors import BaseModelError, MissingPackageError
from qlora_trainer.numerics.loss import IGNORE_INDEX
from qlora_trainer.runners import vllm as runner


@dataclass
class Logprob:
    logprob: float


@dataclass
class Completion:
    token_ids: tuple[int, ...]


@dataclass
class Answer:
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[Completion]


@dataclass
class Engine:
    """In vLLM's place: every token's probability is 2 ** -id, and the continuation counts on from the last token."""

    settings: dict[str, Any]
    asked: list[dict[str, Any]] = field(default_factory=list)

    def generate(
        self, prompts: Sequence[dict[str, list[int]]], sampling: dict[str, Any], **options: Any
    ) -> list[Answer]:
        self.asked.append({**sampling, **options})
        return [self.answer(prompt["prompt_token_ids"], sampling) for prompt in prompts]

    def answer(self, token_ids: list[int], sampling: dict[str, Any]) -> Answer:
        new = [token_ids[-1] + 1 + place for place in range(sampling["max_tokens"])]
        ends = [place for place, token in enumerate(new) if token in sampling.get("stop_token_ids", [])]
        # As vLLM: the stop token is part of the output.
        completion = Completion(tuple(new[: ends[0] + 1] if ends else new))
        if "prompt_logprobs" not in sampling:
            return Answer(None, [completion])
        return Answer([None, *({token: Logprob(-float(token))} for token in token_ids[1:])], [completion])


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vars(package).update(LLM=lambda **settings: Engine(settings), SamplingParams=dict)
    vars(request).update(LoRARequest=lambda *parts: parts)
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def adapter_of_rank(folder: Path, rank: int) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return folder


# --- likelihoods


def test_nats_are_those_of_the_label_tokens_alone() -> None:
    likelihoods = [None, {5: Logprob(-1.0)}, {6: Logprob(-0.25), 9: Logprob(-0.1)}, {7: Logprob(-0.5)}]
    assert runner.summed_nats(likelihoods, [4, 5, 6, 7], [IGNORE_INDEX, IGNORE_INDEX, 6, 7]) == 0.75
    assert runner.summed_nats(likelihoods, [4, 5, 6, 7], [IGNORE_INDEX] * 4) == 0


def test_a_label_of_the_first_token_is_dropped() -> None:
    assert runner.summed_nats([None, {5: Logprob(-1.0)}], [4, 5], [4, 5]) == 1.0


def test_likelihoods_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens, 2 labels and 1 likelihoods"):
        runner.summed_nats([None], [4, 5], [4, 5])
    with pytest.raises(ValueError, match="the label at 1 is 6, the token there 5"):
        runner.summed_nats([None, {5: Logprob(-1.0)}], [4, 5], [4, 6])
    for missing in (None, {6: Logprob(-1.0)}):
        with pytest.raises(ValueError, match="no likelihood of token 5 at 1"):
            runner.summed_nats([None, missing], [4, 5], [4, 5])


# --- the engine


@pytest.mark.usefixtures("vllm")
def test_rows_are_scored_without_alternatives_and_in_their_order(llama_folder: Path) -> None:
    model = runner.load(llama_folder, max_tokens=64)
    rows, labels = [[3, 1, 2], [4, 5]], [[IGNORE_INDEX, 1, 2], [IGNORE_INDEX, 5]]
    assert model.row_nats(rows, labels) == [3.0, 5.0]
    (asked,) = model.engine.asked
    assert (asked["prompt_logprobs"], asked["temperature"], asked["max_tokens"]) == (0, 0.0, 1)
    # A row of the most tokens still has room for the one that is generated.
    assert model.engine.settings["max_model_len"] == 65


@pytest.mark.usefixtures("vllm")
def test_continuations_end_before_a_stop_token(llama_folder: Path) -> None:
    model = runner.load(llama_folder)
    assert model.generate_greedy([[7], [20]], max_new_tokens=4, stop_ids={10}) == [[8, 9], [21, 22, 23, 24]]
    (asked,) = model.engine.asked
    assert (asked["temperature"], asked["stop_token_ids"], asked["ignore_eos"]) == (0.0, [10], True)
    assert asked["lora_request"] is None
    assert "enable_lora" not in model.engine.settings


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("rank", "room"), [(1, 1), (4, 8), (16, 16), (300, 320)])
def test_an_adapter_goes_with_every_prompt_in_room_of_the_next_known_rank(
    rank: int, room: int, llama_folder: Path, tmp_path: Path
) -> None:
    adapter = adapter_of_rank(tmp_path / "adapter", rank)
    model = runner.load(llama_folder, adapter=adapter)
    model.generate_greedy([[7]], max_new_tokens=1, stop_ids=[])
    assert model.engine.settings["enable_lora"] is True
    assert model.engine.settings["max_lora_rank"] == room
    assert model.engine.asked[0]["lora_request"] == ("adapter", 1, str(adapter))


@pytest.mark.usefixtures("vllm")
def test_folders_without_config_and_ranks_beyond_vllms_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"nowhere/config\.json is not there"):
        runner.load(tmp_path / "nowhere")
    with pytest.raises(BaseModelError, match=r"adapter_config\.json is not there"):
        runner.load(llama_folder, adapter=tmp_path)
    with pytest.raises(BaseModelError, match="rank 600 is beyond vLLM's 512"):
        runner.load(llama_folder, adapter=adapter_of_rank(tmp_path / "adapter", 600))


def test_without_vllm_the_error_says_how_to_install_it(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingPackageError, match=r"vLLM is not installed.*pip install vllm==0\.33\.0"):
        runner.load(llama_folder)
