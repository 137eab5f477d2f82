"""The base model's tokenizer, token for token as transformers' ``AutoTokenizer``, without importing transformers.

Reads ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json``, ``chat_template.jinja`` and, for
the ids that generation stops at, ``generation_config.json`` and ``config.json``. The rules by which these
files override each other are those of transformers 5.23. It knows no rows and no labels.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tokenizers import AddedToken, Tokenizer

from qlora_trainer.data.chat_template import ChatTemplate, Message, RenderedChat, Turns
from qlora_trainer.errors import BaseModelError

Settings = Mapping[str, object]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
"""Every file that ``TextTokenizer.load`` reads."""


@dataclass(frozen=True)
class TokenizedText:
    """Token ids and, for each token, the index of the character that it begins with."""

    token_ids: list[int]
    begins: list[int]


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back.

    Attributes:
        special_tokens: texts by name, such as ``{"eos_token": "</s>"}``.
        eos_id: id of the eos token.
        adds_bos: whether the tokenizer puts bos before a text by itself, in every runtime that asks it to.
        stop_ids: ids that generation stops at, from generation_config.json, else config.json, else ``(eos_id,)``.
        chat_template: None where the base model has none.
    """

    special_tokens: Mapping[str, str]
    eos_id: int
    adds_bos: bool
    stop_ids: tuple[int, ...]
    chat_template: ChatTemplate | None
    _backend: Tokenizer = field(repr=False)

    @classmethod
    def load(cls, folder: Path, *, chat_template: str | None = None) -> Self:
        """The tokenizer of the model in ``folder``.

        Args:
            folder: in Hugging Face layout.
            chat_template: Jinja text to use in place of the model's own.

        Raises:
            BaseModelError: tokenizer.json is missing or broken; there is no eos token; or a special token is not
                in the vocabulary.
        """
        settings = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(folder, settings)
        backend = _backend(folder / "tokenizer.json")
        eos_id = _register(backend, special_tokens, folder)
        return cls(
            special_tokens=special_tokens,
            eos_id=eos_id,
            adds_bos=_adds_bos(backend, special_tokens.get("bos_token")),
            stop_ids=_stop_ids(folder) or (eos_id,),
            chat_template=(
                _chat_template(folder, settings, special_tokens)
                if chat_template is None
                else ChatTemplate(chat_template, special_tokens)
            ),
            _backend=backend,
        )

    @property
    def bos_text(self) -> str | None:
        """Text of the bos token; None where there is none."""
        return self.special_tokens.get("bos_token")

    @property
    def bos_id(self) -> int | None:
        """Id of the bos token; None where there is none."""
        return None if self.bos_text is None else self.token_id(self.bos_text)

    @property
    def eos_text(self) -> str:
        """Text of the eos token."""
        return self.special_tokens["eos_token"]

    @property
    def pad_id(self) -> int:
        """Id of the pad token; the eos token's where there is none.

        Padding stands right of a row and has no labels, so under causal attention its id changes nothing.
        """
        pad = self.token_id(self.special_tokens.get("pad_token", self.eos_text))
        return self.eos_id if pad is None else pad

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, added ones included; the model's embedding may be padded to more."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``render_chat`` can be used."""
        return self.chat_template is not None

    def token_id(self, text: str) -> int | None:
        """Id of the token with exactly this text; None where there is none."""
        return self._backend.token_to_id(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone: nothing is put before or behind it.

        The text of a special token inside ``text`` becomes that token.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores and without locating tokens, which is a quarter faster."""
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def locate_batch(self, texts: Sequence[str]) -> list[TokenizedText]:
        """``encode`` of each text with the character at which each token begins."""
        found = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [TokenizedText(one.ids, [begin for begin, _ in one.offsets]) for one in found]

    def locate_continuations(self, texts: Sequence[str]) -> list[TokenizedText]:
        """``locate_batch`` of texts that stand behind other text.

        SentencePiece-like tokenizers put a blank before a text's first word, which must not appear in the middle of a
        conversation. It goes before a line break here, and is cut off with it (transformers does the same).
        """
        if not self._prepends_blank:
            return self.locate_batch(texts)
        newline = self.encode("\n")
        found = self.locate_batch([f"\n{text}" for text in texts])
        return [
            TokenizedText(one.token_ids[len(newline) :], [begin - 1 for begin in one.begins[len(newline) :]])
            if one.token_ids[: len(newline)] == newline
            else self.locate_batch([text])[0]
            for one, text in zip(found, texts, strict=True)
        ]

    @property
    def _prepends_blank(self) -> bool:
        """Whether a text is encoded otherwise at its beginning than behind a line break."""
        return self.encode("\na") != self.encode("\n") + self.encode("a")

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of the ids.

        Args:
            ids: token ids.
            skip_special: leave special tokens out.
        """
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    @property
    def control_texts(self) -> tuple[str, ...]:
        """Texts of the tokens that steer a model rather than say something, such as ``<|im_end|>``."""
        added = self._backend.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[object] | None = None,
        turns: Turns = "all",
        untrained: Collection[int] = (),
    ) -> RenderedChat:
        """The messages through the chat template; see ``ChatTemplate.render``.

        Raises:
            BaseModelError: the base model has no chat template.
            DataError: the template refuses the messages, or the assistant's characters cannot be told apart.
        """
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, turns=turns, untrained=untrained
        )

    def render_prompt(self, messages: Sequence[Message], *, tools: Sequence[object] | None = None) -> str:
        """What generation of an answer to the messages is started with; see ``ChatTemplate.prompt``.

        Raises:
            BaseModelError: the base model has no chat template.
            DataError: the template refuses the messages.
        """
        return self._template.prompt(messages, tools=tools)

    @property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise BaseModelError(
                "the base model has no chat template (no chat_template.jinja, and no chat_template in "
                "tokenizer_config.json). Set data.render: text with a text_template, or add a template"
            )
        return self.chat_template


