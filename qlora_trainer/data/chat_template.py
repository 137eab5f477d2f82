"""A chat template as transformers would render it, without importing transformers (0.8 s).

The sandbox, its filters and its variables are those of ``transformers.utils.chat_template_utils`` 5.23, so
that a row is rendered here to the characters that a server renders later. Beside the text this module
gives the characters that the assistant wrote, which are the ones to train. It knows no tokens.
"""

import json
import re
from collections.abc import Mapping, Sequence
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
    """

    text: str
    assistant_spans: tuple[Span, ...]


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

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, turns: Turns = "all") -> RenderedChat:
        """The conversation as text, with the assistant's characters.

        Spans come from the template's ``{% generation %}`` blocks. Where it has none, they are found by
        rendering the conversation turn by turn: what an assistant turn adds to the text that generation would have
        started from, was written by the assistant.

        Args:
            messages: each with ``role`` and ``content``.
            add_generation_prompt: end with the words after which the assistant begins to write.
            turns: whose spans are wanted: every assistant turn's, or only the last message's. The text is the same.

        Raises:
            DataError: the template refuses the messages; they hold a Unicode noncharacter; or spans cannot be found
                turn by turn, because the template renders an early turn differently once later ones follow.
        """
        marked = self._text(messages, add_generation_prompt=add_generation_prompt)
        if not self.has_generation_marker:
            first = 0 if turns == "all" else len(messages) - 1
            return RenderedChat(marked, self._spans_turn_by_turn(messages, marked, first=first))
        chat = _without_marks(marked)
        if turns == "all" or not chat.assistant_spans:
            return chat
        earlier = _without_marks(self._text(messages[:-1], add_generation_prompt=True)).assistant_spans
        return RenderedChat(chat.text, chat.assistant_spans[len(earlier) :])

    def _text(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        variables = {
            **self._variables,
            "messages": [_without_nulls(message) for message in messages],
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

    def _spans_turn_by_turn(self, messages: Sequence[Message], text: str, *, first: int) -> tuple[Span, ...]:
        """Spans of the assistant's messages from number ``first`` on."""
        spans = []
        for turn, message in enumerate(messages):
            if turn < first or message.get("role") != "assistant":
                continue
            before = self._text(messages[:turn], add_generation_prompt=True)
            is_last = turn + 1 == len(messages)
            after = text if is_last else self._text(messages[: turn + 1], add_generation_prompt=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"message {turn + 1} of {len(messages)}: the chat template has no {{% generation %}} block, and "
                    "renders this assistant turn differently with and without what follows, so its characters cannot "
                    "be told apart. Put {% generation %} and {% endgeneration %} around what the assistant writes in "
                    "the base model's chat template, or set data.train_turns: last"
                )
            spans.append((len(before), len(after)))
        return tuple(spans)


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
