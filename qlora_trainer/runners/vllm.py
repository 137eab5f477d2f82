"""Files as vLLM 0.33 loads and runs them on a GPU: nats of label tokens, and greedy continuations.

vLLM pins other versions of transformers and compressed-tensors than this package, so it has an environment of its own,
with this package beside it: nothing here imports transformers. Rows go in and continuations come out as token ids;
vLLM's tokenizer is not used.
"""

import importlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qlora_trainer.errors import BaseModelError, MissingPackageError
from qlora_trainer.export_formats import LORA_RANKS_OF_VLLM, lora_rank_of_vllm
from qlora_trainer.numerics.loss import IGNORE_INDEX

HOW_TO_INSTALL = (
    "vLLM is not installed. It pins other versions of transformers than qlora-trainer: make an environment of its own "
    "on a machine with a CUDA device, python -m venv .venv-vllm; .venv-vllm/bin/pip install vllm==0.33.0; "
    ".venv-vllm/bin/pip install --no-deps -e ."
)


class Likelihood(Protocol):
    """One token's entry among vLLM's log probabilities."""

    @property
    def logprob(self) -> float:
        """Natural logarithm of the token's probability."""


@dataclass(frozen=True)
class VllmModel:
    """A model in vLLM's engine.

    Attributes:
        engine: vLLM's ``LLM``.
        library: the module ``vllm``.
        adapter: vLLM's ``LoRARequest``, sent along with every prompt; None without adapter.
    """

    engine: Any
    library: Any
    adapter: Any = None

    def row_nats(self, rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> list[float]:
        """Negative log likelihood summed over the label tokens of each row.

        Args:
            rows: token ids of each row, prompt and completion together.
            labels: as long as the rows, not shifted: the token itself, or ``IGNORE_INDEX``.

        Raises:
            ValueError: see ``summed_nats``.
        """
        # Likelihoods of a prompt come with at least one new token; 0 = of its own tokens, without alternatives.
        answers = self._generate(rows, max_tokens=1, prompt_logprobs=0)
        return [
            summed_nats(answer.prompt_logprobs, token_ids, wanted)
            for answer, token_ids, wanted in zip(answers, rows, labels, strict=True)
        ]

    def generate_greedy(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Collection[int]
    ) -> list[list[int]]:
        """Most likely continuations, without the stop token, whatever the model's generation_config.json says.

        Args:
            prompts: token ids of each prompt, none empty.
            max_new_tokens: longest continuation.
            stop_ids: tokens that end a continuation.
        """
        answers = self._generate(prompts, max_tokens=max_new_tokens, stop_token_ids=sorted(stop_ids))
        return [_until(list(answer.outputs[0].token_ids), frozenset(stop_ids)) for answer in answers]

    def _generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Any]:
        """The answers, in the order of the prompts, with nothing random in them."""
        sampling = self.library.SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **settings)
        answers: list[Any] = self.engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            sampling,
            use_tqdm=False,
            lora_request=self.adapter,
        )
        return answers


def load(folder: Path, *, adapter: Path | None = None, max_tokens: int = 2048, memory_share: float = 0.9) -> VllmModel:
    """The model in a folder, in vLLM's engine on the current CUDA device.

    Args:
        folder: Hugging Face layout; a ``quantization_config`` in its config.json is honoured.
        adapter: folder of a PEFT adapter that is applied without being merged.
        max_tokens: longest row, or prompt and continuation together.
        memory_share: share of the device's memory that the engine may take.

    Raises:
        MissingPackageError: vLLM is not installed; says how.
        BaseModelError: the folder of the model or of the adapter has no config.
    """
    _require_config(folder / "config.json")
    rank = None if adapter is None else _lora_rank(adapter)
    try:
        library = importlib.import_module("vllm")
    except ImportError as error:
        raise MissingPackageError(HOW_TO_INSTALL) from error
    engine = library.LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        generation_config="vllm",
        # One more than asked for: scoring a row generates a token behind it.
        max_model_len=max_tokens + 1,
        gpu_memory_utilization=memory_share,
        # Capturing graphs takes longer than the few hundred rows of an evaluation.
        enforce_eager=True,
        seed=0,
        **({} if rank is None else {"enable_lora": True, "max_lora_rank": rank}),
    )
    if adapter is None:
        return VllmModel(engine, library)
    request = importlib.import_module("vllm.lora.request").LoRARequest("adapter", 1, str(adapter))
    return VllmModel(engine, library, request)


def summed_nats(
    prompt_logprobs: Sequence[Mapping[int, Likelihood] | None], token_ids: Sequence[int], labels: Sequence[int]
) -> float:
    """Negative log likelihood of a row's label tokens, from the likelihoods that vLLM gives of a prompt.

    Args:
        prompt_logprobs: for each token of the row its own log probability given those before it, by token id; None for
            the first, which nothing predicts.
        token_ids: of the row.
        labels: as long, not shifted. A label of the first token is never predicted and therefore dropped.

    Raises:
        ValueError: the lengths differ, a label is not the token at its place, or a token has no likelihood.
    """
    if not len(prompt_logprobs) == len(token_ids) == len(labels):
        raise ValueError(
            f"{len(token_ids)} tokens, {len(labels)} labels and {len(prompt_logprobs)} likelihoods must be as many"
        )
    nats = 0.0
    for place in range(1, len(labels)):
        label = labels[place]
        if label == IGNORE_INDEX:
            continue
        if label != token_ids[place]:
            raise ValueError(f"the label at {place} is {label}, the token there {token_ids[place]}; they must be equal")
        found = prompt_logprobs[place]
        if found is None or label not in found:
            raise ValueError(f"vLLM gave no likelihood of token {label} at {place}; is this a version after 0.33?")
        nats -= found[label].logprob
    return nats


def _lora_rank(adapter: Path) -> int:
    """What vLLM is told to keep room for."""
    config = adapter / "adapter_config.json"
    _require_config(config)
    rank = int(json.loads(config.read_text(encoding="utf-8"))["r"])
    fitting = lora_rank_of_vllm(rank)
    if fitting is None:
        raise BaseModelError(
            f"{config}: rank {rank} is beyond vLLM's {LORA_RANKS_OF_VLLM[-1]}; merge the adapter instead"
        )
    return fitting


def _require_config(path: Path) -> None:
    if not path.is_file():
        raise BaseModelError(f"{path} is not there; give the folder that holds it")


def _until(token_ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(token_ids) if token in stop_ids), len(token_ids))
    return token_ids[:end]
