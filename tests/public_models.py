"""Tiny random stand-ins for public models: architectures from ``public_configs/``, shrunken, with small tokenizers.

The JSON files hold what a public model's config.json says about its sizes and special tokens (``_name``: whose). The
stand-ins keep everything but sizes: kind of attention, norms, tying, windows. Their tokenizers are trained here on
a few lines; what is the public model's own is how words are cut, the special tokens, and how a conversation is written.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.formats.gguf.small_models import LLAMA3_PATTERN, TEKKEN_PATTERN
from tests.models import TEXT

CONFIGS = Path(__file__).parent / "public_configs"
BLANK = "\u2581"
ORIGINAL = "original_max_position_embeddings"
SIZES: Mapping[str, object] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}

# One line each: how a turn is written. The public templates hold more (tools, dates, thinking), none of which a
# conversation of plain text needs.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and THINK %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
INSTRUCTION = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>\n' + m.content + eos_token }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How the tokenizers of a family of models work.

    Attributes:
        special: special tokens by name; ``stops`` are those that generation stops at.
        stops: texts.
        template: of a conversation.
        pattern: how byte-level BPE cuts words; ``gpt2`` for its own; None for BPE over characters with byte fallback.
        turn_end: the token that ends a turn of the assistant's.
        more: further special tokens.
        digits: each digit is a word.
        whole_words: a word that is a token is taken whole (ignore_merges).
        composes: text is normalized (NFC) first.
        starts_with_bos: the tokenizer itself puts bos before a text.
    """

    special: Mapping[str, str]
    stops: tuple[str, ...]
    template: str
    turn_end: str
    pattern: str | None = "gpt2"
    more: tuple[str, ...] = ()
    digits: bool = False
    whole_words: bool = False
    composes: bool = False
    starts_with_bos: bool = False


QWEN_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

FAMILIES: Mapping[str, Family] = {
    "llama3": Family(
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"},
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        HEADERS,
        "<|eot_id|>",
        LLAMA3_PATTERN,
        ("<|end_of_text|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        whole_words=True,
        starts_with_bos=True,
    ),
    "qwen3": Family(
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_end|>", "<|endoftext|>"),
        CHATML.replace("THINK", "true"),
        "<|im_end|>",
        QWEN_PATTERN,
        ("<|im_start|>",),
        composes=True,
    ),
    "smollm2": Family(
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
        },
        ("<|im_end|>",),
        CHATML.replace("THINK", "false"),
        "<|im_end|>",
        digits=True,
    ),
    "smollm3": Family(
        {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        ("<|im_end|>",),
        CHATML.replace("THINK", "true"),
        "<|im_end|>",
        LLAMA3_PATTERN,
        ("<|im_start|>", "<|begin_of_text|>", "<|end_of_text|>"),
        whole_words=True,
    ),
    "tinyllama": Family({**SENTENCEPIECE, "pad_token": "</s>"}, ("</s>",), ZEPHYR, "</s>", None, starts_with_bos=True),
    "mistral": Family(SENTENCEPIECE, ("</s>",), INSTRUCTION, "</s>", None, ("[INST]", "[/INST]"), starts_with_bos=True),
    "tekken": Family(
        SENTENCEPIECE,
        ("</s>",),
        INSTRUCTION,
        "</s>",
        TEKKEN_PATTERN,
        ("[INST]", "[/INST]"),
        whole_words=True,
        starts_with_bos=True,
    ),
    "gemma3": Family(
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ("<eos>", "<end_of_turn>"),
        GEMMA,
        "<end_of_turn>",
        None,
        ("<start_of_turn>", "<end_of_turn>"),
        starts_with_bos=True,
    ),
    "phi4": Family(
        {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|dummy_85|>"},
        ("<|im_end|>",),
        PHI,
        "<|im_end|>",
        QWEN_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|"),
        ("<|im_start|>", "<|im_sep|>"),
    ),
    "olmo2": Family(
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
        ("<|endoftext|>",),
        OLMO,
        "<|endoftext|>",
        LLAMA3_PATTERN,
    ),
}


@cache
def public_config(name: str) -> Mapping[str, Any]:
    """What ``public_configs/<name>.json`` holds."""
    loaded: Mapping[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def family_of(name: str) -> Family:
    """How the model of that name tokenizes."""
    if name.startswith("llama3"):
        return FAMILIES["llama3"]
    tekken = name.startswith(("ministral", "mistral_small"))
    return FAMILIES["tekken" if tekken else next(kind for kind in FAMILIES if name.startswith(kind))]


def stand_in(folder: Path, name: str) -> Path:
    """Writes the tiny random model of a public one, bfloat16, with its tokenizer, into ``folder``; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    family = family_of(name)
    tokenizer = write_tokenizer(folder, family)
    stops = [tokenizer.token_to_id(text) for text in family.stops]
    public = {key: value for key, value in public_config(name).items() if not key.startswith(("_", "architectures"))}
    scaling = public.get("rope_scaling") or {}
    heads = 1 if public["num_key_value_heads"] == 1 else 2
    settings = {
        **public,
        **SIZES,
        # One layer of each kind where kinds alternate.
        **{key: 2 for key in ("sliding_window_pattern", "no_rope_layer_interval") if key in public},
        **({"sliding_window": 64} if public.get("sliding_window") else {}),
        **({"rope_scaling": {**scaling, ORIGINAL: 128}} if ORIGINAL in scaling else {}),
        **({ORIGINAL: 512} if ORIGINAL in public else {}),
        "num_key_value_heads": 4 if public["num_key_value_heads"] == public["num_attention_heads"] else heads,
        "vocab_size": tokenizer.get_vocab_size(with_added_tokens=True),
        "eos_token_id": stops if len(stops) > 1 else stops[0],
        **{f"{kind}_token_id": _id(tokenizer, family.special.get(f"{kind}_token")) for kind in ("bos", "pad")},
    }
    if "head_dim" not in public:
        del settings["head_dim"]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, family: Family) -> Tokenizer:
    """Writes the files of a family's tokenizer into ``folder``."""
    special = list(dict.fromkeys((*family.special.values(), *family.more, *family.stops)))
    tokenizer = _characters(special) if family.pattern is None else _bytes(special, family)
    bos = family.special.get("bos_token")
    if family.starts_with_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, _id(tokenizer, bos))]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **family.special).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(family.template, encoding="utf-8")
    return tokenizer


def _bytes(special: list[str], family: Family) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=family.whole_words))
    if family.composes:
        tokenizer.normalizer = normalizers.NFC()
    plain = family.pattern == "gpt2"
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if family.digits else []
    if not plain:
        steps.append(pre_tokenizers.Split(Regex(f"{family.pattern}"), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return tokenizer


def _characters(special: list[str]) -> Tokenizer:
    letters = sorted(
        {character for character in TEXT + "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789(){}_:;,." if character > " "}
    )
    merges = [(BLANK, "t"), ("h", "e"), (f"{BLANK}t", "he"), ("a", "n"), ("an", "d"), ("o", "r")]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), BLANK, *letters]
    pieces += [first + second for first, second in merges]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer


def _id(tokenizer: Tokenizer, text: str | None) -> int | None:
    return None if text is None else tokenizer.token_to_id(text)
