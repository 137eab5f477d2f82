"""How good a small Llama does Python's own standard library make? Pretrains, measures and writes one.

The corpus is text that every machine with Python has: the library's sources (its test suite
included), the prose in their docstrings, and pydoc's topics. Every 50th file is held out whole and
never trained on; the curve and the model card report bits per byte on those files.

    python scripts/pretrain_base.py --out recipes/quickstart/base --tokens 12e6

Interrupt it (Ctrl-C, SIGTERM) and run it again: it goes on from its last checkpoint in ``--work``.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import signal
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WINDOW = 512
HELD_OUT_EVERY = 50
SPECIAL_TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:\\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents that nothing is trained on, with where they came from."""

    train: list[str]
    held_out: list[str]
    files: int
    sha256: str


def docstrings(source: str) -> str:
    """All docstrings of a module as one prose document; empty where the source does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in texts if text and len(text) > 80)


def read_corpus() -> Corpus:
    """The standard library as documents; a file is held out with its docstrings or not at all."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "__pycache__", "lib2to3"}
    paths = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    train, held_out = [], []
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if not 200 < len(text) < 400_000 or "\t\t\t" in text:
            continue
        digest.update(text.encode())
        if number % HELD_OUT_EVERY == 0:
            held_out.append(text)
        else:
            prose = docstrings(text)
            train += [text] + ([prose] if prose else [])
    train += list(topics.values())
    return Corpus(train=train, held_out=held_out, files=len(paths), sha256=digest.hexdigest())


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every digit a token of its own, so that unseen numbers can be copied."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL_TOKENS.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    bos = SPECIAL_TOKENS["bos_token"]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=WINDOW, **SPECIAL_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> NDArray[np.uint16]:
    """One long stream: each document begins with bos and ends with eos."""
    end = tokenizer.eos_token_id
    return np.concatenate([np.asarray([*ids, end], dtype=np.uint16) for ids in tokenizer(texts).input_ids])


def windows(stream: NDArray[np.uint16], *, seed: int) -> NDArray[np.int64]:
    """Starts of non-overlapping windows in a seeded order, from a seeded offset: one epoch."""
    random = np.random.default_rng(seed)
    starts = np.arange(random.integers(WINDOW), len(stream) - WINDOW - 1, WINDOW)
    return random.permutation(starts)


def batch_of(stream: NDArray[np.uint16], starts: NDArray[np.int64]) -> torch.Tensor:
    """Token ids of shape ``(len(starts), WINDOW + 1)``, int64."""
    rows = [stream[start : start + WINDOW + 1].astype(np.int64) for start in starts]
    return torch.from_numpy(np.stack(rows))


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean nats per token; matrix products in bfloat16, softmax in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_nats(model: torch.nn.Module, stream: NDArray[np.uint16], *, batch: int) -> float:
    """Mean nats per token over the whole held-out stream."""
    starts = np.arange(0, len(stream) - WINDOW - 1, WINDOW)
    groups = np.array_split(starts, math.ceil(len(starts) / batch))
    losses = [loss_of(model, batch_of(stream, group)).item() * len(group) for group in groups]
    return sum(losses) / len(starts)


