"""What is trained, told from the conversations alone, against templates of the shapes that models are tuned with."""

import json
import random
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from qlora_trainer.data.audit import audit_masks, audit_notes, require_sound
from qlora_trainer.data.chat_template import Message, Turns
from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow, encode_chat, encode_text
from qlora_trainer.data.examples import Example
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError
from tests.models import tiny_tokenizer

BEGIN, END = "{% generation %}", "{% endgeneration %}"
# Each with its stop token, with what the assistant writes before its words, and with its special tokens.
SHAPES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_end|>",
        "",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        "<|eot_id|>",
        "",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "inst": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
        "</s>",
        " ",
        ("[INST]", "[/INST]"),
    ),
    "turns": (
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\\n' }}{% if role == 'model' %}"
        "{% generation %}{{ m.content | trim + '<end_of_turn>' }}{% endgeneration %}"
        "{% else %}{{ m.content | trim + '<end_of_turn>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        "<end_of_turn>",
        "",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
}
LETTERS = "abcdefghij XYZ 0123 .,:;!?'\"{}[]<>|/ \n\n\tüß한글🙂e\u0301"


def shaped(folder: Path, name: str, *, has_markers: bool) -> TextTokenizer:
    """A tokenizer with the special tokens and the template of a shape."""
    source, stop, _, special = SHAPES[name]
    folder.mkdir()
    tiny_tokenizer(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    backend.save(str(folder / "tokenizer.json"))
    template = source if has_markers else source.replace(BEGIN, "").replace(END, "")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    stop_id = backend.token_to_id(stop)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_id}), encoding="utf-8")
    return TextTokenizer.load(folder)


def conversations(count: int) -> list[Example]:
    """Random conversations of one to four answers; texts have no white space at their ends and may be empty."""
    source = random.Random(7)

    def text() -> str:
        return "".join(source.choices(LETTERS, k=source.randrange(12))).strip()

    examples = []
    for number in range(count):
        messages: list[Message] = []
        for _ in range(source.randrange(1, 5)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        examples.append(Example(tuple(messages), f"a.jsonl:{number + 1}"))
    return examples


def trained_texts(row: EncodedRow, tokenizer: TextTokenizer) -> list[str]:
    """Text of each run of trained tokens."""
    runs = groupby(row.labels, key=lambda label: label != IGNORE_INDEX)
    return [tokenizer.decode(list(labels), skip_special=False) for is_trained, labels in runs if is_trained]


def answers(example: Example, *, before: str, stop: str) -> list[str]:
    return [f"{before}{message['content']}{stop}" for message in example.messages if message["role"] == "assistant"]


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("has_markers", [True, False], ids=["markers", "turn_by_turn"])
@pytest.mark.parametrize("name", SHAPES)
def test_exactly_the_answers_and_their_stop_tokens_are_trained(
    tmp_path: Path, name: str, has_markers: bool, turns: Turns
) -> None:
    tokenizer = shaped(tmp_path / name, name, has_markers=has_markers)
    _, stop, before, _ = SHAPES[name]
    examples = conversations(60)
    rows = encode_chat(examples, tokenizer, train_turns=turns)
    for row, given in zip(rows, examples, strict=True):
        expected = answers(given, before=before, stop=stop)
        assert trained_texts(row, tokenizer) == (expected if turns == "all" else expected[-1:])
    audit = audit_masks(rows, [(row,) for row in rows], bos_id=tokenizer.bos_id, stop_ids=tokenizer.stop_ids)
    assert (audit.stop_token_trained_share, audit_notes(audit)) == (1.0, [])


@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_the_same_with_and_without_generation_markers(tmp_path: Path, name: str) -> None:
    examples = conversations(60)
    marked = encode_chat(examples, shaped(tmp_path / "marked", name, has_markers=True))
    assert encode_chat(examples, shaped(tmp_path / "bare", name, has_markers=False)) == marked


def test_which_turns_are_trained_changes_labels_alone(tmp_path: Path) -> None:
    tokenizer = shaped(tmp_path / "shape", "chatml", has_markers=False)
    examples = conversations(20)
    every, last = (encode_chat(examples, tokenizer, train_turns=turns) for turns in ("all", "last"))
    assert [(row.token_ids, row.prompt_ids) for row in every] == [(row.token_ids, row.prompt_ids) for row in last]
    assert sum(row.label_count for row in last) < sum(row.label_count for row in every)


@pytest.mark.parametrize(("has_markers", "doubled"), [(True, 20), (False, 20)])
def test_a_template_that_writes_bos_twice_is_refused(tmp_path: Path, has_markers: bool, doubled: int) -> None:
    folder = tmp_path / "shape"
    shaped(folder, "turns", has_markers=has_markers)
    template = folder / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    tokenizer = TextTokenizer.load(folder)
    rows = encode_chat(conversations(20), tokenizer)
    audit = audit_masks(rows, [(row,) for row in rows], bos_id=tokenizer.bos_id, stop_ids=tokenizer.stop_ids)
    assert audit.double_bos == doubled
    with pytest.raises(DataError, match=rf"{doubled} of 20 rows begin with two bos tokens"):
        require_sound(audit, tokenizer, window=512)


def test_a_text_template_that_writes_bos_beside_the_tokenizer_is_counted(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_tokenizer(tmp_path))
    rows = encode_text(conversations(3), tokenizer, template="<s>{prompt}\n", stop_id=tokenizer.eos_id)
    assert (
        audit_masks(rows, [(row,) for row in rows], bos_id=tokenizer.bos_id, stop_ids=tokenizer.stop_ids).double_bos
        == 3
    )
