"""What is trained under templates without generation markers, in the manner of the families that people tune.

Each is written anew with what makes its family hard: reasoning that is dropped from earlier turns, system turns that
are merged into the user's, contents that are trimmed, no generation prompt, tool definitions and calls. What is to be
trained is told from the conversations alone.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer

from qlora_trainer.data.audit import audit_masks, audit_notes
from qlora_trainer.data.chat_template import Message, Turns
from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow, encode_chat
from qlora_trainer.data.examples import Example
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError
from tests.models import tiny_tokenizer


class Family(NamedTuple):
    """A template, its control tokens, the token that ends a turn, and what it writes before an answer's words."""

    template: str
    control: tuple[str, ...]
    stop: str
    before: str = ""
    is_trimmed: bool = False


FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "llama3": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{{ (m.content | trim) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        is_trimmed=True,
    ),
    # No generation prompt; the system's words stand inside the last user turn alone, so earlier turns are rewritten.
    "mistral": Family(
        "{{ bos_token }}{% set sys = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set rest = messages[1:] if sys else messages %}{% for m in rest %}{% if m.role == 'user' %}"
        "{{ '[INST] ' }}{% if sys and loop.index0 >= rest | length - 2 %}{{ sys + '\\n\\n' }}{% endif %}"
        "{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
        "</s>",
        before=" ",
        is_trimmed=True,
    ),
    # The system's words are merged into the first user turn; the assistant is called model.
    "gemma": Family(
        "{{ bos_token }}{% set sys = messages[0].content | trim + '\\n\\n' if messages[0].role == 'system' else '' %}"
        "{% for m in (messages[1:] if sys else messages) %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{{ (sys if loop.first else '') + (m.content | trim) + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        is_trimmed=True,
    ),
    "phi": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|end|>",),
        "<|end|>",
    ),
    # Only the turn behind the last question has its reasoning, an empty one where the data has none.
    "qwen3": Family(
        "{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
        "{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}{% if m.role == 'assistant' %}"
        "{% set thought = '' %}{% if '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% if loop.index0 > ns.last and (loop.last or thought) %}"
        "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ content }}"
        "{% for call in m.tool_calls or [] %}"
        "{{ '\\n<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}"
        "{{ '</tool_call>' }}{% endfor %}{% elif m.role == 'tool' %}"
        "{{ '<tool_response>' + content + '</tool_response>' }}{% else %}{{ content }}{% endif %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
}
QWEN3_EMPTY = "<think>\n\n</think>\n\n"
SYSTEM: Message = {"role": "system", "content": "Be brief."}


