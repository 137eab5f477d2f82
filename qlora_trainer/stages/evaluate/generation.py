"""Answers prompts greedily, in batches of prompts of like length."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from qlora_trainer.data.batches import evaluation_batches
from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.runners.transformers import generate_greedy
from qlora_trainer.runtime.progress import counted


@dataclass(frozen=True)
class Answers:
    """Generated texts in the order of the rows, without special tokens.

    Attributes:
        texts: one for each row.
        tokens_per_second: new tokens over generation seconds.
    """

    texts: tuple[str, ...]
    tokens_per_second: float


@dataclass(frozen=True)
class Decoding:
    """How prompts are answered.

    Attributes:
        tokenizer: turns ids into text.
        stop_ids: tokens that end an answer.
        pad_id: token that fills short prompts.
        batch_size: prompts at a time.
        max_new_tokens: longest answer.
    """

    tokenizer: TextTokenizer
    stop_ids: tuple[int, ...]
    pad_id: int
    batch_size: int
    max_new_tokens: int


def answer(model: nn.Module, rows: Sequence[EncodedRow], decoding: Decoding) -> Answers:
    """The most likely continuation of each row's prompt, token by token; leaves the model in eval mode."""
    model.eval()
    texts = [""] * len(rows)
    new_tokens = 0
    began = time.perf_counter()
    batches = evaluation_batches([len(row.prompt_ids) for row in rows], decoding.batch_size)
    for indexes in counted(batches, "generating", unit="answers", total=len(rows), size=len):
        outputs = generate_greedy(
            model,
            [list(rows[index].prompt_ids) for index in indexes],
            max_new_tokens=decoding.max_new_tokens,
            stop_ids=decoding.stop_ids,
            pad_id=decoding.pad_id,
        )
        for index, ids in zip(indexes, outputs, strict=True):
            new_tokens += len(ids)
            texts[index] = decoding.tokenizer.decode(ids, skip_special=True).strip()
    return Answers(texts=tuple(texts), tokens_per_second=new_tokens / (time.perf_counter() - began))
