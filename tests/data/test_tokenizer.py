import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import BaseModelError
from tests.data.tokenizers import blank_tokenizer
from tests.models import tiny_tokenizer

TEXTS = [
    "the ball",
    " two  blanks ",
    "line\nbreak\n\n",
    "special </s> inside<s>",
    "Grüße, 안녕, 🙂!",
    "",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "byte_level": tiny_tokenizer(tmp_path_factory.mktemp("byte_level")),
        "leading_blank": blank_tokenizer(tmp_path_factory.mktemp("leading_blank")),
    }


@pytest.fixture(params=["byte_level", "leading_blank"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A byte-level tokenizer whose files a test may change."""
    return Path(shutil.copytree(folders["byte_level"], tmp_path / "copy"))


def change(path: Path, **settings: object) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    content |= settings
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def assert_same_as_transformers(folder: Path, texts: list[str]) -> None:
    ours, oracle = TextTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = oracle(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids
        assert ours.encode_batch([text, text]) == [ids, ids]
        assert ours.locate_batch([text])[0].token_ids == ids
        assert ours.decode(ids, skip_special=True) == oracle.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == oracle.decode(ids, skip_special_tokens=False)
    assert (ours.bos_id, ours.bos_text) == (oracle.bos_token_id, oracle.bos_token)
    assert (ours.eos_id, ours.eos_text) == (oracle.eos_token_id, oracle.eos_token)
    assert ours.vocabulary_size == len(oracle)
    assert ours.adds_bos == (oracle("a").input_ids[:1] == [oracle.bos_token_id])


def test_ids_and_texts_are_those_of_transformers(folder: Path) -> None:
    assert_same_as_transformers(folder, TEXTS)


@pytest.mark.real
def test_ids_and_texts_of_the_real_models_are_those_of_transformers(shared_folder: Path) -> None:
    stories = (shared_folder / "data" / "tinystories" / "leozoroaster.txt").read_text(encoding="utf-8")
    for model in sorted((shared_folder / "models").iterdir()):
        assert_same_as_transformers(model, [*TEXTS, stories])


@pytest.mark.parametrize("settings", [{"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
@pytest.mark.parametrize("has_processor", [True, False])
def test_bos_is_added_where_the_tokenizer_file_says_so(
    copy: Path, settings: dict[str, bool], has_processor: bool
) -> None:
    change(copy / "tokenizer_config.json", **settings)
    if not has_processor:
        change(copy / "tokenizer.json", post_processor=None)
    assert TextTokenizer.load(copy).adds_bos == has_processor
    assert_same_as_transformers(copy, TEXTS)


def test_a_tokenizer_without_bos_adds_none(copy: Path) -> None:
    change(copy / "tokenizer_config.json", bos_token=None)
    tokenizer = TextTokenizer.load(copy)
    assert (tokenizer.bos_id, tokenizer.bos_text, tokenizer.adds_bos) == (None, None, False)


def test_special_tokens_may_be_objects(copy: Path) -> None:
    change(copy / "tokenizer_config.json", eos_token={"content": "<|user|>", "lstrip": False, "__type": "AddedToken"})
    assert TextTokenizer.load(copy).eos_text == "<|user|>"
    assert_same_as_transformers(copy, TEXTS)


@pytest.mark.parametrize("added_tokens", [None, {}])
def test_special_tokens_map_wins_unless_the_settings_list_added_tokens(
    copy: Path, added_tokens: dict[str, object] | None
) -> None:
    change(copy / "special_tokens_map.json", eos_token="<|user|>")
    change(copy / "tokenizer_config.json", added_tokens_decoder=added_tokens)
    assert TextTokenizer.load(copy).eos_text == ("<|user|>" if added_tokens is None else "</s>")
    assert_same_as_transformers(copy, TEXTS)


def test_an_ordinary_token_that_is_named_special_is_read_as_one(copy: Path) -> None:
    tokenizer = TextTokenizer.load(copy)
    word = max((tokenizer.decode([token], skip_special=False) for token in range(270, 300)), key=len)
    change(copy / "tokenizer_config.json", eos_token=word.replace(" ", "Ġ"))
    assert_same_as_transformers(copy, [*TEXTS, f"a{word}b"])


def test_settings_of_an_old_batch_in_the_tokenizer_file_change_nothing(copy: Path) -> None:
    before = TextTokenizer.load(copy).encode_batch(TEXTS)
    backend = Tokenizer.from_file(str(copy / "tokenizer.json"))
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=50)
    backend.save(str(copy / "tokenizer.json"))
    assert TextTokenizer.load(copy).encode_batch(TEXTS) == before


def test_padding_is_the_pad_token_and_eos_where_there_is_none(copy: Path) -> None:
    assert TextTokenizer.load(copy).pad_id == 2
    change(copy / "tokenizer_config.json", pad_token=None)
    assert TextTokenizer.load(copy).pad_id == 1


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [([1, 2], 9, (1, 2)), (5, 9, (5,)), (None, [7, 8], (7, 8)), (None, 9, (9,)), (None, None, (1,))],
)
def test_generation_stops_at_what_the_first_file_says(
    copy: Path, generation: int | list[int] | None, model: int | list[int] | None, expected: tuple[int, ...]
) -> None:
    change(copy / "generation_config.json", eos_token_id=generation)
    change(copy / "config.json", eos_token_id=model)
    assert TextTokenizer.load(copy).stop_ids == expected


def test_tokens_begin_at_their_characters(folder: Path) -> None:
    text = "the ball </s> 🙂 end"
    located = TextTokenizer.load(folder).locate_batch([text])[0]
    assert located.begins == sorted(located.begins)
    assert located.begins[0] == 0
    stop = located.token_ids.index(TextTokenizer.load(folder).eos_id)
    assert text[located.begins[stop] :].startswith("</s>")


@pytest.mark.parametrize(("first", "second"), [("[/INST]", " the ball</s>"), ("<s>[INST]", "the"), ("a\n", "b")])
def test_a_continuation_is_encoded_as_it_stands_behind_other_text(folder: Path, first: str, second: str) -> None:
    tokenizer = TextTokenizer.load(folder)
    whole = tokenizer.locate_batch([first + second])[0]
    continued = tokenizer.locate_continuations([second])[0]
    assert tokenizer.encode(first) + continued.token_ids == whole.token_ids
    assert [len(first) + begin for begin in continued.begins] == whole.begins[-len(continued.begins) :]


def test_a_continuation_without_text_has_no_tokens(folder: Path) -> None:
    assert TextTokenizer.load(folder).locate_continuations([""])[0].token_ids == []


@pytest.mark.parametrize("form", ["jinja", "text", "list"])
def test_the_chat_template_is_found_where_the_model_keeps_it(copy: Path, form: str) -> None:
    change(copy / "tokenizer_config.json", chat_template={"jinja": "other", "text": "found"}.get(form))
    if form == "list":
        templates = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "found"}]
        change(copy / "tokenizer_config.json", chat_template=templates)
    (copy / "chat_template.jinja").unlink()
    if form == "jinja":
        (copy / "chat_template.jinja").write_text("found")
    tokenizer = TextTokenizer.load(copy)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(messages, add_generation_prompt=True).text == "found"
    assert AutoTokenizer.from_pretrained(copy).apply_chat_template(messages, tokenize=False) == "found"


def test_a_model_without_a_chat_template_says_so(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    tokenizer = TextTokenizer.load(copy)
    assert not tokenizer.has_chat_template
    with pytest.raises(BaseModelError, match="no chat template"):
        tokenizer.render_chat([], add_generation_prompt=False)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no tokenizer\.json.*save_pretrained"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(copy: Path, name: str) -> None:
    (copy / name).write_text('{"cut off')
    with pytest.raises(BaseModelError, match=name):
        TextTokenizer.load(copy)


def test_settings_that_are_no_object_are_refused(copy: Path) -> None:
    (copy / "tokenizer_config.json").write_text("[]")
    with pytest.raises(BaseModelError, match=r"tokenizer_config\.json holds a list"):
        TextTokenizer.load(copy)


def test_a_tokenizer_without_eos_is_refused(copy: Path) -> None:
    change(copy / "tokenizer_config.json", eos_token=None)
    with pytest.raises(BaseModelError, match="names no eos token"):
        TextTokenizer.load(copy)


def test_special_tokens_outside_the_vocabulary_are_refused(copy: Path) -> None:
    change(copy / "tokenizer_config.json", eos_token="<end>", pad_token="<fill>")
    with pytest.raises(BaseModelError, match=r"eos_token '<end>', pad_token '<fill>'"):
        TextTokenizer.load(copy)
