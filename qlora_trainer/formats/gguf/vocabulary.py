"""A Hugging Face tokenizer as the tokenizer of a GGUF file, token for token, with its chat template.

Two kinds are known: byte-level BPE (llama.cpp's ``gpt2``) and BPE over characters with byte fallback, as converted
from SentencePiece (llama.cpp's ``llama``). What llama.cpp would tokenize otherwise is refused, as far as the files show
it; ``runners.llama_cpp.parity_problems`` compares on texts. Unicode normalization is one such thing: llama.cpp leaves
a qwen2 text as it is, transformers composes it (NFC) first, so texts with decomposed letters differ.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import Keys, TokenType

from qlora_trainer.errors import BaseModelError, RecipeError
from qlora_trainer.formats.gguf.container import Metadata
from qlora_trainer.formats.gguf.pre_tokenizers import pre_tokenizer_name

Described = Mapping[str, object]

SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class _Files:
    """What a tokenizer's files say."""

    tokenizer: Described
    settings: Described
    special: Mapping[str, str]
    stop_ids: tuple[int, ...]
    template: str | None

    @property
    def model(self) -> Described:
        return _object(self.tokenizer["model"])

    @property
    def added(self) -> list[Described]:
        found = self.tokenizer.get("added_tokens") or []
        return [_object(token) for token in found] if isinstance(found, list) else []


def vocabulary_metadata(folder: Path, *, size: int) -> Metadata:
    """The ``tokenizer.*`` keys of a GGUF file.

    Args:
        folder: Hugging Face layout with a tokenizer.json.
        size: rows of the model's embedding; ids without a token get an unused one.

    Raises:
        BaseModelError: tokenizer.json is missing or holds more tokens than the embedding has rows.
        RecipeError: llama.cpp cannot tokenize as this tokenizer does; says why.
    """
    files = _read(folder)
    ids = _ids(files)
    if max(ids.values()) >= size:
        raise BaseModelError(
            f"{folder}: tokenizer.json has token {max(ids.values())}, but the embedding has {size} rows. "
            "Add rows to the model, or remove the tokens."
        )
    _require_plain(files)
    is_byte_level = not files.model.get("byte_fallback")
    texts = [f"[PAD{number}]" for number in range(size)]
    for text, number in ids.items():
        texts[number] = text
    keys: Metadata = {
        Keys.Tokenizer.MODEL: "gpt2" if is_byte_level else "llama",
        Keys.Tokenizer.LIST: texts,
        Keys.Tokenizer.TOKEN_TYPE: _types(files, ids, size, has_bytes=not is_byte_level),
        **(_byte_level(files) if is_byte_level else _sentencepiece(files, texts)),
        **_special_keys(files, ids),
    }
    if files.template is not None:
        keys[Keys.Tokenizer.CHAT_TEMPLATE] = without_generation_blocks(files.template)
    return keys


def without_generation_blocks(template: str) -> str:
    """A chat template without transformers' own ``{% generation %}``, which other Jinja engines do not know.

    It becomes a condition that always holds, because the tags also strip blanks around them:

    >>> without_generation_blocks("{%- generation %}{{ text }}{% endgeneration -%}")
    '{%- if true %}{{ text }}{% endif -%}'
    """
    return _GENERATION_TAG.sub(
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}",
        template,
    )


def _read(folder: Path) -> _Files:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BaseModelError(f"{folder} has no tokenizer.json, which a GGUF file holds. Save the tokenizer beside it.")
    settings = _json(folder / "tokenizer_config.json")
    named = settings if "added_tokens_decoder" in settings else settings | _json(folder / "special_tokens_map.json")
    special = {}
    for name, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            special[name] = text
    template: object = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
    return _Files(
        tokenizer=_json(path),
        settings=settings,
        special=special,
        stop_ids=_stop_ids(folder),
        template=template if isinstance(template, str) else None,
    )


def _stop_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        named = _json(folder / name).get("eos_token_id")
        found = tuple(number for number in (named if isinstance(named, list) else [named]) if isinstance(number, int))
        if found:
            return found
    return ()


def _json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    loaded: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _object(value: object) -> Described:
    return value if isinstance(value, dict) else {}


def _ids(files: _Files) -> dict[str, int]:
    vocabulary = {str(text): int(str(number)) for text, number in _object(files.model.get("vocab")).items()}
    return vocabulary | {str(token["content"]): int(str(token["id"])) for token in files.added}


def _require_plain(files: _Files) -> None:
    model = files.model
    problems = []
    if model.get("type") != "BPE":
        problems.append(f"a model of type {model.get('type')!r}, only BPE is written")
    problems += [
        f"{name}: {model[name]!r}" for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)
    ]
    stripping = [str(token["content"]) for token in files.added if token.get("lstrip") or token.get("rstrip")]
    if stripping:
        problems.append(f"added tokens that take blanks beside them away: {', '.join(stripping)}")
    if problems:
        raise RecipeError(
            "\n".join(
                ["GGUF: llama.cpp cannot tokenize as tokenizer.json says; choose merged_16bit:"]
                + [f"  {problem}" for problem in problems]
            )
        )


def _types(files: _Files, ids: Mapping[str, int], size: int, *, has_bytes: bool) -> list[int]:
    types = [int(TokenType.UNUSED)] * size
    for text, number in ids.items():
        is_byte = has_bytes and _BYTE.fullmatch(text) is not None
        types[number] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for token in files.added:
        types[int(str(token["id"]))] = int(TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED)
    # transformers reads the texts of the named special tokens as these tokens, added or not.
    unknown = files.special.get("unk_token") if has_bytes else None
    for text in files.special.values():
        if text in ids:
            types[ids[text]] = int(TokenType.UNKNOWN if text == unknown else TokenType.CONTROL)
    return types


