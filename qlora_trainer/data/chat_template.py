"""A chat template as transformers would render it, without importing transformers (0.8 s).

The sandbox, its filters and its variables are those of ``transformers.utils.chat_template_utils`` 5.23, so
that a row is rendered here to the characters that a server renders later. Beside the text this module
gives the characters that the assistant wrote, which are the ones to train. It knows no tokens.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_trainer.errors import BaseModelError, DataError

Message = Mapping[str, object]
Span = tuple[int, int]
Turns = Literal["all", "last"]

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Unicode noncharacters: no text may hold them, so they can mark where a generation block begins and ends.
SPAN_BEGINS, SPAN_ENDS = "\U0010fffe", "\U0010ffff"
SPAN_MARKS = re.compile(f"[{SPAN_BEGINS}{SPAN_ENDS}]")

# What an expression of a template can raise: its own refusals, and operations on a value of the wrong type.
TEMPLATE_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError)


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        text: all of it, special tokens included.
        assistant_spans: character ranges ``(begin, end)`` that the assistant wrote, in order, of the turns that were
            asked for. They hold the stop token where the template writes it inside its generation block, or has no
            such block.
        rewritten: how many of the spans are of turns that the template renders otherwise once later ones follow.
    """

    text: str
    assistant_spans: tuple[Span, ...]
    rewritten: int = 0


