import json
from typing import Any

import pytest

from qlora_trainer.data.conversations import conversation_problem, read_conversation, tools_problem

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def call(arguments: object) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": arguments}}],
    }


def test_arguments_of_a_tool_call_become_an_object_as_servers_make_them() -> None:
    found = read_conversation([USER, call('{"a": 1, "b": null}'), {"role": "tool", "content": "2"}, ANSWER], [TOOL])
    assert found.has_parsed_arguments
    assert found.messages[1] == call({"a": 1, "b": None})
    assert found.tools == (TOOL,)


def test_arguments_that_are_an_object_stay() -> None:
    found = read_conversation([USER, call({"a": 1})], None)
    assert (found.messages[1], found.has_parsed_arguments, found.tools) == (call({"a": 1}), False, None)


def test_a_call_may_stand_without_its_function_key() -> None:
    flat = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]}
    assert conversation_problem([USER, flat]) == ""
    assert read_conversation([USER, flat], None).messages[1]["tool_calls"] == [{"name": "add", "arguments": {"a": 1}}]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tool_definitions_may_be_a_list_or_its_json_text(tools: object) -> None:
    assert tools_problem(tools) == ""
    assert read_conversation([ANSWER], tools).tools == (TOOL,)


@pytest.mark.parametrize("tools", ["", " ", [], None])
def test_no_tools_are_no_tools(tools: object) -> None:
    assert read_conversation([ANSWER], tools).tools is None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{", "is no JSON (Expecting property name enclosed in double quotes at character 1), needs a list of"),
        ('{"a": 1}', "is an object, needs a list of tool definitions"),
        (["add"], "holds a text, needs objects that define tools"),
        (5, "is a number, needs a list of tool definitions"),
    ],
)
def test_malformed_tools_are_told(value: object, problem: str) -> None:
    assert tools_problem(value).startswith(problem)


def test_messages_that_say_so_are_not_trained_and_templates_do_not_see_it() -> None:
    found = read_conversation(
        [
            {**USER, "weight": None},
            {**ANSWER, "weight": 0},
            USER,
            {**ANSWER, "train": False},
            USER,
            {**ANSWER, "train": True, "weight": 1},
        ],
        None,
    )
    assert found.untrained == {1, 3}
    assert [set(message) for message in found.messages] == [{"role", "content"}] * 6


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({**ANSWER, "train": 1}, "message 1: 'train' is a number, needs true or false"),
        ({**ANSWER, "weight": 0.5}, "message 1: 'weight' is 0.5, needs 0 (not trained) or 1"),
        ({**USER, "train": True}, "message 1: role 'user' cannot be trained; only the assistant's messages can"),
        ({"role": "assistant", "content": None}, "message 1: 'content' is null, needs a text"),
        ({"from": "human", "value": "Hi"}, "message 1 has 'from' and 'value': it is of format: sharegpt"),
        ({"role": "assistant", "tool_calls": "add"}, "message 1: 'tool_calls' is a text, needs a list"),
        ({"role": "assistant", "tool_calls": [{"id": 1}]}, "message 1: 'tool_calls' needs objects with function:"),
        (call("[1]"), "message 1: arguments of the tool call 'add' are no JSON object"),
        (call("{a: 1}"), "message 1: arguments of the tool call 'add' are no JSON object"),
    ],
)
def test_a_malformed_message_is_told(message: dict[str, object], problem: str) -> None:
    assert conversation_problem([message, ANSWER]).startswith(problem)
