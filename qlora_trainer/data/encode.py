"""Examples to token ids and labels: what is read, what is trained, and what generation is started with.

All texts of a call go through the tokenizer in one batch. It knows no files and no model.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from qlora_trainer.data.chat_template import RenderedChat, Span, Turns
from qlora_trainer.data.examples import Example
from qlora_trainer.data.sources import listed_problems
from qlora_trainer.data.tokenizer import TextTokenizer, TokenizedText
from qlora_trainer.errors import DataError

IGNORE_INDEX = -100
"""Label of a token that is read but not trained; the one that ``torch.nn.functional.cross_entropy`` skips."""

PROMPT_FIELD = "{prompt}"


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row as the model sees it.

    Attributes:
        token_ids: prompt, completion and stop token.
        labels: the label *of* each token, not shifted: its id where it is trained, IGNORE_INDEX elsewhere.
        prompt_ids: what generation is started with.
        prompt: what the user wrote last, for reports.
        completion: the reference text, without the stop token.
        place: file and line, for messages; empty where they are not known.
    """

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    prompt: str
    completion: str
    place: str = ""

    @property
    def label_count(self) -> int:
        """Tokens that the loss is taken on; the first token is predicted from nothing and never counts."""
        trained = len(self.labels) - self.labels.count(IGNORE_INDEX)
        return trained - 1 if trained and self.labels[0] != IGNORE_INDEX else trained


def encode_text(
    examples: Sequence[Example], tokenizer: TextTokenizer, *, template: str, stop_id: int
) -> list[EncodedRow]:
    """Rows for a model without a chat template: ``[bos] template(prompt) completion stop``.

    The bos token stands first where the tokenizer adds it by itself, since that is what the base model was
    trained on and what runtimes do with a plain prompt. The prompt's and the completion's part are encoded
    apart, so that no token reaches over the boundary, and generation starts from exactly the tokens of training.

    Args:
        examples: what to encode.
        tokenizer: of the base model.
        template: what stands before the completion; ``{prompt}`` is replaced.
        stop_id: the token that ends the completion and is trained.
    """
    prompts = [template.replace(PROMPT_FIELD, example.prompt) for example in examples]
    encoded = tokenizer.encode_batch(prompts + [example.completion for example in examples])
    bos_id = tokenizer.bos_id
    beginning = [bos_id] if tokenizer.adds_bos and bos_id is not None else []
    rows = []
    for example, prompt, completion in zip(examples, encoded[: len(examples)], encoded[len(examples) :], strict=True):
        prompt_ids = (*beginning, *prompt)
        trained = (*completion, stop_id)
        labels = (IGNORE_INDEX,) * len(prompt_ids) + trained
        rows.append(
            EncodedRow(prompt_ids + trained, labels, prompt_ids, example.prompt, example.completion, example.place)
        )
    return rows


def encode_chat(
    examples: Sequence[Example], tokenizer: TextTokenizer, *, train_turns: Turns = "all"
) -> list[EncodedRow]:
    """Rows through the chat template; the assistant's turns are trained.

    A conversation is encoded in two parts: what generation of the last answer is started with, and what follows. So
    generation starts from exactly the tokens of training. Encoded as one text, a token could reach over that
    boundary: behind ``Assistant: `` the answer ``Yes`` would be one token with the blank, which generation can never
    write there. Where no token reaches over, both ways give the same ids.

    What follows is trained from its beginning. In earlier turns a token is trained where its first character lies in
    an assistant span. Behind the last stop token of a span nothing is trained: generation has ended there.

    Args:
        examples: what to encode.
        tokenizer: of the base model.
        train_turns: every assistant turn, or the last message alone; the token ids are the same.

    Raises:
        DataError: the chat template refuses some rows; names all of them.
        BaseModelError: there is no chat template.
    """
    chats = _cut_chats(examples, tokenizer, train_turns)
    beginnings = _encode_beginnings(chats, tokenizer)
    answers = tokenizer.locate_continuations([chat.answer for chat in chats])
    stops = tokenizer.stop_ids
    return [
        EncodedRow(
            token_ids=(*beginning.token_ids, *answer.token_ids),
            labels=(*_labels(beginning, chat.earlier_spans, stops), *_labels(answer, chat.answer_spans, stops)),
            prompt_ids=tuple(beginning.token_ids if chat.other_start is None else tokenizer.encode(chat.other_start)),
            prompt=example.prompt,
            completion=example.completion,
            place=example.place,
        )
        for example, chat, beginning, answer in zip(examples, chats, beginnings, answers, strict=True)
    ]