class ChatTemplate:
    """One compiled Jinja template with the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compiles the template.

        Args:
            source: the Jinja text.
            special_tokens: texts by name, such as ``{"eos_token": "</s>"}``; the template sees them as variables.

        Raises:
            BaseModelError: the template is not valid Jinja.
        """
        self.source = source
        self.has_generation_marker = GENERATION_MARKER.search(source) is not None
        try:
            self._template = _sandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BaseModelError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}. "
                "Mend chat_template.jinja (or chat_template in tokenizer_config.json), or set data.render: text."
            ) from error
        # Defined even where there are none, as in transformers: templates test `tools is not none`.
        self._variables = {**self._template.globals, **special_tokens, "tools": None, "documents": None}

    @property
    def writes_date(self) -> bool:
        """Whether the text may hold the day on which it was rendered."""
        return "strftime_now" in self.source

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[object] | None = None,
        turns: Turns = "all",
        untrained: Collection[int] = (),
    ) -> RenderedChat:
        """The conversation as text, with the assistant's characters.

        Spans come from the template's ``{% generation %}`` blocks. Where it has none, they are found by
        rendering the conversation turn by turn; see ``turns``.

        Args:
            messages: each with ``role`` and ``content``.
            add_generation_prompt: end with the words after which the assistant begins to write.
            tools: definitions that the template may write.
            turns: whose spans are wanted: every assistant turn's, or only the last message's. The text is the same.
            untrained: numbers of messages whose spans are not wanted.

        Raises:
            DataError: the template refuses the messages; they hold a Unicode noncharacter; or a turn's span cannot be
                found, because the template renders it differently once later ones follow.
        """
        chat = Chat(self, messages, tools)
        marked = chat.text(len(messages), add_generation_prompt=add_generation_prompt)
        answers = [turn for turn, message in enumerate(messages) if message.get("role") == "assistant"]
        last = len(messages) - 1
        wanted = [turn for turn in answers if turn not in untrained and (turns == "all" or turn == last)]
        if not self.has_generation_marker:
            return chat.spans_turn_by_turn(marked, wanted)
        rendered = _without_marks(marked)
        if wanted == answers or not rendered.assistant_spans:
            return rendered
        return RenderedChat(rendered.text, chat.spans_of(wanted, answers, rendered.assistant_spans))

    def prompt(self, messages: Sequence[Message], *, tools: Sequence[object] | None = None) -> str:
        """What generation of an answer to the messages is started with.

        Raises:
            DataError: the template refuses the messages.
        """
        return _without_marks(self.text(messages, add_generation_prompt=True, tools=tools)).text

    def text(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[object] | None = None
    ) -> str:
        """The conversation as text, with marks around what generation blocks wrote.

        Raises:
            DataError: the template refuses the messages.
        """
        variables = {
            **self._variables,
            "messages": [_without_nulls(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        # What Template.render does, but that copies the global variables through a chain of mappings each time, a
        # quarter of the time of rendering; `check` renders every row twice.
        context = self._template.new_context(variables, shared=True)
        try:
            return "".join(self._template.root_render_func(context))
        except TEMPLATE_FAILURES as error:
            roles = ", ".join(str(message.get("role")) for message in messages) or "none"
            raise DataError(f"the chat template refuses the messages (roles: {roles}): {error}") from error


@dataclass(frozen=True)
class Chat:
    """A conversation under a template, and which of its characters belong to which turn."""

    template: ChatTemplate
    messages: Sequence[Message]
    tools: Sequence[object] | None

    def text(self, count: int, *, add_generation_prompt: bool, ends: Collection[int] = ()) -> str:
        """The first ``count`` messages as text; the contents of the messages ``ends`` end with a mark."""
        chosen = [
            _with_mark(message) if number in ends else message for number, message in enumerate(self.messages[:count])
        ]
        return self.template.text(chosen, add_generation_prompt=add_generation_prompt, tools=self.tools)

    def spans_of(self, wanted: Collection[int], answers: Sequence[int], spans: Sequence[Span]) -> tuple[Span, ...]:
        """Those of the generation blocks' spans that belong to the wanted turns.

        A turn's blocks are those that are not there yet when generation of it begins.
        """
        before = [
            len(_without_marks(self.text(turn, add_generation_prompt=True)).assistant_spans) if turn else 0
            for turn in answers
        ]
        after = [*before[1:], len(spans)]
        chosen: list[Span] = []
        for turn, first, end in zip(answers, before, after, strict=True):
            chosen += spans[first:end] if turn in wanted else ()
        return tuple(chosen)

    def spans_turn_by_turn(self, text: str, wanted: Sequence[int]) -> RenderedChat:
        """What each turn adds to the text that generation would have started from, was written by the assistant.

        Args:
            text: of the whole conversation.
            wanted: the turns.

        Raises:
            DataError: a span cannot be found.
        """
        spans, rewritten = [], 0
        for turn in wanted:
            before = self.text(turn, add_generation_prompt=True)
            is_last = turn + 1 == len(self.messages)
            after = text if is_last else self.text(turn + 1, add_generation_prompt=False)
            if after.startswith(before) and text.startswith(after):
                spans.append((len(before), len(after)))
                continue
            found = self._located(turn, text)
            if found is None:
                raise DataError(_not_told_apart(turn, len(self.messages)))
            spans.append(found)
            rewritten += 1
        return RenderedChat(text, tuple(spans), rewritten)

    def _located(self, turn: int, text: str) -> Span | None:
        """Characters of a turn that the template renders otherwise once later ones follow; None where it is not sure.

        Templates that drop the reasoning of earlier turns are of that kind. The turn begins where the content of the
        message before it ends and what the template writes between that and an answer has followed. It ends
        where its own content does and what the template writes behind an answer has followed.
        """
        if turn == 0:
            return None
        begin = self._begin(turn, text)
        if begin is None:
            return None
        alone = self.text(turn + 1, add_generation_prompt=False)
        started = self._begin(turn, alone, count=turn + 1)
        if started is not None and text.startswith(alone[started:], begin):
            return begin, begin + len(alone) - started
        ended = self._content_end(len(self.messages), turn, text)
        behind = self._content_end(turn + 1, turn, alone)
        if ended is None or behind is None or ended < begin:
            return None
        return begin, ended + _equal_characters(text[ended:], alone[behind:])

    def _begin(self, turn: int, text: str, *, count: int | None = None) -> int | None:
        """Where an answer begins in the text of the first ``count`` messages (None = all)."""
        start = self.text(turn, add_generation_prompt=True)
        ended = self._content_end(turn, turn - 1, start, add_generation_prompt=True)
        before = self._content_end(len(self.messages) if count is None else count, turn - 1, text)
        if ended is None or before is None or not text.startswith(start[ended:], before):
            return None
        return before + len(start) - ended

    def _content_end(self, count: int, turn: int, text: str, *, add_generation_prompt: bool = False) -> int | None:
        """Where a message's content ends in ``text``; None where the template does not write it as it is."""
        content = self.messages[turn].get("content")
        if content is not None and not isinstance(content, str):
            return None
        marked = self.text(count, add_generation_prompt=add_generation_prompt, ends=[turn])
        pieces = marked.split(SPAN_ENDS)
        return len(pieces[0]) if len(pieces) == 2 and "".join(pieces) == text else None


class GenerationBlocks(Extension):
    """Reads ``{% generation %} ... {% endgeneration %}`` and puts marks around what the block rendered.

    A block is a macro's body, as in transformers: a variable set inside is not seen outside.
    """

    tags = {"generation"}  # noqa: RUF012 - declared by jinja2 as an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call of ``_marked`` with the block's text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        return f"{SPAN_BEGINS}{caller()}{SPAN_ENDS}"


def _without_marks(marked: str) -> RenderedChat:
    if SPAN_BEGINS not in marked and SPAN_ENDS not in marked:
        return RenderedChat(marked, ())
    pieces = SPAN_MARKS.split(marked)
    if SPAN_MARKS.findall(marked) != [SPAN_BEGINS, SPAN_ENDS] * (len(pieces) // 2):
        raise DataError(
            "the messages hold U+10FFFE or U+10FFFF, which stand for no character, or the chat template nests "
            "generation blocks. Remove those code points from the data"
        )
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    # Pieces 1, 3, 5, ... stood between marks.
    spans = tuple((ends[number], ends[number + 1]) for number in range(1, len(pieces), 2))
    return RenderedChat("".join(pieces), spans)


def _not_told_apart(turn: int, count: int) -> str:
    problem = (
        "starts generation with other words than it writes before this answer"
        if turn + 1 == count
        else "renders this assistant turn differently with and without what follows"
    )
    alone = "mend its generation prompt" if turn + 1 == count else "set data.train_turns: last"
    return (
        f"message {turn + 1} of {count}: the chat template has no {{% generation %}} block, and {problem}, so its "
        "characters cannot be told apart. Put {% generation %} and {% endgeneration %} around what the assistant "
        f"writes in the chat template (a copy can be named as data.chat_template), or {alone}"
    )


def _equal_characters(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _with_mark(message: Message) -> Message:
    """The message with a mark behind the last character of its content that is not white space.

    A message without content, such as one that only calls tools, gets an empty one.
    """
    content = str(message.get("content") or "")
    words = content.rstrip()
    return {**message, "content": words + SPAN_ENDS + content[len(words) :]}


def _without_nulls(message: Message) -> dict[str, object]:
    # transformers drops null fields too: templates handle a missing key and would write "None".
    return {key: value for key, value in message.items() if value is not None}


def _sandbox() -> ImmutableSandboxedEnvironment:
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - the call's form belongs to the templates
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
