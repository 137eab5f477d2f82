"""Examples to token ids and labels: what is read, what is trained, and what generation is started with.

All texts of a call go through the tokenizer in one batch. It knows no files and no model.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qlora_trainer.data.chat_template import RenderedChat, Span, Turns
from qlora_trainer.data.examples import Example
from qlora_trainer.data.problems import Problems
from qlora_trainer.data.tokenizer import TextTokenizer, TokenizedText
from qlora_trainer.errors import DataError

IGNORE_INDEX = -100
"""Label of a token that is read but not trained; the one that ``torch.nn.functional.cross_entropy`` skips."""

PROMPT_FIELD = "{prompt}"
RENDERING = "rendering rows through the chat template"


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


def encode_documents(examples: Sequence[Example], tokenizer: TextTokenizer) -> list[EncodedRow]:
    """Rows of plain texts: ``[bos] text eos``, of which every token is trained but the first.

    The first token is predicted from nothing. Bos stands there where the tokenizer adds it by itself.
    """
    bos_id = tokenizer.bos_id
    beginning = (bos_id,) if tokenizer.adds_bos and bos_id is not None else ()
    rows = []
    for example, text in zip(examples, tokenizer.encode_batch([each.completion for each in examples]), strict=True):
        token_ids = (*beginning, *text, tokenizer.eos_id)
        rows.append(
            EncodedRow(token_ids, (IGNORE_INDEX, *token_ids[1:]), beginning, "", example.completion, example.place)
        )
    return rows


def encode_chat(
    examples: Sequence[Example], tokenizer: TextTokenizer, *, train_turns: Turns = "all"
) -> list[EncodedRow]:
    """Rows through the chat template; the assistant's turns are trained. See ``CutChat`` for how.

    Raises:
        DataError: the chat template refuses some rows; names all of them.
        BaseModelError: there is no chat template.
    """
    problems = Problems()
    chats = cut_chats(examples, tokenizer, train_turns, problems)
    problems.refuse(RENDERING)
    return encode_cut_chats([(example, chat) for example, chat in zip(examples, chats, strict=True) if chat], tokenizer)


def encode_cut_chats(chats: Sequence[tuple[Example, "CutChat"]], tokenizer: TextTokenizer) -> list[EncodedRow]:
    """Rows of rendered conversations.

    What follows the cut is trained from its beginning. In earlier turns a token is trained where its first character
    lies in an assistant span. Behind the last stop token of a span nothing is trained: generation has ended there.
    """
    beginnings = _encode_beginnings([chat for _, chat in chats], tokenizer)
    answers = tokenizer.locate_continuations([chat.answer for _, chat in chats])
    stops = tokenizer.stop_ids
    rows = []
    for (example, chat), beginning, answer in zip(chats, beginnings, answers, strict=True):
        answer_labels = _labels(answer, chat.answer_spans, stops)
        rows.append(
            EncodedRow(
                token_ids=(*beginning.token_ids, *answer.token_ids),
                labels=(*_labels(beginning, chat.earlier_spans, stops), *answer_labels),
                prompt_ids=tuple(
                    beginning.token_ids if chat.other_start is None else tokenizer.encode(chat.other_start)
                ),
                prompt=example.prompt,
                completion=_reference(example, answer_labels, tokenizer),
                place=example.place,
            )
        )
    return rows


def _reference(example: Example, labels: Sequence[int], tokenizer: TextTokenizer) -> str:
    """What a generated answer is compared with: the answer's words, or where it calls tools what the template wrote."""
    if not example.messages[-1].get("tool_calls"):
        return example.completion
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX], skip_special=True).strip()


@dataclass(frozen=True, slots=True)
class CutChat:
    """A rendered conversation, cut where generation of the last answer starts.

    It is encoded in two parts, so that generation starts from exactly the tokens of training. Encoded as one text, a
    token could reach over that boundary: behind ``Assistant: `` the answer ``Yes`` would be one token with the blank,
    which generation can never write there. Where no token reaches over, both ways give the same ids.

    Attributes:
        beginning: what stands before the last answer.
        answer: the rest.
        earlier_spans: characters of ``beginning`` to train.
        answer_spans: characters of ``answer`` to train.
        other_start: what the template really starts generation with, where that is not ``beginning``.
        rewritten: trained turns that the template renders otherwise once later ones follow.
    """

    beginning: str
    answer: str
    earlier_spans: tuple[Span, ...]
    answer_spans: tuple[Span, ...]
    other_start: str | None
    rewritten: int


def cut_chats(
    examples: Sequence[Example], tokenizer: TextTokenizer, turns: Turns, problems: Problems
) -> list[CutChat | None]:
    """Each conversation through the chat template; None, and one of ``problems`` more, where the template refuses it.

    Raises:
        BaseModelError: there is no chat template.
    """
    chats: list[CutChat | None] = []
    for example in examples:
        try:
            chat = tokenizer.render_chat(
                example.messages,
                add_generation_prompt=False,
                tools=example.tools,
                turns=turns,
                untrained=example.untrained,
            )
            start = tokenizer.render_prompt(example.messages[:-1], tools=example.tools)
        except DataError as error:
            problems.add(f"{example.place}: {error}")
            chats.append(None)
        else:
            chats.append(_cut_chat(chat, start))
    return chats


def _cut_chat(chat: RenderedChat, start: str) -> CutChat:
    spans = chat.assistant_spans
    begin, end = spans[-1] if spans else (0, 0)
    # A template may write into the conversation what it leaves out of the generation prompt, or the reverse.
    starts_so = chat.text.startswith(start)
    cut = len(start) if starts_so else begin
    has_answer = end > max(begin, cut)
    return CutChat(
        beginning=chat.text[:cut],
        answer=chat.text[cut:],
        earlier_spans=spans[:-1] if has_answer else spans,
        answer_spans=((0, end - cut),) if has_answer else (),
        other_start=None if starts_so else start,
        rewritten=chat.rewritten,
    )


def _encode_beginnings(chats: Sequence[CutChat], tokenizer: TextTokenizer) -> list[TokenizedText]:
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
