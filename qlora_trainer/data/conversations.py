"""A value of a messages column to the messages that a chat template gets, tool calls and definitions included.

What servers do with a conversation before they render it is done here too, so that the template sees the same: the
arguments of a tool call, which clients send as a JSON text, become an object.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_trainer.data.chat_template import Message
from qlora_trainer.data.problems import json_kind

TRAINING_KEYS = ("train", "weight")
"""Keys of an assistant's message that say whether it is trained: ``train`` (boolean) and, as OpenAI's files have it,
``weight`` (0 or 1). Templates do not see them."""


USUAL_ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Roles by what ShareGPT's files have as ``from``."""


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and what was said beside them; see ``examples.Example`` for the fields."""

    messages: tuple[Message, ...]
    tools: tuple[object, ...] | None = None
    untrained: frozenset[int] = frozenset()
    has_parsed_arguments: bool = False


def read_conversation(messages: object, tools: object) -> Conversation:
    """The conversation of values in which ``conversation_problem`` and ``tools_problem`` found nothing."""
    given = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    read = [_message(message) for message in given]
    return Conversation(
        messages=tuple(read),
        tools=_tools(tools),
        untrained=frozenset(number for number, message in enumerate(given) if not _is_trained(message)),
        has_parsed_arguments=any(_has_text_arguments(message) for message in given),
    )


def renamed_speakers(messages: object) -> object:
    """A value of ShareGPT's form, ``{from, value}``, as ``{role, content}``; what is of another form stays."""
    if not isinstance(messages, list):
        return messages
    return [
        {"role": SPEAKERS[message["from"]], "content": message["value"]}
        | {key: value for key, value in message.items() if key not in ("from", "value")}
        if isinstance(message, dict) and {"from", "value"} <= message.keys() and message["from"] in SPEAKERS
        else message
        for message in messages
    ]


def sharegpt_problem(value: object) -> str:
    """``conversation_problem`` of a value of ShareGPT's form."""
    for number, message in enumerate(value if isinstance(value, list) else [], start=1):
        if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
            return f"message {number} needs 'from' and 'value'; with role and content it is of format: messages"
        if message["from"] not in SPEAKERS:
            return f"message {number}: 'from' is {message['from']!r}, needs one of {', '.join(SPEAKERS)}"
    return conversation_problem(renamed_speakers(value))


def conversation_problem(value: object) -> str:
    """What is wrong with a value that should be a conversation with an answer at its end; empty where nothing is."""
    if not isinstance(value, list) or not value:
        return f"is {'an empty list' if value == [] else json_kind(value)}, needs a list of {{role, content}}"
    for number, message in enumerate(value, start=1):
        problem = _message_problem(message)
        if problem:
            return f"message {number}{problem}"
    last = value[-1]["role"]
    if last == "assistant":
        return ""
    known = "" if last in USUAL_ROLES else f", which is none of the usual {', '.join(USUAL_ROLES)}"
    return f"ends with role {last!r}{known}; the last message must be the assistant's answer"


def tools_problem(value: object) -> str:
    """What is wrong with a value that should be a list of tool definitions, or its JSON text."""
    found = value
    if isinstance(value, str):
        if not value.strip():
            return ""
        try:
            found = json.loads(value)
        except json.JSONDecodeError as error:
            return f"is no JSON ({error.msg} at character {error.pos}), needs a list of tool definitions"
    if not isinstance(found, list):
        return f"is {json_kind(found)}, needs a list of tool definitions"
    wrong = next((tool for tool in found if not isinstance(tool, dict)), None)
    return "" if wrong is None else f"holds {json_kind(wrong)}, needs objects that define tools"


def text_problem(value: object) -> str:
    """What is wrong with a value that should be a text; empty where nothing is."""
    if not isinstance(value, str):
        return f"is {json_kind(value)}, needs a text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(value[error.start]):04x}"
        return f"holds {code}, one half of a character (a surrogate); write the character itself"
    return ""


def _message_problem(message: object) -> str:
    """What is wrong with one message, as it goes on behind ``message 3``."""
    if not isinstance(message, dict):
        return f" is {json_kind(message)}, needs an object with role and content"
    if "role" not in message and {"from", "value"} <= message.keys():
        return " has 'from' and 'value': it is of format: sharegpt"
    for key in ("role", "content"):
        if key == "content" and message.get("tool_calls") and message.get("content") is None:
            continue
        problem = text_problem(message[key]) if key in message else "is missing"
        if problem:
            return f": {key!r} {problem}"
    return _training_problem(message) or _calls_problem(message)


def _training_problem(message: Mapping[str, object]) -> str:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        return f": 'train' is {json_kind(train)}, needs true or false"
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        return f": 'weight' is {weight!r}, needs 0 (not trained) or 1"
    if message["role"] != "assistant" and (train or weight):
        return f": role {message['role']!r} cannot be trained; only the assistant's messages can"
    return ""


def _calls_problem(message: Mapping[str, object]) -> str:
    calls = message.get("tool_calls")
    if not calls:
        return ""
    if not isinstance(calls, list):
        return f": 'tool_calls' is {json_kind(calls)}, needs a list"
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return ": 'tool_calls' needs objects with function: {name, arguments}"
        arguments = function.get("arguments")
        if isinstance(arguments, str) and not isinstance(_parsed(arguments), dict):
            return f": arguments of the tool call {function['name']!r} are no JSON object"
    return ""


def _message(message: Mapping[str, object]) -> Message:
    read = {key: value for key, value in message.items() if key not in TRAINING_KEYS}
    calls = message.get("tool_calls")
    if isinstance(calls, list) and _has_text_arguments(message):
        read["tool_calls"] = [_call(call) for call in calls]
    return read


def _call(call: Mapping[str, object]) -> dict[str, object]:
    function = call.get("function")
    if isinstance(function, dict):
        return {**call, "function": _call(function)}
    arguments = call.get("arguments")
    return {**call, "arguments": _parsed(arguments)} if isinstance(arguments, str) else dict(call)


def _has_text_arguments(message: Mapping[str, object]) -> bool:
    calls = message.get("tool_calls")
    functions = [call.get("function", call) for call in calls] if isinstance(calls, list) else []
    return any(isinstance(function.get("arguments"), str) for function in functions)


def _is_trained(message: Mapping[str, object]) -> bool:
    return message["role"] != "assistant" or (message.get("train") is not False and message.get("weight") != 0)


def _tools(value: object) -> tuple[object, ...] | None:
    found = json.loads(value) if isinstance(value, str) and value.strip() else value
    return tuple(found) if isinstance(found, list) and found else None


def _parsed(text: str) -> object:
    try:
        parsed: object = json.loads(text)
    except json.JSONDecodeError:
        return None
    return parsed
