"""Messages in, an answer out, piece by piece: with the template, the stop tokens and the settings of the run.

Which model speaks is decided elsewhere; this module opens it and turns its tokens into text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError
from qlora_trainer.formats.peft_adapter import attach
from qlora_trainer.numerics.sampling import Sampling, pick
from qlora_trainer.recipe import Data
from qlora_trainer.runners import llama_cpp
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.stepping import CachedSteps, Steps

__all__ = ["Sampling", "Speaker", "Voice", "open_voice", "prompt_ids"]

Message = Mapping[str, str]

UNFINISHED = "\ufffd"
"""What decoding gives for the first bytes of a character whose others are in the next token."""
WINDOW = 4096
"""Tokens of a conversation with a GGUF file at most; its cache is made for so many."""


@dataclass(frozen=True)
class Speaker:
    """What can be talked to, as files.

    Attributes:
        name: of the stage, as in report.json.
        model: folder in Hugging Face layout, or a GGUF file.
        tokenizer: folder that holds the tokenizer.
        adapter: folder of an adapter on top of ``model``.
    """

    name: str
    model: Path
    tokenizer: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Voice:
    """An opened model that answers.

    Attributes:
        name: of the stage.
        data: the recipe's section, which says how a conversation becomes text.
        tokenizer: of the base model.
    """

    name: str
    data: Data
    tokenizer: TextTokenizer
    _steps: Steps = field(repr=False)

    def say(self, prompt: str, sampling: Sampling | None = None, *, max_new_tokens: int = 256) -> str:
        """The whole answer to one prompt; the most likely one where no ``sampling`` is given."""
        asked = [{"role": "user", "content": prompt}]
        return "".join(self.answer(asked, sampling or Sampling(), max_new_tokens=max_new_tokens))

    def answer(self, messages: Sequence[Message], sampling: Sampling, *, max_new_tokens: int) -> Iterator[str]:
        """The next turn, piece by piece as it is written; the pieces joined are the whole answer.

        Args:
            messages: the conversation, the last message the user's.
            sampling: how tokens are chosen.
            max_new_tokens: where an answer that does not stop is cut off.

        Raises:
            DataError: the template refuses the messages.
        """
        read = prompt_ids(messages, self.data, self.tokenizer)
        chance = sampling.generator()
        written: list[int] = []
        shown = ""
        start = 0
        while len(written) < max_new_tokens:
            token = pick(self._steps.next_logits(read, start=start), sampling, chance)
            if token in self.tokenizer.stop_ids:
                break
            start += len(read)
            read = [token]
            written.append(token)
            text = self.tokenizer.decode(written, skip_special=True)
            if not text.endswith(UNFINISHED):
                yield text[len(shown) :]
                shown = text
        yield self.tokenizer.decode(written, skip_special=True)[len(shown) :]


def open_voice(
    speaker: Speaker, data: Data, *, compute_dtype: str, threads: int | None, trust_remote_code: bool = False
) -> Voice:
    """The model in its runtime: llama.cpp for a GGUF file, transformers otherwise.

    Raises:
        MissingPackageError: the runtime is not installed.
        BaseModelError: the files do not fit together.
    """
    tokenizer = TextTokenizer.load(speaker.tokenizer)
    if speaker.model.suffix == ".gguf":
        model = llama_cpp.load(speaker.model, threads=threads, window=max(WINDOW, data.window))
        return Voice(speaker.name, data, tokenizer, model)
    dtype = getattr(torch, compute_dtype)
    loaded = runner.load(speaker.model, dtype=dtype, trust_remote_code=trust_remote_code)
    if speaker.adapter is not None:
        loaded = attach(loaded, speaker.adapter)
    return Voice(speaker.name, data, tokenizer, CachedSteps(loaded))


def prompt_ids(messages: Sequence[Message], data: Data, tokenizer: TextTokenizer) -> list[int]:
    """The tokens that training's answers were written behind.

    ``render: text`` knows one prompt and no conversation: the last message of the user's is that prompt.

    Raises:
        DataError: there is nothing to answer, or the template refuses the messages.
    """
    if not messages or messages[-1]["role"] != "user":
        raise DataError("the last message must be the user's: there is nothing to answer")
    if data.render == "chat":
        return tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True).text)
    text = data.text_template.replace("{prompt}", messages[-1]["content"])
    beginning = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return [*beginning, *tokenizer.encode(text)]
