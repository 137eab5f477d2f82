from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_trainer.data.examples import Columns, Example, ExampleReading, Format, prompt_completion_examples, row_format
from qlora_trainer.data.sources import Reading, Row, SourceFile
from qlora_trainer.errors import DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}


def file_of(*columns: dict[str, object]) -> SourceFile:
    return SourceFile(Path("a.jsonl"), tuple(Row(line, row) for line, row in enumerate(columns, start=1)), 0)


def pairs(*columns: dict[str, object], group_column: str | None = None) -> list[Example]:
    return prompt_completion_examples(
        file_of(*columns), prompt_column="prompt", completion_column="completion", group_column=group_column
    )


def conversations(*columns: object) -> list[Example]:
    return read("messages", *({"messages": column} for column in columns))


class Held(Reading):
    """Rows that lie in no file."""

    def __init__(self, columns: tuple[dict[str, object], ...]) -> None:
        super().__init__(Path("a.jsonl"))
        self.columns = columns

    def _rows(self) -> Iterator[Row]:
        return (Row(line, columns) for line, columns in enumerate(self.columns, start=1))


def read(form: Format, *columns: dict[str, object], rename: dict[str, str] | None = None) -> list[Example]:
    return list(ExampleReading(Held(columns), row_format(form, Columns()), group=None, rename=rename))


def test_a_prompt_and_a_completion_are_a_conversation_of_two() -> None:
    example = pairs({"prompt": "Hi", "completion": "Hello.", "other": 1})[0]
    assert example.messages == (USER, ANSWER)
    assert (example.prompt, example.completion, example.place, example.group) == ("Hi", "Hello.", "a.jsonl:1", None)


def test_a_conversation_keeps_its_messages_and_their_other_keys() -> None:
    named = {**USER, "name": "Anna"}
    example = conversations([ANSWER, named, ANSWER])[0]
    assert example.messages == (ANSWER, named, ANSWER)
    assert (example.prompt, example.completion) == ("Hi", "Hello.")


def test_a_conversation_of_one_answer_has_an_empty_prompt() -> None:
    assert conversations([ANSWER])[0].prompt == ""


def test_equal_values_of_the_group_column_are_equal_groups_and_a_number_is_no_text() -> None:
    keys: list[str | int] = ["a", "a", 1, "1"]
    columns: list[dict[str, object]] = [{"prompt": "Hi", "completion": "", "key": key} for key in keys]
    rows = pairs(*columns, group_column="key")
    assert rows[0].group == rows[1].group
    assert len({row.group for row in rows}) == 3


def test_equal_conversations_have_equal_content_whatever_their_place() -> None:
    first, second, third = pairs(
        {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}, {"prompt": "ab", "completion": ""}
    )
    assert first.content == second.content != third.content


def test_all_rows_with_missing_or_wrong_columns_are_told() -> None:
    with pytest.raises(DataError) as caught:
        pairs(
            {"prompt": "a", "completion": "b"},
            {"prompt": 5, "completion": "b"},
            {"prompt": "a"},
            {"prompt": None, "completion": ["b"]},
        )
    assert str(caught.value).splitlines() == [
        "a.jsonl: 4 problems",
        "  line 2: 'prompt' is a number, needs a text",
        "  line 3: 'completion' is missing",
        "  line 4: 'prompt' is null, needs a text",
        "  line 4: 'completion' is a list, needs a text",
    ]


def test_a_column_that_no_row_has_is_told_once_with_the_nearest_name() -> None:
    with pytest.raises(DataError) as caught:
        prompt_completion_examples(
            file_of({"mr": "a", "reference": "b"}, {"mr": "a"}),
            prompt_column="mr",
            completion_column="ref",
            group_column="id",
        )
    text = str(caught.value)
    assert "2 problems" in text
    assert "no row has a column 'ref'; the columns are mr, reference. Did you mean 'reference'?" in text
    assert "no row has a column 'id'" in text
    assert "Name it in the recipe (data.prompt_column and the like)" in text