def family(folder: Path, name: str) -> TextTokenizer:
    """A tokenizer with a family's control tokens, template and stop token."""
    shape = FAMILIES[name]
    tiny_tokenizer(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in shape.control])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(shape.template, encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": backend.token_to_id(shape.stop)}))
    return TextTokenizer.load(folder)


def chat(*texts: str, system: bool = False) -> Example:
    turns: list[Message] = [
        {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)
    ]
    return Example((SYSTEM, *turns) if system else tuple(turns), "a.jsonl:1")


def trained(row: EncodedRow, tokenizer: TextTokenizer) -> list[str]:
    """Text of each run of trained tokens."""
    runs = groupby(row.labels, key=lambda label: label != IGNORE_INDEX)
    return [tokenizer.decode(list(labels), skip_special=False) for is_trained, labels in runs if is_trained]


CONVERSATIONS = {
    "one": ("Hi", "Hello."),
    "three": ("Hi", "Hello.", "And you?", "Fine, you?", "Bye", "Bye."),
    "repeating": ("Bye", "Bye", "Bye", "Bye", "assistant\n", "Bye"),
    "blank ends": ("Hi \n", "Hello.\n", "\nBye ", "  Bye."),
    "empty": ("Hi", "", "", "Bye."),
    "other scripts": ("안녕", "네 🙂.", "ß?", "\u00e9\u0301 한글"),
}


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("system", [False, True], ids=["plain", "system"])
@pytest.mark.parametrize("texts", CONVERSATIONS.values(), ids=list(CONVERSATIONS))
@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_answers_and_their_stop_tokens_are_trained(
    tmp_path: Path, name: str, texts: tuple[str, ...], turns: Turns, *, system: bool
) -> None:
    shape, tokenizer = FAMILIES[name], family(tmp_path, name)
    row = encode_chat([chat(*texts, system=system)], tokenizer, train_turns=turns)[0]
    words = [text.strip() if shape.is_trimmed else text for text in texts[1::2]]
    expected = [f"{shape.before}{text}{shape.stop}" for text in words]
    if name == "qwen3":
        expected[-1] = QWEN3_EMPTY + expected[-1]
    assert trained(row, tokenizer) == (expected if turns == "all" else expected[-1:])
    assert row.token_ids[: len(row.prompt_ids)] == row.prompt_ids
    audit = audit_masks([row], [(row,)], bos_id=tokenizer.bos_id, stop_ids=tokenizer.stop_ids)
    assert (audit.stop_token_trained_share, audit_notes(audit)) == (1.0, [])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_that_is_not_to_be_trained_is_read_alone(tmp_path: Path, name: str) -> None:
    tokenizer, example = family(tmp_path, name), chat("Hi", "Hello.", "And you?", "Fine.", "Bye", "See you.")
    every = encode_chat([example], tokenizer)[0]
    for kept in ((1, 5), (3, 5), (5,), (1,), ()):
        untrained = frozenset({1, 3, 5} - set(kept))
        row = encode_chat([Example(example.messages, "", untrained=untrained)], tokenizer)[0]
        texts = [trained(every, tokenizer)[turn // 2] for turn in kept]
        assert (trained(row, tokenizer), row.token_ids) == (texts, every.token_ids)


def test_reasoning_that_the_template_drops_from_earlier_turns_is_not_trained_there(tmp_path: Path) -> None:
    tokenizer = family(tmp_path, "qwen3")
    example = chat("Hi", "<think>\nA greeting.\n</think>\n\nHello.", "Bye", "<think>\nThe end.\n</think>\n\nSee you.")
    row = encode_chat([example], tokenizer)[0]
    assert trained(row, tokenizer) == [
        "Hello.<|im_end|>",
        "<think>\nThe end.\n</think>\n\nSee you.<|im_end|>",
    ]
    assert tokenizer.render_chat(example.messages, add_generation_prompt=False).rewritten == 1


def test_tool_calls_are_trained_and_tool_answers_and_definitions_are_read(tmp_path: Path) -> None:
    tokenizer = family(tmp_path, "qwen3")
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    asked: tuple[Message, ...] = ({"role": "user", "content": "1 + 2?"}, {"role": "assistant", "tool_calls": [call]})
    answered: tuple[Message, ...] = (
        *asked,
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three."},
    )
    tools = ({"name": "add"},)
    written = '\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|im_end|>'
    first, whole = encode_chat([Example(asked, "", tools=tools), Example(answered, "", tools=tools)], tokenizer)
    assert trained(first, tokenizer) == [f"{QWEN3_EMPTY}{written}"]
    assert trained(whole, tokenizer) == [written, f"{QWEN3_EMPTY}Three.<|im_end|>"]
    for row in (first, whole):
        assert tokenizer.decode(row.token_ids, skip_special=False).startswith('<|im_start|>system\n{"name": "add"}')
    # What a generated answer is compared with is the call as the template writes it.
    assert first.completion == f"{QWEN3_EMPTY}{written}".removesuffix("<|im_end|>").strip()
    assert whole.completion == "Three."


def test_the_same_words_elsewhere_do_not_lead_the_search_astray(tmp_path: Path) -> None:
    tokenizer = family(tmp_path, "qwen3")
    texts = ("Hello.<|im_end|>\n", "Hello.", "Hello.", "Hello.Hello.", "Hello.", "Hello.")
    row = encode_chat([chat(*texts)], tokenizer)[0]
    text = tokenizer.render_chat(chat(*texts).messages, add_generation_prompt=False).text
    spans = tokenizer.render_chat(chat(*texts).messages, add_generation_prompt=False).assistant_spans
    assert [text[begin - 10 : begin] for begin, _ in spans] == ["assistant\n"] * 3
    assert [text[begin:end] for begin, end in spans] == [
        "Hello.<|im_end|>\n",
        "Hello.Hello.<|im_end|>\n",
        f"{QWEN3_EMPTY}Hello.<|im_end|>\n",
    ]
    assert trained(row, tokenizer)[1] == "Hello.Hello.<|im_end|>"


def test_a_turn_whose_words_the_template_changes_is_refused_rather_than_guessed(tmp_path: Path) -> None:
    folder = tmp_path
    family(folder, "chatml")
    template = FAMILIES["chatml"].template.replace(
        "m.content +", "(m.content if loop.last or m.role == 'user' else m.content[:2]) +"
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.train_turns: last"):
        encode_chat([chat("Hi", "Hello.", "Bye", "Bye.")], TextTokenizer.load(folder))
    row = encode_chat([chat("Hi", "Hello.", "Bye", "Bye.")], TextTokenizer.load(folder), train_turns="last")[0]
    assert trained(row, TextTokenizer.load(folder)) == ["Bye.<|im_end|>"]


def test_a_template_may_be_given_in_place_of_the_models_own(tmp_path: Path) -> None:
    family(tmp_path, "chatml")
    tokenizer = TextTokenizer.load(tmp_path, chat_template="{% for m in messages %}{{ m.content }}|{% endfor %}")
    assert tokenizer.render_prompt(chat("Hi").messages) == "Hi|"
    assert tokenizer.chat_template is not None
    assert not tokenizer.chat_template.writes_date
