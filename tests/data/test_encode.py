import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora_trainer.data.chat_template import Message
from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow, encode_chat, encode_documents, encode_text
from qlora_trainer.data.examples import Example
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError
from tests.data.tokenizers import blank_tokenizer
from tests.models import BOS_ID, EOS_ID, tiny_tokenizer


def example(*texts: str, line: int = 1) -> Example:
    roles = ("user", "assistant")
    messages: list[Message] = [
        {"role": roles[turn % 2], "content": text} for turn, text in enumerate(texts, start=len(texts) % 2)
    ]
    return Example(tuple(messages), f"a.jsonl:{line}")


def trained(row: EncodedRow) -> list[int]:
    return [label for label in row.labels if label != IGNORE_INDEX]


def assert_labels_are_tokens(row: EncodedRow) -> None:
    assert len(row.labels) == len(row.token_ids)
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(row.labels, row.token_ids, strict=True))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def blank_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blank_tokenizer(tmp_path_factory.mktemp("leading_blank"))


def with_template(folder: Path, template: str) -> TextTokenizer:
    tiny_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return TextTokenizer.load(folder)


def test_a_text_row_is_bos_prompt_completion_stop_and_only_the_last_two_are_trained(tokenizer: TextTokenizer) -> None:
    rows = encode_text(
        [example("Book a table", "for two"), example("Call {Anna}", "")],
        tokenizer,
        template="Q: {prompt} {}\n",
        stop_id=EOS_ID,
    )
    prompt = [BOS_ID, *tokenizer.encode("Q: Book a table {}\n")]
    completion = [*tokenizer.encode("for two"), EOS_ID]
    assert rows[0] == EncodedRow(
        token_ids=(*prompt, *completion),
        labels=(*[IGNORE_INDEX] * len(prompt), *completion),
        prompt_ids=tuple(prompt),
        prompt="Book a table",
        completion="for two",
        place=rows[0].place,
    )
    assert rows[0].place == example("", "").place
    assert trained(rows[1]) == [EOS_ID]
    assert tokenizer.decode(rows[1].token_ids, skip_special=True) == "Q: Call {Anna} {}\n"


def test_a_text_row_has_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    file = tiny_tokenizer(tmp_path) / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    tokenizer = TextTokenizer.load(tmp_path)
    row = encode_text([example("Call Anna", "Done")], tokenizer, template="{prompt}", stop_id=EOS_ID)[0]
    assert tokenizer.decode(row.token_ids, skip_special=False) == "Call AnnaDone</s>"


def test_chat_rows_have_the_ids_and_the_trained_tokens_of_transformers(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_tokenizer(tmp_path))
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    examples = [
        example("Book a table for two", "Booked: two."),
        example("Call Anna", "Done.", "And Grüße an Paul 🙂", "Also done 🙂."),
        example("Hello!"),
    ]
    for row, given in zip(encode_chat(examples, tokenizer), examples, strict=True):
        expected = oracle.apply_chat_template(list(given.messages), return_dict=True, return_assistant_tokens_mask=True)
        assert list(row.token_ids) == expected["input_ids"]
        assert [int(label != IGNORE_INDEX) for label in row.labels] == expected["assistant_masks"]
        start = (
            oracle.apply_chat_template(list(given.messages[:-1]), add_generation_prompt=True) if given.prompt else None
        )
        assert start is None or list(row.prompt_ids) == start["input_ids"]
        assert_labels_are_tokens(row)


def test_rows_of_a_template_without_generation_blocks_have_the_ids_of_transformers(blank_folder: Path) -> None:
    tokenizer, oracle = TextTokenizer.load(blank_folder), AutoTokenizer.from_pretrained(blank_folder)
    given = example("the ball", "the ball is here", "hello", "the end")
    row = encode_chat([given], tokenizer)[0]
    assert list(row.token_ids) == oracle.apply_chat_template(list(given.messages))["input_ids"]
    assert tokenizer.decode(trained(row), skip_special=False) == "the ball is here</s> the end</s>"


def test_every_assistant_turn_is_trained_with_its_stop_token(tokenizer: TextTokenizer) -> None:
    row = encode_chat([example("Call Anna", "Done.", "And Paul", "Also done.")], tokenizer)[0]
    assert tokenizer.decode(trained(row), skip_special=False) == "Done.</s>Also done.</s>"
    assert (row.prompt, row.completion) == ("And Paul", "Also done.")


