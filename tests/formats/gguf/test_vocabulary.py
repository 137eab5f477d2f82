import doctest
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from gguf import TokenType

from qlora_trainer.errors import BaseModelError, RecipeError
from qlora_trainer.formats.gguf import vocabulary
from qlora_trainer.formats.gguf.pre_tokenizers import pre_tokenizer_name
from qlora_trainer.formats.gguf.vocabulary import vocabulary_metadata, without_generation_blocks
from tests.conftest import REPOSITORY
from tests.formats.gguf.small_models import BYTES_STEP, GPT2_STEP, LLAMA3_PATTERN, PRE_TOKENIZERS, split, steps
from tests.models import CHAT_TEMPLATE, VOCABULARY_SIZE, tiny_tokenizer

QUICKSTART = REPOSITORY / "recipes/quickstart/base"

SPACES = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The tiny byte-level tokenizer with its tokenizer.json changed."""
    tiny_tokenizer(folder)
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    change(described)
    path.write_text(json.dumps(described), encoding="utf-8")
    return folder


def sentencepiece_like(folder: Path, **changes: Any) -> Path:
    """A tokenizer of the words "ab" and "abc", with byte fallback, as converted from SentencePiece."""
    # "<" and "s>" would make "<s>", which is cut out of a text before they could.
    texts = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "c", "ab", "abc", "▁abc", "<", "s>"]
    special = [
        {"id": number, "content": texts[number], "special": True, "lstrip": False, "rstrip": False}
        for number in range(3)
    ]
    described = {
        "added_tokens": special,
        "normalizer": SPACES,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        },
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {text: number for number, text in enumerate(texts)},
            "merges": [["a", "b"], ["ab", "c"], ["▁", "abc"]],
        },
    }
    described |= {key: value for key, value in changes.items() if key != "merges"}
    if "merges" in changes:
        described["model"]["merges"] = changes["merges"]  # type: ignore[index] # the literal above
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_a_byte_level_tokenizer_becomes_llama_cpps_gpt2(tmp_path: Path) -> None:
    keys = vocabulary_metadata(tiny_tokenizer(tmp_path), size=VOCABULARY_SIZE + 2)
    described = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert all(tokens[number] == text for text, number in described["model"]["vocab"].items())
    assert tokens[-2:] == ["[PAD320]", "[PAD321]"]
    assert types[:7] == [TokenType.CONTROL] * 6 + [TokenType.NORMAL]
    assert types[-2:] == [TokenType.UNUSED] * 2
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in described["model"]["merges"]]
    special = [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert special == [0, 1, 2]
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is False


def test_the_quickstart_base_cuts_digits_apart_as_smollm_does() -> None:
    keys = vocabulary_metadata(QUICKSTART, size=4096)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "smollm")


def test_a_sentencepiece_tokenizer_gets_scores_from_the_order_of_its_merges(tmp_path: Path) -> None:
    keys = vocabulary_metadata(sentencepiece_like(tmp_path), size=13)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.scores"] == [0.0] * 9 + [-1.0, -2.0, 0.0, 0.0]
    assert keys["tokenizer.ggml.token_type"] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.BYTE,
        *[TokenType.NORMAL] * 9,
    ]
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    assert keys["tokenizer.ggml.unknown_token_id"] == 0


@pytest.mark.parametrize(("scheme", "adds"), [("always", True), ("first", True), ("never", False)])
def test_metaspace_says_whether_a_blank_is_put_before(scheme: str, adds: bool, tmp_path: Path) -> None:
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    keys = vocabulary_metadata(sentencepiece_like(tmp_path, normalizer=None, pre_tokenizer=metaspace), size=13)
    assert keys["tokenizer.ggml.add_space_prefix"] is adds


def test_merges_that_no_scores_can_say_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'ab' and 'c' never merge, though 'abc' is a token"):
        vocabulary_metadata(sentencepiece_like(tmp_path, merges=[["a", "b"], ["▁", "abc"]]), size=13)
    apart = [["a", "b"], ["ab", "c"], ["▁", "abc"], ["a", "bc"]]
    with pytest.raises(RecipeError, match="lie apart"):
        vocabulary_metadata(sentencepiece_like(tmp_path, merges=apart), size=13)


def test_blanks_treated_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="treats blanks as SentencePiece does"):
        vocabulary_metadata(sentencepiece_like(tmp_path, normalizer={"type": "Lowercase"}), size=13)


@pytest.mark.parametrize(("name", "described", "ignores"), PRE_TOKENIZERS)
def test_known_patterns_have_llama_cpps_names(name: str, described: dict[str, Any], ignores: bool) -> None:
    assert pre_tokenizer_name(described, ignore_merges=ignores) == name


@pytest.mark.parametrize(
    ("described", "ignores"),
    [
        (None, False),
        (GPT2_STEP, True),
        ({**GPT2_STEP, "add_prefix_space": True}, False),
        (steps({"type": "Digits", "individual_digits": False}, GPT2_STEP), False),
        (steps(split(LLAMA3_PATTERN + "x"), BYTES_STEP), True),
        (steps({**split(LLAMA3_PATTERN), "behavior": "Removed"}, BYTES_STEP), True),
        ({"type": "Whitespace"}, False),
    ],
)
def test_a_pattern_that_is_not_known_to_the_letter_is_refused(described: object, ignores: bool) -> None:
    with pytest.raises(RecipeError, match="not known here as one of"):
        pre_tokenizer_name(described, ignore_merges=ignores)


def test_other_models_and_stripping_tokens_are_refused_together(tmp_path: Path) -> None:
    def change(described: dict[str, Any]) -> None:
        described["model"]["type"] = "Unigram"
        described["added_tokens"][3]["lstrip"] = True

    with pytest.raises(RecipeError, match=r"(?s)type 'Unigram'.*<\|user\|>"):
        vocabulary_metadata(changed(tmp_path, change), size=VOCABULARY_SIZE)


def test_a_normalizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda described: described.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(RecipeError, match="Lowercase"):
        vocabulary_metadata(folder, size=VOCABULARY_SIZE)


def test_tokens_around_a_text_are_bos_and_eos_or_refused(tmp_path: Path) -> None:
    pieces: list[dict[str, Any]] = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ]

    def change(described: dict[str, Any]) -> None:
        described["post_processor"] = {"type": "TemplateProcessing", "single": pieces}

    keys = vocabulary_metadata(changed(tmp_path, change), size=VOCABULARY_SIZE)
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.ggml.add_eos_token"] is True
    pieces[1]["SpecialToken"]["id"] = "<|user|>"
    with pytest.raises(RecipeError, match=r"puts \['<\|user\|>'\] around a text"):
        vocabulary_metadata(changed(tmp_path, change), size=VOCABULARY_SIZE)


def test_further_stop_tokens_are_named_too(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 4, 5]}', encoding="utf-8")
    keys = vocabulary_metadata(tmp_path, size=VOCABULARY_SIZE)
    assert [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [1, 4, 5]


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="the embedding has 100 rows"):
        vocabulary_metadata(tiny_tokenizer(tmp_path), size=100)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no tokenizer\.json"):
        vocabulary_metadata(tmp_path, size=10)


def test_the_chat_template_renders_without_transformers_own_tags(tmp_path: Path) -> None:
    template = vocabulary_metadata(tiny_tokenizer(tmp_path), size=VOCABULARY_SIZE)["tokenizer.chat_template"]
    assert "generation %}" in CHAT_TEMPLATE
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    plain = jinja2.Environment(autoescape=False)
    text = plain.from_string(str(template)).render(messages=messages, bos_token="<s>", eos_token="</s>")
    assert text == "<s><|user|>one<|assistant|>two</s>"


def test_tags_keep_the_blanks_that_they_strip() -> None:
    template = "a {%- generation -%} b {%- endgeneration %} {% if add_generation_prompt %}c{% endif %}"
    assert without_generation_blocks(template) == (
        "a {%- if true -%} b {%- endif %} {% if add_generation_prompt %}c{% endif %}"
    )


def test_examples_of_the_docstrings_are_true() -> None:
    results = doctest.testmod(vocabulary)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.real
def test_stories260k_is_a_sentencepiece_tokenizer(shared_folder: Path) -> None:
    keys = vocabulary_metadata(shared_folder / "models/stories260K", size=512)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    assert "tokenizer.chat_template" not in keys
