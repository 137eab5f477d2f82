import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig

from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import MissingPackageError, VerificationError
from qlora_trainer.formats import peft_adapter
from qlora_trainer.formats.gguf import GgufBlocks, GgufKind, read_gguf, write_gguf, write_gguf_adapter
from qlora_trainer.numerics.loss import IGNORE_INDEX, kl_to
from qlora_trainer.runners import llama_cpp
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.causal_lm import label_logits
from qlora_trainer.runners.llama_cpp.library import library
from tests.conftest import REPOSITORY
from tests.formats.gguf.small_models import PRE_TOKENIZERS, VARIANTS, small_model
from tests.models import EOS_ID, PAD_ID, linear_names, random_token_ids, tiny_llama

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'qlora-trainer[gguf]'")

pytestmark = pytest.mark.gguf

QUICKSTART = REPOSITORY / "recipes/quickstart"
QUANTIZED: tuple[GgufKind, ...] = ("q8_0", "q5_0", "q5_1", "q4_0", "q4_1")


HARD_TEXTS = (
    "",
    " ",
    "   ",
    "  two  blanks \n\n\n  and breaks\r\n",
    "naïve café 1234567 \u2013 ½ ²³ 12ab34",
    "def f(x):\n\treturn x'll + it'S / http://a.b/c",
    "The quick Brown fox jUMPS overTheLazy Dog",
    "日本語🙂 ありがとう\u00a0x",
    "over the lazy dog</s>learns<|user|> what",
)


def as_gguf(folder: Path, target: Path, kind: GgufKind = "f16") -> Path:
    weights = load_file(folder / "model.safetensors")
    write_gguf(target, weights.items(), GgufBlocks(kind), linear_modules=linear_names(weights), like=folder)
    return target


@torch.no_grad()
def mean_kl(reference: nn.Module, model: nn.Module, token_ids: Tensor) -> float:
    expected = torch.log_softmax(reference(input_ids=token_ids).logits.double(), dim=-1)
    found = model(input_ids=token_ids).logits.double()
    assert found.shape == expected.shape
    return float(kl_to(expected.flatten(0, 1), found.flatten(0, 1)).mean())


