import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_trainer.data.chat_template import ChatTemplate, Message
from qlora_trainer.errors import BaseModelError, DataError

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <1> & 'ü'?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "And 2?"},
    {"role": "assistant", "content": "Two."},
]

MARKED = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}"
    "{%- generation -%}{{ message.content + eos_token }}{%- endgeneration -%}{% else %}{{ message.content }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
UNMARKED = MARKED.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
# Blocks on lines of their own, whose line breaks and indents must vanish, and everything else that templates use.
RICH = """{%- set seen = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {% if loop.index0 > 90 %}
        {% break %}
    {% endif %}
    {% set seen.turns = seen.turns + 1 %}
{{ message | tojson }}{{ [seen.turns, message.content] | tojson(indent=2) }}
    {% if tools is none and documents is none %}
none, {{ strftime_now('%Y') }}, {{ dict(a=1).a }}, [{{ missing }}]
    {% endif %}
{% endfor %}
"""


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("source", [MARKED, UNMARKED, RICH], ids=["marked", "unmarked", "rich"])
def test_text_is_the_one_that_transformers_renders(source: str, add_generation_prompt: bool) -> None:
    messages = MESSAGES if source != RICH else [message for message in MESSAGES if message["role"] != "assistant"]
    oracle, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=add_generation_prompt, **SPECIAL_TOKENS
    )
    chat = ChatTemplate(source, SPECIAL_TOKENS).render(messages, add_generation_prompt=add_generation_prompt)
    assert chat.text == oracle[0]


def test_spans_of_generation_blocks_are_those_of_transformers() -> None:
    oracle, spans = render_jinja_template(
        [MESSAGES], chat_template=MARKED, return_assistant_tokens_mask=True, **SPECIAL_TOKENS
    )
    chat = ChatTemplate(MARKED, SPECIAL_TOKENS).render(MESSAGES, add_generation_prompt=False)
    assert (chat.text, list(chat.assistant_spans)) == (oracle[0], spans[0])
    assert [chat.text[begin:end] for begin, end in chat.assistant_spans] == ["One.</s>", "Two.</s>"]


def test_without_generation_blocks_a_span_is_what_a_turn_adds_to_the_generation_prompt() -> None:
    chat = ChatTemplate(UNMARKED, SPECIAL_TOKENS).render(MESSAGES, add_generation_prompt=False)
    assert [chat.text[begin:end] for begin, end in chat.assistant_spans] == ["One.</s>\n", "Two.</s>\n"]


def test_a_template_that_rewrites_earlier_answers_is_refused() -> None:
    forgetful = UNMARKED.replace("message.content + eos_token", "(message.content if loop.last else '...') + eos_token")
    template = ChatTemplate(forgetful, SPECIAL_TOKENS)
    assert template.render(MESSAGES[:3], add_generation_prompt=False).text.endswith("One.</s>\n")
    with pytest.raises(DataError, match=r"message 3 of 5: .* renders this assistant turn differently"):
        template.render(MESSAGES, add_generation_prompt=False)


def test_a_conversation_that_the_template_refuses_is_told_with_its_roles() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", SPECIAL_TOKENS)
    with pytest.raises(DataError, match=r"roles: system, user.*roles must alternate"):
        template.render(MESSAGES[:2], add_generation_prompt=False)


def test_a_template_that_fails_on_a_value_is_told_as_a_problem_of_the_data() -> None:
    template = ChatTemplate("{{ messages[0].content + 1 }}", SPECIAL_TOKENS)
    with pytest.raises(DataError, match="can only concatenate str"):
        template.render(MESSAGES, add_generation_prompt=False)


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    template = ChatTemplate("{{ ''.__class__.__mro__ }}", SPECIAL_TOKENS)
    with pytest.raises(DataError, match="unsafe"):
        template.render(MESSAGES, add_generation_prompt=False)


def test_a_template_that_is_not_jinja_is_told_with_its_line() -> None:
    with pytest.raises(BaseModelError, match=r"line 2: .*endfor"):
        ChatTemplate("first\n{% for message in messages %}", SPECIAL_TOKENS)


def test_fields_that_are_null_are_absent_for_the_template() -> None:
    template = ChatTemplate("{{ 'name' in messages[0] }}", SPECIAL_TOKENS)
    message = {"role": "user", "content": "Hi", "name": None}
    assert template.render([message], add_generation_prompt=False).text == "False"


def test_text_that_imitates_the_marks_is_refused() -> None:
    template = ChatTemplate(MARKED, SPECIAL_TOKENS)
    with pytest.raises(DataError, match=r"U\+10FFFE"):
        template.render([{"role": "user", "content": "\U0010fffe"}], add_generation_prompt=False)


# As templates do that leave earlier reasoning out.
FORGETTING = (
    "{% for message in messages %}{{ message.role }}: {% if loop.last or message.role == 'user' %}"
    "{{ message.content }}{% else %}...{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_the_last_turn_is_told_apart_even_where_earlier_ones_cannot_be() -> None:
    template = ChatTemplate(FORGETTING, SPECIAL_TOKENS)
    with pytest.raises(DataError, match=r"message 3 of 5: .*or set data\.train_turns: last"):
        template.render(MESSAGES, add_generation_prompt=False)
    chat = template.render(MESSAGES, add_generation_prompt=False, turns="last")
    assert [chat.text[begin:end] for begin, end in chat.assistant_spans] == ["Two.</s>"]


def test_a_last_turn_in_several_blocks_has_all_of_them() -> None:
    source = MARKED.replace(
        "{{ message.content + eos_token }}",
        "{{ message.content }}{%- endgeneration -%}|{%- generation -%}{{ eos_token }}",
    )
    chat = ChatTemplate(source, SPECIAL_TOKENS).render(MESSAGES, add_generation_prompt=False, turns="last")
    assert [chat.text[begin:end] for begin, end in chat.assistant_spans] == ["Two.", "</s>"]


@pytest.mark.parametrize("source", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_a_last_message_that_the_assistant_did_not_write_has_no_span(source: str) -> None:
    chat = ChatTemplate(source, SPECIAL_TOKENS).render(MESSAGES[:-1], add_generation_prompt=False, turns="last")
    assert chat.assistant_spans == ()
