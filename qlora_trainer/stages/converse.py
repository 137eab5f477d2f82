"""Messages in, an answer out, piece by piece: with the template, the stop tokens and the settings of the run.

Which model speaks is decided elsewhere, and it comes opened; this module turns its tokens into text.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError
from qlora_trainer.numerics.sampling import Sampling, pick
from qlora_trainer.recipe import Data
from qlora_trainer.runners import llama_cpp
from qlora_trainer.runners.stepping import CachedSteps, Steps

__all__ = ["Sampling", "TextTokenizer", "Voice", "prompt_ids", "steps_of"]

Message = Mapping[str, str]

UNFINISHED = "\ufffd"
"""What decoding gives for the first bytes of a character whose others are in the next token."""


@dataclass(frozen=True)
class Voice:
    """An opened model that answers.

    Attributes:
        name: of the stage.
        data: the recipe's section, which says how a conversation becomes text.
        tokenizer: of the base model.
        window: tokens of a conversation, its answers included, at most; None = the model does not say.
    """

    name: str
    data: Data
    tokenizer: TextTokenizer
    window: int | None
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
            DataError: the template refuses the messages, or the conversation does not fit the window; where it no
                longer does during the answer, what was written comes first.
        """
        read = prompt_ids(messages, self.data, self.tokenizer)
        room = self._room(len(read))
        is_cut = room < max_new_tokens
        chance = sampling.generator()
        written: list[int] = []
        shown = ""
        start = 0
        for _ in range(min(max_new_tokens, room)):
            token = pick(self._steps.next_logits(read, start=start), sampling, chance)
            if token in self.tokenizer.stop_ids:
                is_cut = False
                break
            start += len(read)
            read = [token]
            written.append(token)
            text = self.tokenizer.decode(written, skip_special=True)
            if not text.endswith(UNFINISHED):
                yield text[len(shown) :]
                shown = text
        yield self.tokenizer.decode(written, skip_special=True)[len(shown) :]
        if is_cut:
            raise DataError(
                f"{self.name} reads {self.window:,} tokens at most, which the conversation has reached: this answer is "
                "cut off. Begin a new conversation"
            )

    def _room(self, asked: int) -> int:
        """How many tokens an answer may have behind so many."""
        if self.window is None:
            return sys.maxsize
        if asked >= self.window:
            raise DataError(
                f"{self.name} reads {self.window:,} tokens at most, the answer included, and the conversation has "
                f"{asked:,}. Ask more briefly, or begin a new conversation"
            )
        return self.window - asked


def steps_of(model: nn.Module) -> Steps:
    """How an opened model goes on, token after token: GGUF files know it, models of transformers get a cache."""
    return model if isinstance(model, llama_cpp.LlamaCppModel) else CachedSteps(model)


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