def quickstart_rows(count: int) -> list[dict[str, str]]:
    lines = (QUICKSTART / "data/test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.load(QUICKSTART / "base")


@pytest.fixture(scope="module")
def quickstart_f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_gguf(QUICKSTART / "base", tmp_path_factory.mktemp("quickstart") / "f16.gguf")


@pytest.fixture(scope="module")
def llama_f16(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_gguf(llama_folder, tmp_path_factory.mktemp("llama") / "f16.gguf")


@pytest.fixture(scope="module")
def answers(tokenizer: TextTokenizer) -> Callable[[int], Iterator[Tensor]]:
    """Texts of the quickstart's task as token ids, one row each."""

    def rows(count: int) -> Iterator[Tensor]:
        for row in quickstart_rows(count):
            yield torch.tensor([[0, *tokenizer.encode(f"{row['prompt']}\n{row['completion']}")]])

    return rows


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_in_f16_computes_what_transformers_does(variant: str, tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model", variant)
    model = llama_cpp.load(as_gguf(folder, tmp_path / "a.gguf"), window=256)
    token_ids = random_token_ids(tokens=200)
    # Measured 5e-8 to 4e-7: llama.cpp rounds the activations of a float16 product to float16. A missing permutation,
    # bias, norm or rope factor gives more than 1e-2.
    assert mean_kl(runner.load(folder, dtype=torch.float32), model, token_ids) < 1e-6


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_files_compute_what_our_decoding_does_but_for_8_bit_activations(
    kind: GgufKind, tmp_path: Path, answers: Callable[[int], Iterator[Tensor]]
) -> None:
    base = QUICKSTART / "base"
    path = as_gguf(base, tmp_path / "a.gguf", kind)
    decoded = runner.from_weights(base, read_gguf(path, like=base), dtype=torch.float32)
    model = llama_cpp.load(path, window=256)
    kl = sum(mean_kl(decoded, model, row) for row in answers(10)) / 10
    # Measured 3.5e-4 to 3.6e-4 for each of the five kinds (rows between 2.9e-4 and 4.7e-4): whatever the weights' bits,
    # the activations are rounded to 8 bits in blocks of 32. Below the lower side they would not be rounded.
    assert 1e-5 < kl < 1e-3


def test_f16_of_the_quickstart_base_computes_what_transformers_does(
    quickstart_f16: Path, answers: Callable[[int], Iterator[Tensor]]
) -> None:
    reference = runner.load(QUICKSTART / "base", dtype=torch.float32)
    model = llama_cpp.load(quickstart_f16, window=256)
    kl = sum(mean_kl(reference, model, row) for row in answers(10)) / 10
    # Measured 7.8e-7 (rows between 5.4e-7 and 1.04e-6): activations and the cache of keys and values are float16.
    assert kl < 2e-6


def test_kept_positions_and_padding_do_not_change_a_row(llama_f16: Path) -> None:
    model = llama_cpp.load(llama_f16, window=64)
    token_ids = random_token_ids(rows=3, tokens=20)
    whole = model(input_ids=token_ids).logits
    assert whole.shape == (3, 20, 320)
    assert whole.dtype == torch.float32
    kept = torch.tensor([3, 11, 7])
    # One product of a row of the last layer against the head, whichever rows stand beside it.
    torch.testing.assert_close(model(input_ids=token_ids, logits_to_keep=kept).logits, whole[:, kept])
    torch.testing.assert_close(model(input_ids=token_ids, logits_to_keep=2).logits, whole[:, -2:])
    padded = torch.cat([token_ids, torch.full((3, 9), PAD_ID)], dim=1)
    torch.testing.assert_close(model(input_ids=padded).logits[:, :20], whole)


def test_repeated_passes_give_the_same_bits(llama_f16: Path) -> None:
    model = llama_cpp.load(llama_f16, window=64)
    token_ids = random_token_ids()
    first = model(input_ids=token_ids).logits
    model(input_ids=random_token_ids(seed=5))
    assert torch.equal(model(input_ids=token_ids).logits, first)


def test_evaluation_calls_it_like_any_model(llama_f16: Path, llama_folder: Path) -> None:
    model = llama_cpp.load(llama_f16, window=64)
    assert not model.training
    assert next(model.parameters()).device == torch.device("cpu")
    token_ids = random_token_ids()
    labels = token_ids.clone()
    labels[:, :10] = IGNORE_INDEX
    reference = runner.load(llama_folder, dtype=torch.float32)
    logits, kept = label_logits(model, token_ids, labels)
    with torch.no_grad():
        expected, expected_kept = label_logits(reference, token_ids, labels)
    assert torch.equal(kept, expected_kept)
    # Logits are around 1 in size; activations are rounded to float16, some hundred times in a row.
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-2)


def test_greedy_answers_are_those_of_transformers(quickstart_f16: Path, tokenizer: TextTokenizer) -> None:
    prompts = [
        tokenizer.encode(
            tokenizer.render_chat([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True).text
        )
        for row in quickstart_rows(12)
    ]
    settings: dict[str, Any] = {"max_new_tokens": 24, "stop_ids": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
    expected = runner.generate_greedy(runner.load(QUICKSTART / "base", dtype=torch.float32), prompts, **settings)
    found = runner.generate_greedy(llama_cpp.load(quickstart_f16, window=256), prompts, **settings)
    assert found == expected
    assert len({tuple(answer) for answer in found}) > 6


def test_answers_end_at_stop_tokens_and_at_the_limit(llama_f16: Path) -> None:
    model = llama_cpp.load(llama_f16, window=64)
    prompts = [row.tolist() for row in random_token_ids(rows=3, tokens=9)]
    free = runner.generate_greedy(model, prompts, max_new_tokens=8, stop_ids=(), pad_id=PAD_ID)
    assert [len(answer) for answer in free] == [8, 8, 8]
    stop = free[0][3]
    stopped = runner.generate_greedy(model, prompts, max_new_tokens=8, stop_ids=(stop, 319), pad_id=PAD_ID)
    assert stopped == [answer[: answer.index(stop)] if stop in answer else answer for answer in free]


def test_nothing_is_computed_behind_the_last_answer(llama_f16: Path) -> None:
    model = llama_cpp.load(llama_f16, window=64)
    prompt = random_token_ids(rows=1, tokens=9)
    (free,) = runner.generate_greedy(model, prompt.tolist(), max_new_tokens=8, stop_ids=(), pad_id=PAD_ID)
    settings = GenerationConfig(max_new_tokens=8, eos_token_id=free[2], pad_token_id=PAD_ID)
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    assert found.tolist() == [[*prompt[0].tolist(), *free[: free.index(free[2]) + 1]]]


def test_rows_longer_than_the_window_are_refused(llama_f16: Path) -> None:
    model = llama_cpp.load(llama_f16, window=16)
    with pytest.raises(ValueError, match="a row of 24 tokens is longer than the window of 16"):
        model(input_ids=random_token_ids())
    with pytest.raises(ValueError, match="10 tokens and 7 new ones are more than the window of 16"):
        runner.generate_greedy(model, [[9] * 10], max_new_tokens=7, stop_ids=(), pad_id=PAD_ID)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_on_f16_computes_what_peft_does(
    use_rslora: bool, llama_folder: Path, llama_f16: Path, tmp_path: Path
) -> None:
    linears = runner.linear_modules(runner.skeleton(llama_folder))
    generator = torch.Generator().manual_seed(0)
    factors = {
        module: peft_adapter.Factors(
            lora_a=torch.randn(4, inputs, generator=generator) / 8,
            lora_b=torch.randn(outputs, 4, generator=generator) / 16,
        )
        for module, (outputs, inputs) in linears.items()
    }
    settings = peft_adapter.AdapterSettings(
        rank=4, alpha=6.0, dropout=0.0, use_rslora=use_rslora, use_dora=False, base_model="base"
    )
    peft_adapter.write(tmp_path, factors, settings)
    write_gguf_adapter(
        tmp_path / "adapter.gguf",
        {module: parts.lora_a for module, parts in factors.items()},
        {module: parts.lora_b for module, parts in factors.items()},
        scale=settings.scale,
        like=llama_folder,
    )
    token_ids = random_token_ids()
    base = runner.load(llama_folder, dtype=torch.float32)
    plain = mean_kl(base, llama_cpp.load(llama_f16, adapter=tmp_path / "adapter.gguf", window=64), token_ids)
    adapted = llama_cpp.load(llama_f16, adapter=tmp_path / "adapter.gguf", window=64)
    # Measured 7.3e-7 and 9.3e-7, as for the base alone; against the base without the adapter 0.18 and 0.47.
    assert mean_kl(peft_adapter.attach(base, tmp_path), adapted, token_ids) < 3e-6
    assert plain > 0.1


def test_texts_stops_and_chats_are_those_of_training(quickstart_f16: Path, tokenizer: TextTokenizer) -> None:
    model = llama_cpp.load(quickstart_f16, window=64)
    rows = quickstart_rows(300)
    texts = [text for row in rows for text in (row["prompt"], row["completion"])]
    texts += [*HARD_TEXTS, "<|end|> inside"]
    chat = []
    for row in rows[:20]:
        asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}]
        told = [*asked, {"role": "assistant", "content": row["completion"]}]
        for messages, asks in ((asked, True), (told, False)):
            chat.append((messages, tokenizer.render_chat(messages, add_generation_prompt=asks).text))
    found = llama_cpp.parity_problems(
        model, texts=texts, token_ids_of=tokenizer.encode, stop_ids=tokenizer.stop_ids, chat=chat
    )
    assert found == ()


@pytest.mark.parametrize(("name", "pre_tokenizer", "ignores"), PRE_TOKENIZERS)
def test_each_known_pre_tokenizer_cuts_hard_texts_as_training_did(
    name: str, pre_tokenizer: dict[str, Any], ignores: bool, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "model")
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described["pre_tokenizer"] = pre_tokenizer
    described["model"]["ignore_merges"] = ignores
    path.write_text(json.dumps(described), encoding="utf-8")
    model = llama_cpp.load(as_gguf(folder, tmp_path / "a.gguf"), window=16)
    assert model.metadata("tokenizer.ggml.pre") == name
    found = llama_cpp.parity_problems(
        model, texts=HARD_TEXTS, token_ids_of=TextTokenizer.load(folder).encode, stop_ids=(EOS_ID,), chat=[]
    )
    assert found == ()


def test_differences_are_told_with_the_first_example(quickstart_f16: Path, tokenizer: TextTokenizer) -> None:
    model = llama_cpp.load(quickstart_f16, window=64)

    def shifted(text: str) -> list[int]:
        ids = tokenizer.encode(text)
        return [*ids[:1], *(number + 1 for number in ids[1:])] if "wrong" in text else ids

    chat = [([{"role": "user", "content": "hello"}], "something else")]
    tokens, stops, chats = llama_cpp.parity_problems(
        model, texts=["right", "this is wrong"], token_ids_of=shifted, stop_ids=(7, 9), chat=chat
    )
    assert "1 of 2 texts" in tokens
    assert "'this is wrong': from token 1 on" in tokens
    assert "goes on past tokens [7, 9]" in stops
    assert "1 of 1 conversations" in chats
    assert "instead of 'something else'" in chats


def test_an_eos_that_training_goes_past_is_told(llama_f16: Path, llama_folder: Path) -> None:
    model = llama_cpp.load(llama_f16, window=64)
    assert llama_cpp.parity_problems(model, texts=[], token_ids_of=list, stop_ids=(EOS_ID,), chat=[]) == ()
    (problem,) = llama_cpp.parity_problems(model, texts=[], token_ids_of=list, stop_ids=(), chat=[])
    assert problem == "the file's eos token is 1, training's evaluation stops at []"


def test_only_models_of_this_runtime_are_compared(llama_folder: Path) -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        llama_cpp.parity_problems(
            runner.load(llama_folder, dtype=torch.float32), texts=[], token_ids_of=list, stop_ids=(), chat=[]
        )


@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m", "q6_k"])
def test_k_quants_of_the_quickstart_base_stay_near_it(
    kind: Any, quickstart_f16: Path, tmp_path: Path, answers: Callable[[int], Iterator[Tensor]]
) -> None:
    target = tmp_path / "out.gguf"
    llama_cpp.requantize(quickstart_f16, target, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert target.stat().st_size < 0.6 * quickstart_f16.stat().st_size
    reference = runner.load(QUICKSTART / "base", dtype=torch.float32)
    kl = sum(mean_kl(reference, llama_cpp.load(target, window=256), row) for row in answers(5)) / 5
    # Measured 0.0040, 0.0099 and 0.035 for 6, 5 and 4 bits.
    assert 1e-4 < kl < {"q4_k_m": 0.1, "q5_k_m": 0.03, "q6_k": 0.01}[kind]


def test_rows_that_k_blocks_do_not_divide_are_refused(llama_f16: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"projections \(64 inputs\), .*down_proj \(128 inputs\).*gguf_q4_1"):
        llama_cpp.requantize(llama_f16, tmp_path / "out.gguf", "q4_k_m")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_is_refused_with_llama_cpps_reason(llama_f16: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(llama_f16.read_bytes()[:-4096])
    with pytest.raises(VerificationError, match=r"broken\.gguf: llama\.cpp does not load this file: .*data"):
        llama_cpp.load(path, window=16)
    with pytest.raises(VerificationError, match="there is no such file"):
        llama_cpp.load(tmp_path / "absent.gguf", window=16)


def test_a_broken_adapter_is_refused(llama_f16: Path) -> None:
    with pytest.raises(VerificationError, match="does not load this adapter"):
        llama_cpp.load(llama_f16, adapter=llama_f16, window=16)


def test_nothing_is_printed(llama_f16: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = llama_cpp.load(llama_f16, window=16)
    model(input_ids=random_token_ids(tokens=4))
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_told_with_the_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", absent)
        with pytest.raises(MissingPackageError, match=r"pip install 'qlora-trainer\[gguf\]'.*cmake"):
            llama_cpp.load(tmp_path / "a.gguf", window=16)


@pytest.mark.real
def test_stories260k_tokenizes_and_answers_as_transformers_does(shared_folder: Path, tmp_path: Path) -> None:
    folder = shared_folder / "models/stories260K"
    model = llama_cpp.load(as_gguf(folder, tmp_path / "a.gguf"), window=256)
    tokenizer = TextTokenizer.load(folder)
    rows = quickstart_rows(200)
    texts = [text for row in rows for text in (row["prompt"], row["completion"], f"<s> {row['prompt']}</s> more")]
    texts += HARD_TEXTS
    found = llama_cpp.parity_problems(
        model, texts=texts, token_ids_of=tokenizer.encode, stop_ids=tokenizer.stop_ids, chat=[]
    )
    assert found == ()
    prompts = [[1, *tokenizer.encode(text)] for text in ("Once upon a time", "The cat", "Lily had a red")]
    reference = runner.load(folder, dtype=torch.float32)
    settings: dict[str, Any] = {"max_new_tokens": 60, "stop_ids": (2,), "pad_id": 0}
    expected = runner.generate_greedy(reference, prompts, **settings)
    assert runner.generate_greedy(model, prompts, **settings) == expected
    token_ids = torch.tensor([prompts[0] + expected[0]])
    assert mean_kl(reference, model, token_ids) < 1e-6
