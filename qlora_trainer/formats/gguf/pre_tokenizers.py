"""How a byte-level tokenizer cuts text into words before merging, by llama.cpp's names.

llama.cpp holds the patterns in its source and a file only names one. A wrong name answers differently without any
error, so that a pattern is taken only where it is known to the letter.
"""

from collections.abc import Mapping

from qlora_trainer.errors import RecipeError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The steps, and whether a word that is a token is taken whole (ignore_merges), which llama.cpp ties to the name.
_NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "smaug-bpe",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_TEKKEN, "bytes"), True): "tekken",
}


def pre_tokenizer_name(described: object, *, ignore_merges: bool) -> str:
    """llama.cpp's name of the ``pre_tokenizer`` in a tokenizer.json.

    Args:
        described: the object of the file.
        ignore_merges: of the file's model.

    Raises:
        RecipeError: llama.cpp has no such pre-tokenizer, or none is known here by this pattern.
    """
    steps = tuple(_step(part) for part in _parts(described))
    name = _NAMES.get((steps, ignore_merges))
    if name is None:
        raise RecipeError(
            f"GGUF: this tokenizer cuts words in a way that is not known here as one of llama.cpp's: {described!r} "
            f"with ignore_merges {ignore_merges}. Known are {', '.join(sorted(_NAMES.values()))}; a near one "
            "would answer differently. Choose another format, such as merged_16bit"
        )
    return name


def _parts(described: object) -> list[Mapping[str, object]]:
    if not isinstance(described, dict):
        return []
    if described.get("type") == "Sequence":
        return [inner for part in described["pretokenizers"] for inner in _parts(part)]
    return [described]


def _step(part: Mapping[str, object]) -> str:
    """One step in a word; what no name stands for gives a text that no known sequence holds."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
            return "gpt2" if rest.get("use_regex", True) else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern
    return f"unknown: {part}"