def fit_window(
    rows: Sequence[EncodedRow],
    *,
    window: int,
    overlong: Literal["drop", "truncate_prompt", "refuse"],
    bos_id: int | None,
    places: Sequence[str],
) -> list[EncodedRow | None]:
    """The rows, none longer than the window; None stands where a row was dropped.

    ``truncate_prompt`` takes tokens away from the beginning of a row (behind bos), but never the whole prompt: a row
    whose completion alone fills the window is dropped.

    Args:
        rows: encoded rows.
        window: longest row in tokens.
        overlong: what to do with longer ones.
        bos_id: a leading token that stays where it is.
        places: file and line of each row, for messages.

    Raises:
        DataError: ``refuse``, and some rows are longer; names all of them with their lengths.
    """
    if overlong == "refuse":
        problems = [
            f"{place}: {len(row.token_ids)} tokens, the window is {window}"
            for row, place in zip(rows, places, strict=True)
            if len(row.token_ids) > window
        ]
        if problems:
            raise DataError(listed_problems("data.overlong: refuse", problems))
    if overlong == "truncate_prompt":
        return [row if len(row.token_ids) <= window else _cut_row(row, window, bos_id) for row in rows]
    return [row if len(row.token_ids) <= window else None for row in rows]


@dataclass(frozen=True, slots=True)
class _CutChat:
    """A rendered conversation, cut where generation of the last answer starts.

    Attributes:
        beginning: what stands before the last answer.
        answer: the rest.
        earlier_spans: characters of ``beginning`` to train.
        answer_spans: characters of ``answer`` to train.
        other_start: what the template really starts generation with, where that is not ``beginning``.
    """

    beginning: str
    answer: str
    earlier_spans: tuple[Span, ...]
    answer_spans: tuple[Span, ...]
    other_start: str | None


def _cut_chats(examples: Sequence[Example], tokenizer: TextTokenizer, turns: Turns) -> list[_CutChat]:
    chats, problems = [], []
    for example in examples:
        try:
            chat = tokenizer.render_chat(example.messages, add_generation_prompt=False, turns=turns)
            start = tokenizer.render_chat(example.messages[:-1], add_generation_prompt=True, turns=turns).text
        except DataError as error:
            problems.append(f"{example.place}: {error}")
        else:
            chats.append(_cut_chat(chat, start))
    if problems:
        raise DataError(listed_problems("rendering rows through the chat template", problems))
    return chats


def _cut_chat(chat: RenderedChat, start: str) -> _CutChat:
    spans = chat.assistant_spans
    begin, end = spans[-1] if spans else (0, 0)
    # A template may write into the conversation what it leaves out of the generation prompt, or the reverse.
    starts_so = chat.text.startswith(start)
    cut = len(start) if starts_so else begin
    has_answer = end > max(begin, cut)
    return _CutChat(
        beginning=chat.text[:cut],
        answer=chat.text[cut:],
        earlier_spans=spans[:-1] if has_answer else spans,
        answer_spans=((0, end - cut),) if has_answer else (),
        other_start=None if starts_so else start,
    )


def _encode_beginnings(chats: Sequence[_CutChat], tokenizer: TextTokenizer) -> list[TokenizedText]:
    """What stands before the last answers; tokens are located only where earlier answers are trained too."""
    texts = [chat.beginning for chat in chats]
    if any(chat.earlier_spans for chat in chats):
        return tokenizer.locate_batch(texts)
    return [TokenizedText(token_ids, []) for token_ids in tokenizer.encode_batch(texts)]


def _labels(text: TokenizedText, spans: Sequence[Span], stop_ids: Collection[int]) -> list[int]:
    """Labels of tokens that begin inside a span, up to the span's last stop token."""
    ids = text.token_ids
    labels = [IGNORE_INDEX] * len(ids)
    for span in spans:
        begin, end = (bisect_left(text.begins, character) for character in span)
        # From the end, where a stop token nearly always stands.
        end = next((position + 1 for position in range(end - 1, begin - 1, -1) if ids[position] in stop_ids), end)
        labels[begin:end] = ids[begin:end]
    return labels


def _cut_row(row: EncodedRow, window: int, bos_id: int | None) -> EncodedRow | None:
    excess = len(row.token_ids) - window
    kept = 1 if row.token_ids[0] == bos_id else 0
    if kept + excess >= len(row.prompt_ids):
        return None
    return EncodedRow(
        token_ids=row.token_ids[:kept] + row.token_ids[kept + excess :],
        labels=row.labels[:kept] + row.labels[kept + excess :],
        prompt_ids=row.prompt_ids[:kept] + row.prompt_ids[kept + excess :],
        prompt=row.prompt,
        completion=row.completion,
        place=row.place,
    )