class Optimizers:
    """Muon for the weight matrices inside the layers, AdamW for everything else; one schedule for both.

    Muon (arXiv 2502.16982) takes about half of AdamW's tokens to the same loss at this size.
    """

    def __init__(self, model: torch.nn.Module, *, muon_rate: float, adamw_rate: float) -> None:
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
        inside = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in inside]
        muon = torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=adamw_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.all = {"muon": muon, "adamw": adamw}
        self.peaks = {"muon": muon_rate, "adamw": adamw_rate}

    def step(self, fraction_done: float, *, warmup: float = 0.02) -> None:
        """Steps at a rate that rises over ``warmup`` and then falls linearly to zero."""
        scale = min(fraction_done / warmup, (1 - fraction_done) / (1 - warmup))
        for name, optimizer in self.all.items():
            for group in optimizer.param_groups:
                group["lr"] = self.peaks[name] * max(scale, 1e-4)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class StopRequest:
    """True in a condition once Ctrl-C or SIGTERM came: the step in hand is finished first."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked


def pretrain(args: argparse.Namespace) -> None:
    """The whole job: corpus, tokenizer, steps with a curve, then the model folder with its card."""
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus()
    tokenizer_folder, checkpoint = args.work / "tokenizer", args.work / "checkpoint.pt"
    if tokenizer_folder.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    else:
        tokenizer = train_tokenizer(corpus.train, args.vocabulary)
        tokenizer.save_pretrained(tokenizer_folder)
    train, held_out = encode(tokenizer, corpus.train), encode(tokenizer, corpus.held_out)
    bytes_per_token = sum(len(text.encode()) for text in corpus.held_out) / len(held_out)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=args.vocabulary,
            hidden_size=args.hidden,
            intermediate_size=args.ffn,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=max(1, args.hidden // 128),
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        dtype=torch.float32,
    )
    optimizers = Optimizers(model, muon_rate=args.muon_rate, adamw_rate=args.adamw_rate)
    steps = round(args.tokens / (args.batch * WINDOW))
    per_epoch = len(windows(train, seed=0)) // args.batch - 1
    step, curve, spent = 0, [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for name, optimizer in optimizers.all.items():
            optimizer.load_state_dict(state[name])
        step, curve, spent = state["step"], state["curve"], state["seconds"]
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, {len(train):,} training tokens, {len(held_out):,} held out, {steps} steps",
        flush=True,
    )

    def point() -> None:
        nats = held_out_nats(model, held_out, batch=args.batch)
        bits = nats / math.log(2) / bytes_per_token
        curve.append({"tokens": step * args.batch * WINDOW, "nats_per_token": nats, "bits_per_byte": bits})
        print(f"{curve[-1]} {spent:.0f} s", flush=True)

    stop = StopRequest()
    while step < steps and not stop:
        began = time.monotonic()
        epoch, index = divmod(step, per_epoch)
        order = windows(train, seed=args.seed + epoch)[index * args.batch : (index + 1) * args.batch]
        loss = loss_of(model, batch_of(train, order))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step += 1
        optimizers.step(step / steps)
        spent += time.monotonic() - began
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.3f} {step * args.batch * WINDOW / spent:.0f} tokens/s", flush=True)
        if step % args.measure_every == 0 or step == steps:
            point()
        if step % args.measure_every == 0 or stop:
            state = {"model": model.state_dict(), "step": step, "curve": curve, "seconds": spent}
            state |= {name: optimizer.state_dict() for name, optimizer in optimizers.all.items()}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)
    if step == steps:
        facts = {
            "parameters": parameters,
            "shape": f"hidden {args.hidden}, {args.layers} layers, ffn {args.ffn}, vocabulary {args.vocabulary}, tied",
            "python": platform.python_version(),
            "corpus_files": corpus.files,
            "corpus_sha256": corpus.sha256,
            "tokens_seen": steps * args.batch * WINDOW,
            "seconds": round(spent),
            "curve": curve,
            "command": f"python scripts/pretrain_base.py --tokens {args.tokens:g}",
        }
        save(model, tokenizer, facts, args.out)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any], out: Path) -> None:
    """Writes bfloat16 safetensors, tokenizer, ``pretraining.json`` (the curve) and the model card."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    (out / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "README.md").write_text(card(facts))


def card(facts: dict[str, Any]) -> str:
    """The model card: what the model is, what it read, how well it predicts what it did not read."""
    last = facts["curve"][-1]
    curve = "\n".join(
        f"| {point['tokens'] / 1e6:.2f} M | {point['nats_per_token']:.3f} | {point['bits_per_byte']:.3f} |"
        for point in facts["curve"]
    )
    return f"""# The embedded base

A Llama of {facts["parameters"]:,} parameters ({facts["shape"]}), bfloat16, with a
byte-level BPE tokenizer of its own (every digit is one token) and a chat template. Made for the quickstart and for
tests: it knows Python's standard library and little else.

- Corpus: the standard library of Python {facts["python"]}: {facts["corpus_files"]:,} source files, tests
  included, without site-packages and lib2to3, the prose of their docstrings, and pydoc's topics; SHA-256 of the texts
  `{facts["corpus_sha256"][:16]}`. Python's licence (PSF) allows it.
- Held out: every {HELD_OUT_EVERY}th file, whole, docstrings included.
- Tokens seen: {facts["tokens_seen"]:,} in windows of {WINDOW}; {facts["seconds"]:,} s on two processor cores that
  had other work too.
- **Held-out loss: {last["nats_per_token"]:.3f} nats per token, {last["bits_per_byte"]:.3f} bits per byte.**
- Command: `{facts["command"]}`

| tokens seen | held-out nats per token | bits per byte |
|---|---|---|
{curve}

{facts.get("note", "")}
The rate falls linearly to zero at the last token. Licence of the weights: Apache-2.0.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain_base"), help="tokenizer and checkpoints")
    parser.add_argument("--tokens", type=float, default=12e6, help="training tokens to see")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens a step")
    parser.add_argument("--muon-rate", type=float, default=4e-3)
    parser.add_argument("--adamw-rate", type=float, default=3e-3)
    parser.add_argument("--measure-every", type=int, default=250, help="steps between points of the curve")
    parser.add_argument("--seed", type=int, default=0)
    pretrain(parser.parse_args())
