"""Whether a GGUF file's own tokenizer, stop tokens and chat template are those that were trained with."""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

from torch import nn

from qlora_trainer.runners.llama_cpp.model import LlamaCppModel

Chat = tuple[Sequence[Mapping[str, str]], str]
"""Messages, and the text that they were trained as."""


def parity_problems(
    model: nn.Module,
    *,
    texts: Sequence[str],
    token_ids_of: Callable[[str], list[int]],
    stop_ids: Collection[int],
    chat: Sequence[Chat],
) -> tuple[str, ...]:
    """Where the file's own tokenizer, stop tokens and chat template are not those that were trained with.

    Args:
        model: of ``load``.
        texts: tokenized in both worlds.
        token_ids_of: the training's tokenizer, nothing put around a text.
        stop_ids: tokens that generation stops at in training's evaluation.
        chat: messages with the text of training; a last message of the assistant's is rendered as it is, after any
            other the assistant is asked to begin.

    Returns:
        One sentence for each kind of difference, with the first example; empty = parity.
    """
    if not isinstance(model, LlamaCppModel):
        raise TypeError(f"want a model of llama.cpp, got {type(model).__name__}")
    found = (
        _token_problem(model, texts, token_ids_of),
        _stop_problem(model, frozenset(stop_ids)),
        _chat_problem(model, chat),
    )
    return tuple(problem for problem in found if problem is not None)


def _token_problem(model: LlamaCppModel, texts: Sequence[str], token_ids_of: Callable[[str], list[int]]) -> str | None:
    differing = [text for text in texts if model.token_ids(text) != token_ids_of(text)]
    if not differing:
        return None
    first = differing[0]
    theirs, ours = model.token_ids(first), token_ids_of(first)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(theirs, ours, strict=False)))
    return (
        f"{len(differing):,} of {len(texts):,} texts have other tokens in llama.cpp, the first is {first!r}: from "
        f"token {same} on {theirs[same : same + 5]} instead of {ours[same : same + 5]}"
    )


def _stop_problem(model: LlamaCppModel, stop_ids: Collection[int]) -> str | None:
    """Stops of training that llama.cpp goes past, or an eos token that training goes past.

    llama.cpp also stops at tokens that it knows by their texts, such as ``<|im_end|>``; no file can change that.
    """
    passed = sorted(token for token in stop_ids if not model.ends_generation(token))
    if passed:
        return f"llama.cpp goes on past tokens {passed}, at which training's evaluation stops"
    if model.eos_id not in stop_ids:
        return f"the file's eos token is {model.eos_id}, training's evaluation stops at {sorted(stop_ids)}"
    return None


def _chat_problem(model: LlamaCppModel, chat: Sequence[Chat]) -> str | None:
    if not chat:
        return None
    template = model.metadata("tokenizer.chat_template")
    if template is None:
        return "the file has no chat template, the tokenizer has one"
    formatter: Any = importlib.import_module("llama_cpp.llama_chat_format").Jinja2ChatFormatter
    differing = []
    for messages, expected in chat:
        rendered = formatter(
            template=template,
            eos_token=model.special_text("eos"),
            bos_token=model.special_text("bos"),
            add_generation_prompt=messages[-1].get("role") != "assistant",
        )(messages=list(messages)).prompt
        if rendered != expected:
            differing.append((rendered, expected))
    if not differing:
        return None
    rendered, expected = differing[0]
    return (
        f"the file's chat template writes {len(differing):,} of {len(chat):,} conversations otherwise, the first as "
        f"{rendered!r} instead of {expected!r}"
    )