def _read_json(path: Path) -> dict[str, object]:
    """The file's object; empty where there is no file."""
    try:
        loaded: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BaseModelError(f"{path} cannot be read as JSON: {error}. Fetch the base model again.") from error
    if not isinstance(loaded, dict):
        raise BaseModelError(f"{path} holds a {type(loaded).__name__}, not an object. Fetch the base model again.")
    return loaded


def _backend(path: Path) -> Tokenizer:
    if not path.is_file():
        raise BaseModelError(
            f"{path.parent} has no tokenizer.json. Save the tokenizer beside the model: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise BaseModelError(f"{path} is no readable tokenizer: {error}. Fetch the base model again.") from error
    # Some files carry the settings of the batch that they were saved after.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _special_tokens(folder: Path, settings: Settings) -> dict[str, str]:
    """Texts of the named special tokens, from ``"</s>"`` and ``{"content": "</s>"}`` alike.

    special_tokens_map.json wins over tokenizer_config.json, but counts only where the latter has no
    ``added_tokens_decoder``, as in transformers.
    """
    named = dict(settings)
    if "added_tokens_decoder" not in settings:
        named |= _read_json(folder / "special_tokens_map.json")
    texts = {}
    for name, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            texts[name] = text
    return texts


def _register(backend: Tokenizer, special_tokens: Mapping[str, str], folder: Path) -> int:
    """Makes ``backend`` read the special tokens' texts as these tokens; gives the eos token's id.

    Changes ``backend``, but not its size: a token outside the vocabulary has no row in the model's embedding.
    """
    unknown = {name: text for name, text in special_tokens.items() if backend.token_to_id(text) is None}
    if unknown:
        listed = ", ".join(f"{name} {text!r}" for name, text in unknown.items())
        raise BaseModelError(
            f"{folder}: tokenizer_config.json names special tokens that tokenizer.json does not hold: {listed}. "
            "Name tokens of the vocabulary."
        )
    eos_id = backend.token_to_id(special_tokens.get("eos_token", ""))
    if eos_id is None:
        raise BaseModelError(
            f"{folder}: the tokenizer names no eos token, so no text could end. Set eos_token in tokenizer_config.json."
        )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [text for text in special_tokens.values() if text not in known]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])
    return eos_id


def _adds_bos(backend: Tokenizer, bos_text: str | None) -> bool:
    """Whether tokenizer.json puts bos before a text; transformers ignores ``add_bos_token`` beside that file."""
    if bos_text is None:
        return False
    return backend.encode("a", add_special_tokens=True).ids[:1] == [backend.token_to_id(bos_text)]


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json, else of config.json; empty where neither names one."""
    for name in ("generation_config.json", "config.json"):
        named = _read_json(folder / name).get("eos_token_id")
        ids = named if isinstance(named, list) else [named]
        found = tuple(number for number in ids if isinstance(number, int))
        if found:
            return found
    return ()


def _chat_template(folder: Path, settings: Settings, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """chat_template.jinja, else ``chat_template`` of tokenizer_config.json: a text, or a list with one ``default``."""
    path = folder / "chat_template.jinja"
    source: object = settings.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    return ChatTemplate(source, special_tokens) if isinstance(source, str) else None