def _merges(files: _Files) -> list[tuple[str, str]]:
    found = files.model.get("merges")
    pairs = (
        [merge.split(" ") if isinstance(merge, str) else merge for merge in found] if isinstance(found, list) else []
    )
    return [(str(first), str(second)) for first, second in pairs]


def _byte_level(files: _Files) -> Metadata:
    normalizer = files.tokenizer.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise RecipeError(
            f"GGUF: llama.cpp does not normalize text as tokenizer.json does: {normalizer!r}. Choose merged_16bit"
        )
    return {
        Keys.Tokenizer.PRE: pre_tokenizer_name(
            files.tokenizer.get("pre_tokenizer"), ignore_merges=bool(files.model.get("ignore_merges"))
        ),
        Keys.Tokenizer.MERGES: [" ".join(pair) for pair in _merges(files)],
    }


def _sentencepiece(files: _Files, texts: Sequence[str]) -> Metadata:
    """llama.cpp joins neighbours whose union has the best score; a score is minus the rank of the merge here."""
    merges = _merges(files)
    # Added tokens are cut out of a text before anything merges, in both worlds.
    added = {str(token["content"]) for token in files.added}
    _require_scores_can_say(merges, {str(text) for text in _object(files.model.get("vocab"))} - added)
    scores = dict.fromkeys(texts, 0.0)
    for rank, (first, second) in reversed(list(enumerate(merges))):
        scores[first + second] = -float(rank)
    return {
        Keys.Tokenizer.PRE: "default",
        Keys.Tokenizer.SCORES: [scores[text] for text in texts],
        Keys.Tokenizer.ADD_PREFIX: _adds_space(files),
    }


def _require_scores_can_say(merges: Sequence[tuple[str, str]], vocabulary: set[str]) -> None:
    """Raises unless each pair that makes a token is a merge, and the merges to one token stand together."""
    known = set(merges)
    made = list(dict.fromkeys(first + second for first, second in merges))
    problems = []
    for text in vocabulary:
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        absent = [pair for pair in pairs if vocabulary.issuperset(pair) and pair not in known]
        problems += [f"{first!r} and {second!r} never merge, though {text!r} is a token" for first, second in absent]
    ranked = [first + second for first, second in merges]
    in_order = [text for place, text in enumerate(ranked) if place == 0 or ranked[place - 1] != text]
    if in_order != made:
        problems.append("merges to one token lie apart")
    if problems:
        raise RecipeError(
            f"GGUF: these merges are not those of a SentencePiece model, which llama.cpp tokenizes by: {problems[0]} "
            f"({len(problems):,} such). Choose another format, such as merged_16bit"
        )


def _adds_space(files: _Files) -> bool:
    """Whether a blank is put before a text; raises where blanks are treated otherwise than SentencePiece does."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    match files.tokenizer.get("normalizer"), files.tokenizer.get("pre_tokenizer"):
        case {"type": "Sequence", "normalizers": [first, second]}, None if [first, second] == [prepend, replace]:
            return True
        case normalizer, None if normalizer == replace:
            return False
        case None, {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": str(scheme), "split": False}:
            return scheme != "never"
        case normalizer, pre_tokenizer:
            raise RecipeError(
                "GGUF: llama.cpp treats blanks as SentencePiece does, tokenizer.json otherwise: normalizer "
                f"{normalizer!r}, pre_tokenizer {pre_tokenizer!r}. Choose another format, such as merged_16bit"
            )


def _special_keys(files: _Files, ids: Mapping[str, int]) -> Metadata:
    keys: Metadata = {}
    named = {
        "bos_token": Keys.Tokenizer.BOS_ID,
        "eos_token": Keys.Tokenizer.EOS_ID,
        "pad_token": Keys.Tokenizer.PAD_ID,
        "unk_token": Keys.Tokenizer.UNK_ID,
    }
    for name, key in named.items():
        text = files.special.get(name)
        if text is not None and text in ids:
            keys[key] = ids[text]
    # llama.cpp stops at up to three tokens that a file names: end of sequence, of turn and of message.
    more = [number for number in files.stop_ids if number != keys.get(Keys.Tokenizer.EOS_ID)]
    keys |= dict(zip((Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID), more, strict=False))
    before, after = _put_around(files)
    keys[Keys.Tokenizer.ADD_BOS] = before == [files.special.get("bos_token")]
    keys[Keys.Tokenizer.ADD_EOS] = after == [files.special.get("eos_token")]
    if (before and not keys[Keys.Tokenizer.ADD_BOS]) or (after and not keys[Keys.Tokenizer.ADD_EOS]):
        raise RecipeError(
            f"GGUF: the tokenizer puts {before + after} around a text; llama.cpp only knows bos before and eos behind "
            "it. Choose another format, such as merged_16bit"
        )
    return keys


def _put_around(files: _Files) -> tuple[list[str], list[str]]:
    """Texts of the tokens that the post-processor puts before and behind a text."""
    described = _object(files.tokenizer.get("post_processor"))
    found = described.get("processors") if described.get("type") == "Sequence" else [described]
    before: list[str] = []
    after: list[str] = []
    for processor in found if isinstance(found, list) else []:
        kind = processor.get("type")
        if kind not in (None, "ByteLevel", "TemplateProcessing"):
            raise RecipeError(f"GGUF: post_processor {kind!r} of tokenizer.json is not known. Choose merged_16bit")
        side = before
        for piece in processor.get("single", []):
            if "Sequence" in piece:
                side = after
            else:
                side.append(piece["SpecialToken"]["id"])
    return before, after
