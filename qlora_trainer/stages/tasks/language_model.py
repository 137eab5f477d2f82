"""A model of a run as lm-evaluation-harness asks it: log-likelihoods of continuations, and greedy answers.

The same code for transformers and llama.cpp, as both answer the same calls. Its figures are those of the harness's own
class for transformers; a test holds them side by side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn

from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError
from qlora_trainer.runners.transformers import generate_greedy

MOST_LOGITS = 2**27
"""Logits of one forward pass that are held: half a gigabyte in float32."""
NEW_TOKENS = 256
"""Longest answer where a task does not say."""


@dataclass(frozen=True)
class Scored:
    """A request: the tokens that are read and, at their end, those that are scored."""

    index: int
    ids: list[int]
    continuation: list[int]

    @property
    def first(self) -> int:
        """Position whose logits predict the first scored token."""
        return len(self.ids) - len(self.continuation)


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness's own base class, seen without its types
    """A causal language model for the harness.

    Attributes:
        truncated: requests so far whose beginning was cut off, as they were longer than the window.
    """

    def __init__(self, model: nn.Module, text: TextTokenizer, *, batch_size: int, window: int) -> None:
        super().__init__()
        self.model, self.text, self.batch_size, self.window = model, text, batch_size, window
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that stands before an empty context."""
        return self.text.eos_id if self.text.bos_id is None else self.text.bos_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness names rendered prompts by."""
        return "tokenizer of the base model"

    def chat_template(self, chat_template: bool | str = False) -> str:  # noqa: FBT001, FBT002 - the harness calls it so
        """Nothing to record: the template is the base model's."""
        del chat_template
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:  # noqa: FBT001, FBT002 - the harness calls it so
        """The messages through the base model's template."""
        return self.text.render_chat(chat_history, add_generation_prompt=add_generation_prompt).text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: FBT001 - the harness calls it so
        """Ids of a text, behind bos where the tokenizer puts it and the text does not begin with it."""
        ids = self.text.encode(string)
        bos = self.text.bos_id
        wants_bos = self.text.adds_bos and add_special_tokens is not False
        return [bos, *ids] if wants_bos and bos is not None and ids[:1] != [bos] else ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:  # noqa: FBT001, FBT002 - the harness calls it so
        """Log-probability of each continuation, and whether it is the most likely one."""
        del disable_tqdm
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        scored = [
            Scored(index, self._fitted(context + continuation, room=self.window + 1)[:-1], continuation)
            for index, (_, context, continuation) in enumerate(requests)
        ]
        results: list[Any] = [None] * len(scored)
        for batch in self._batches(scored):
            for request, result in zip(batch, self._scores(batch), strict=True):
                results[request.index] = result
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: FBT001, FBT002 - the harness calls it so
        """Log-probability of each whole text; a text longer than the window in windows that do not overlap."""
        del disable_tqdm
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.window,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: FBT001, FBT002 - the harness calls it so
        """The most likely answer to each context, cut at the first of its stop texts.

        Raises:
            DataError: a task asks for sampled answers, or for longer ones than the window.
        """
        del disable_tqdm
        answers = [""] * len(requests)
        asked = [(index, *request.args) for index, request in enumerate(requests)]
        for batch in self._generation_batches(asked):
            limit = self._new_tokens(batch[0][2])
            prompts = [self._fitted(self.tok_encode(context), room=self.window - limit) for _, context, _ in batch]
            outputs = generate_greedy(
                self.model,
                prompts,
                max_new_tokens=limit,
                stop_ids=self.text.stop_ids,
                pad_id=self.text.pad_id,
            )
            for (index, _, settings), ids in zip(batch, outputs, strict=True):
                answers[index] = _cut(self.text.decode(ids, skip_special=True), settings.get("until"))
        return answers

    def _new_tokens(self, settings: dict[str, Any]) -> int:
        plain = normalize_gen_kwargs(settings, NEW_TOKENS)
        if plain.get("do_sample") or plain.get("num_beams", 1) != 1:
            raise DataError("the task asks for sampled answers or beams; set do_sample: false in its generation_kwargs")
        limit = int(plain["max_gen_toks"])
        if limit >= self.window:
            raise DataError(
                f"the task asks for {limit} new tokens, and the window is {self.window}; lower max_gen_toks"
            )
        return limit

    def _fitted(self, ids: list[int], *, room: int) -> list[int]:
        if len(ids) > room:
            self.truncated += 1
        return ids[-room:]

    def _batches(self, scored: Sequence[Scored]) -> Iterator[list[Scored]]:
        """Requests of like length, as many as the batch size and the room for logits allow."""
        batch: list[Scored] = []
        for request in sorted(scored, key=lambda each: (-len(each.ids), each.index)):
            if batch and (len(batch) == self.batch_size or self._logits([*batch, request]) > MOST_LOGITS):
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    def _logits(self, batch: Sequence[Scored]) -> int:
        kept = max(len(each.ids) for each in batch) - min(each.first for each in batch)
        return len(batch) * kept * self.text.vocabulary_size

    def _generation_batches(self, asked: list[Any]) -> Iterator[list[Any]]:
        """Requests with the same settings, the longest first."""
        groups: dict[str, list[Any]] = {}
        for each in sorted(asked, key=lambda request: -len(request[1])):
            groups.setdefault(repr(sorted(each[2].items())), []).append(each)
        for group in groups.values():
            yield from (group[start : start + self.batch_size] for start in range(0, len(group), self.batch_size))

    @torch.no_grad()
    def _scores(self, batch: Sequence[Scored]) -> Iterator[tuple[float, bool]]:
        longest, start = max(len(each.ids) for each in batch), min(each.first for each in batch)
        pad = self.text.pad_id
        # Padding stands behind a row, where under causal attention none of its tokens looks.
        rows = [each.ids + [pad] * (longest - len(each.ids)) for each in batch]
        device = next(self.model.parameters()).device
        kept = torch.arange(start, longest, device=device)
        output = self.model(input_ids=torch.tensor(rows, device=device), use_cache=False, logits_to_keep=kept)
        for row, each in enumerate(batch):
            place = each.first - start
            yield _score(output.logits[row, place : place + len(each.continuation)], each.continuation)


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Summed log-probability of the tokens, and whether each is the most likely one.

    Args:
        logits: shape ``(tokens, vocabulary)``.
        continuation: the tokens.
    """
    wanted = torch.tensor(continuation, device=logits.device)
    logits = logits.float()
    chosen = logits.log_softmax(-1).gather(-1, wanted[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


def _cut(text: str, until: str | list[str] | None) -> str:
    stops = [until] if isinstance(until, str) else until or []
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
