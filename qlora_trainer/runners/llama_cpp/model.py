"""A GGUF file in llama.cpp behind the calls that transformers' models answer to.

Each row of a batch is evaluated alone, so that its numbers do not depend on its neighbours. Settings of the runtime
are llama.cpp's own, as a server has them: the cache of keys and values is float16.
"""

import ctypes
import weakref
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlora_trainer.errors import VerificationError
from qlora_trainer.runners.llama_cpp.library import library, metadata, open_model

PHYSICAL_BATCH = 512
"""Tokens that go through the layers at once: what llama.cpp takes by default; its buffers grow with it."""


@dataclass(frozen=True)
class CausalOutput:
    """What a forward pass gives.

    Attributes:
        logits: float32, shape ``(rows, kept, vocabulary)``.
    """

    logits: Tensor


class LlamaCppModel(nn.Module):
    """A GGUF file in llama.cpp that is called like a causal language model of transformers.

    It has one parameter, which is empty and only says that results are on the CPU.

    Attributes:
        window: longest row, generated tokens included.
    """

    def __init__(self, path: Path, *, adapter: Path | None, threads: int, window: int) -> None:
        """Loads the file; ``load`` is the way in."""
        super().__init__()
        self.window = window
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self._library = library()
        door = self._library.door
        # Closes what was opened when the model goes, or when it does not come to be.
        self._opened = ExitStack()
        weakref.finalize(self, self._opened.close)
        self._model = open_model(path, vocab_only=False)
        self._opened.callback(door.llama_model_free, self._model)
        self._context = self._new_context(path, threads)
        self._opened.callback(door.llama_free, self._context)
        if adapter is not None:
            self._add_adapter(adapter)
        self._batch = self._new_batch()
        self._opened.callback(door.llama_batch_free, self._batch)
        self._vocab = door.llama_model_get_vocab(self._model)
        self._vocabulary_size: int = door.llama_vocab_n_tokens(self._vocab)

    def forward(self, input_ids: Tensor, *, logits_to_keep: Tensor | int = 0, use_cache: bool = False) -> CausalOutput:
        """Logits at the positions that are kept, each row evaluated as far as they reach.

        Args:
            input_ids: int64, shape ``(rows, tokens)``, right-padded.
            logits_to_keep: positions, int64 of shape ``(kept,)``; or how many at the end, 0 = all.
            use_cache: without meaning: nothing is kept for later calls.

        Raises:
            ValueError: rows longer than the window.
        """
        places = torch.arange(input_ids.shape[1])
        kept = places[logits_to_keep] if isinstance(logits_to_keep, Tensor) else places[-logits_to_keep:]
        end = int(kept.max()) + 1
        rows = [self._logits(row[:end], start=0, wanted=kept.tolist()) for row in input_ids.tolist()]
        return CausalOutput(logits=torch.from_numpy(numpy.stack(rows)))

    def generate(self, input_ids: Tensor, *, attention_mask: Tensor, generation_config: Any) -> Tensor:
        """Prompts and their most likely continuations, as transformers gives them.

        Args:
            input_ids: int64, shape ``(rows, tokens)``, left-padded.
            attention_mask: 0 where a row is padded.
            generation_config: of transformers; its max_new_tokens, eos_token_id and pad_token_id are honoured.

        Returns:
            int64 of shape ``(rows, tokens + longest continuation)``; rows that ended early go on with the pad token.

        Raises:
            ValueError: prompt and continuation are longer than the window.
        """
        stop = generation_config.eos_token_id
        stop_ids = set(stop if isinstance(stop, list) else [] if stop is None else [stop])
        limit = int(generation_config.max_new_tokens)
        answers = [
            self._continued(row[mask.bool()].tolist(), limit, stop_ids)
            for row, mask in zip(input_ids, attention_mask, strict=True)
        ]
        pad = generation_config.pad_token_id
        longest = max(len(answer) for answer in answers)
        padded = [answer + [pad] * (longest - len(answer)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(padded, dtype=torch.int64)], dim=1)

    def next_logits(self, token_ids: Sequence[int], *, start: int) -> Tensor:
        """Logits behind the last of some tokens, float32 of shape ``(vocabulary,)``; see ``runners.stepping.Steps``.

        Raises:
            ValueError: more tokens than the window.
        """
        logits = self._logits(list(token_ids), start=start, wanted=[len(token_ids) - 1])
        return torch.from_numpy(logits[0])

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text by the file's own tokenizer; special tokens in the text are read, none is put around it."""
        encoded = text.encode()
        room = len(encoded) + 16
        found = (ctypes.c_int32 * room)()
        put_around, read_special = False, True
        count = self._library.door.llama_tokenize(
            self._vocab, encoded, len(encoded), found, room, put_around, read_special
        )
        return list(found[:count])

    def metadata(self, key: str) -> str | None:
        """Value of a key of the file as text; None where it has none."""
        return metadata(self._model, key)

    def ends_generation(self, token: int) -> bool:
        """Whether llama.cpp stops generating at a token."""
        return bool(self._library.door.llama_vocab_is_eog(self._vocab, token))

    @property
    def eos_id(self) -> int:
        """Id of the file's eos token; negative where it has none."""
        token: int = self._library.door.llama_vocab_eos(self._vocab)
        return token

    def special_text(self, kind: Literal["bos", "eos"]) -> str:
        """Text of the bos or eos token; empty where the file has none."""
        door = self._library.door
        token = self.eos_id if kind == "eos" else door.llama_vocab_bos(self._vocab)
        return "" if token < 0 else bytes(door.llama_vocab_get_text(self._vocab, token)).decode()

    def _continued(self, prompt: list[int], limit: int, stop_ids: Collection[int]) -> list[int]:
        if len(prompt) + limit > self.window:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {limit} new ones are more than the window of {self.window}; "
                "load the model with a larger window"
            )
        answer: list[int] = []
        logits = self._logits(prompt, start=0, wanted=[len(prompt) - 1])
        while len(answer) < limit:
            answer.append(int(logits[0].argmax()))
            if answer[-1] in stop_ids or len(answer) == limit:
                break
            logits = self._logits(answer[-1:], start=len(prompt) + len(answer) - 1, wanted=[0])
        return answer

    def _logits(self, token_ids: list[int], *, start: int, wanted: list[int]) -> NDArray[numpy.float32]:
        """Logits behind the wanted ones of some tokens, which stand behind ``start`` tokens evaluated before.

        Returns:
            A copy, shape ``(wanted, vocabulary)``, in the order of ``wanted``.
        """
        door, count = self._library.door, len(token_ids)
        if start + count > self.window:
            raise ValueError(
                f"a row of {start + count} tokens is longer than the window of {self.window}; load the model with a "
                "larger window"
            )
        if start == 0:
            clears_data = True
            door.llama_memory_clear(door.llama_get_memory(self._context), clears_data)
        batch = self._batch
        batch.n_tokens = count
        numpy.ctypeslib.as_array(batch.token, (count,))[:] = token_ids
        numpy.ctypeslib.as_array(batch.pos, (count,))[:] = numpy.arange(start, start + count)
        flags = numpy.ctypeslib.as_array(batch.logits, (count,))
        flags[:] = 0
        flags[wanted] = 1
        code = door.llama_decode(self._context, batch)
        if code != 0:
            raise VerificationError(
                f"llama.cpp could not evaluate {count} tokens (code {code}): {self._library.said()}"
            )
        in_order = sorted(set(wanted))
        shape = (len(in_order), self._vocabulary_size)
        found = numpy.ctypeslib.as_array(door.llama_get_logits(self._context), shape)
        return found[numpy.searchsorted(in_order, wanted)]

    def _new_context(self, path: Path, threads: int) -> Any:
        door = self._library.door
        settings = door.llama_context_default_params()
        settings.n_ctx = self.window
        settings.n_batch = self.window
        settings.n_ubatch = min(self.window, PHYSICAL_BATCH)
        settings.n_seq_max = 1
        settings.n_threads = settings.n_threads_batch = threads
        context = door.llama_init_from_model(self._model, settings)
        if context is None:
            raise VerificationError(f"{path}: llama.cpp cannot run this file: {self._library.said()}")
        return context

    def _add_adapter(self, path: Path) -> None:
        door = self._library.door
        adapter = door.llama_adapter_lora_init(self._model, str(path).encode())
        # A null pointer of this type is not None.
        if not adapter:
            raise VerificationError(f"{path}: llama.cpp does not load this adapter: {self._library.said()}")
        adapters = (door.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(1.0)
        if door.llama_set_adapters_lora(self._context, adapters, 1, scales) != 0:
            raise VerificationError(f"{path}: llama.cpp does not apply this adapter: {self._library.said()}")

    def _new_batch(self) -> Any:
        batch = self._library.door.llama_batch_init(self.window, 0, 1)
        for place in range(self.window):
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
        return batch


def load(path: Path, *, adapter: Path | None = None, threads: int | None = None, window: int) -> LlamaCppModel:
    """The model in a GGUF file, in evaluation mode.

    Args:
        path: the file.
        adapter: a LoRA adapter as GGUF that is added at scale 1, that is with the scale of its file.
        threads: processor threads; None = as many as torch uses.
        window: longest row, generated tokens included.

    Raises:
        MissingPackageError: llama-cpp-python is not installed.
        VerificationError: llama.cpp does not load the file or the adapter; says why.
    """
    return LlamaCppModel(path, adapter=adapter, threads=threads or torch.get_num_threads(), window=window).eval()