def test_half_a_character_is_told() -> None:
    with pytest.raises(DataError, match=r"line 1: 'prompt' holds \\ud83d, one half of a character"):
        pairs({"prompt": "a\ud83d", "completion": "b"})


def test_a_group_must_be_a_plain_value() -> None:
    with pytest.raises(DataError, match="'key' is a list, needs a text or a number to split by"):
        pairs({"prompt": "a", "completion": "b", "key": []}, group_column="key")


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ("Hi", "is a text, needs a list of {role, content}"),
        ([], "is an empty list, needs a list of {role, content}"),
        (["Hi"], "message 1 is a text, needs an object with role and content"),
        ([USER, {"role": "assistant"}], "message 2: 'content' is missing"),
        ([{"role": 1, "content": "Hi"}], "message 1: 'role' is a number, needs a text"),
        ([{**ANSWER, "content": None}], "message 1: 'content' is null, needs a text"),
        (
            [USER, {"role": "bot", "content": "Hi"}],
            "ends with role 'bot', which is none of the usual system, user, assistant, tool; the last message must be "
            "the assistant's answer",
        ),
        ([ANSWER, USER], "ends with role 'user'; the last message must be the assistant's answer"),
    ],
)
def test_a_malformed_conversation_is_told(column: object, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        conversations([USER, ANSWER], column)
    assert str(caught.value).splitlines()[1] == f"  line 2: 'messages' {problem}"


def test_an_instruction_and_its_input_are_asked_for_together() -> None:
    with_input, without, empty = read(
        "instruction",
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hi.", "output": "Hi."},
        {"instruction": "Say hi.", "input": "", "output": "Hi."},
    )
    assert (with_input.prompt, with_input.completion) == ("Add.\n\n1 and 2", "3")
    assert without.messages == empty.messages == ({"role": "user", "content": "Say hi."}, {**ANSWER, "content": "Hi."})


def test_a_plain_text_is_one_message_that_is_nobodys() -> None:
    example = read("text", {"text": "Once upon a time"})[0]
    assert (example.is_text, example.prompt, example.completion) == (True, "", "Once upon a time")
    with pytest.raises(DataError, match="line 1: 'text' is an empty text; remove the row"):
        read("text", {"text": " \n"})


def test_columns_are_renamed_before_they_are_looked_at() -> None:
    row: dict[str, object] = {"question": "Hi", "answer": "Hello.", "prompt": 5}
    example = read("prompt_completion", row, rename={"question": "prompt", "answer": "completion"})[0]
    assert example.messages == (USER, ANSWER)
    with pytest.raises(DataError, match=r"no row has a column 'qestion'.*Did you mean 'question'"):
        read("prompt_completion", row, rename={"qestion": "prompt", "answer": "completion"})


def test_tools_and_tool_calls_make_conversations_differ() -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]}
    rows: list[dict[str, object]] = [
        {"messages": [USER, {**ANSWER, "content": ""}]},
        {"messages": [USER, called]},
        {"messages": [USER, called], "tools": [{"name": "add"}]},
    ]
    assert len({example.content for example in read("messages", *rows)}) == 3


def test_speakers_of_sharegpt_are_roles() -> None:
    turns: list[dict[str, object]] = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello.", "weight": 0},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "Bye."},
    ]
    example = read("sharegpt", {"messages": turns})[0]
    assert [message["role"] for message in example.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert (example.messages[2], example.untrained) == (ANSWER, {2})


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ([USER, ANSWER], "message 1 needs 'from' and 'value'; with role and content it is of format: messages"),
        ([{"from": "bing", "value": "Hi"}], "message 1: 'from' is 'bing', needs one of human, user, gpt"),
        ([{"from": "human", "value": "Hi"}], "ends with role 'user'; the last message must be the assistant's answer"),
        ("Hi", "is a text, needs a list of {role, content}"),
    ],
)
def test_malformed_speakers_are_told(column: object, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        read("sharegpt", {"messages": column})
    assert f"  line 1: 'messages' {problem}" in str(caught.value)