def test_a_row_begins_with_what_generation_is_started_with(tokenizer: TextTokenizer) -> None:
    row = encode_chat([example("Call Anna", "Done.", "And Paul", "Also done.")], tokenizer)[0]
    assert row.token_ids[: len(row.prompt_ids)] == row.prompt_ids
    text = tokenizer.decode(row.prompt_ids, skip_special=False)
    assert text == "<s><|user|>Call Anna<|assistant|>Done.</s><|user|>And Paul<|assistant|>"


def test_no_token_reaches_over_the_end_of_the_prompt(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path,
        "{% for message in messages %}{{ message.role + ': ' }}{% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    prompt, text = "user: Anna and Paulassistant: ", "user: Anna and Paulassistant: the fox</s>"
    # As one text, the blank of the prompt and the first letters of the answer are one token.
    assert len(prompt) not in tokenizer.locate_batch([text])[0].begins
    row = encode_chat([example("Anna and Paul", "the fox")], tokenizer)[0]
    assert tokenizer.decode(row.token_ids, skip_special=False) == text
    assert list(row.prompt_ids) == tokenizer.encode(prompt) == list(row.token_ids[: len(row.prompt_ids)])
    assert tokenizer.decode(trained(row), skip_special=False) == "the fox</s>"


def test_what_follows_the_generation_prompt_is_trained_even_before_the_generation_block(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path,
        "{% for message in messages %}{{ message.role }}:{% if message.role == 'assistant' %} {% generation %}"
        "{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    row = encode_chat([example("Call Anna", "the fox")], tokenizer)[0]
    assert tokenizer.decode(trained(row), skip_special=False) == " the fox</s>"


def test_nothing_is_trained_behind_the_stop_token(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path,
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content + eos_token }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )
    row = encode_chat([example("Call Anna", "Done.", "And Paul", "Also done.")], tokenizer)[0]
    assert tokenizer.decode(trained(row), skip_special=False) == "Done.</s>Also done.</s>"
    assert tokenizer.decode(row.token_ids, skip_special=False).endswith("Also done.</s>\n\n")


def test_a_generation_prompt_that_the_row_does_not_hold_is_kept_for_generation(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path,
        "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>think{% endif %}",
    )
    row = encode_chat([example("Call Anna", "Done.")], tokenizer)[0]
    assert tokenizer.decode(row.prompt_ids, skip_special=False) == "<|user|>Call Anna<|assistant|>think"
    assert tokenizer.decode(row.token_ids, skip_special=False) == "<|user|>Call Anna<|assistant|>Done.</s>"
    assert tokenizer.decode(trained(row), skip_special=False) == "Done.</s>"


def test_a_template_whose_blocks_hold_nothing_trains_nothing(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path, "{% for message in messages %}{{ message.content }}{% endfor %}{# {% generation %} #}"
    )
    row = encode_chat([example("Call Anna", "Done.")], tokenizer)[0]
    assert (trained(row), row.label_count) == ([], 0)


def test_all_rows_that_the_template_refuses_are_told(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path,
        "{% generation %}{{ messages[0].content }}{% endgeneration %}"
        "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}",
    )
    rows = [example("bad", "a", line=3), example("good", "a", line=4), example("bad", "b", line=5)]
    with pytest.raises(DataError, match=r"2 problems\n.*a\.jsonl:3: .*no\n.*a\.jsonl:5"):
        encode_chat(rows, tokenizer)


def test_the_first_token_of_a_row_is_no_label() -> None:
    row = EncodedRow((5, 6, 7), (5, IGNORE_INDEX, 7), (), "", "")
    assert row.label_count == 1


def test_of_a_document_every_token_but_the_first_is_trained_and_eos_ends_it(tokenizer: TextTokenizer) -> None:
    document = Example(({"role": "text", "content": "the fox"},), "a.txt:1", is_text=True)
    row = encode_documents([document], tokenizer)[0]
    text = tokenizer.encode("the fox")
    assert row.token_ids == (BOS_ID, *text, EOS_ID)
    assert row.labels == (IGNORE_INDEX, *text, EOS_ID)
    assert (row.prompt_ids, row.prompt, row.completion) == ((BOS_ID,), "", "the fox")


def test_a_document_has_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    file = tiny_tokenizer(tmp_path) / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    tokenizer = TextTokenizer.load(tmp_path)
    row = encode_documents([Example(({"role": "text", "content": "the fox"},), "", is_text=True)], tokenizer)[0]
    assert row.token_ids == (*tokenizer.encode("the fox"), EOS_ID)
    assert (row.labels[0], row.label_count, row.prompt_ids) == (IGNORE_INDEX, len(row.token_ids) - 1, ())
