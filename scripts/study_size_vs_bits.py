"""Larger at few bits or smaller at many: loss against bytes for one family of models, before and after fine-tuning.

    python scripts/study_size_vs_bits.py                # pretrains what is missing, then measures
    python scripts/study_size_vs_bits.py --sizes 64 128 --seeds 1

The family: ``pretrain_base.py``'s Llama of four layers at several widths, each trained on equally many tokens with the
quickstart's tokenizer. Each is rounded to 8, 4 and 3 bits in groups of 64, to nearest (RTN) and by GPTQ. Before
fine-tuning it is measured on held-out text of the pretraining corpus, GPTQ calibrated on training text; then LoRA is
trained on the rounded base for the quickstart's task, GPTQ calibrated on its training rows, and it is measured on the
task's test rows. Beside the family stands the embedded base: width 256, six layers, 10 million tokens; it is not
fine-tuned here (``bench_recovery.py`` does that). Everything finished is kept in ``runs/study``, so that an
interrupted study goes on. Writes ``scripts/results/study_size_vs_bits.json`` and, with ``plot_study.py``, the picture
beside it.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from plot_study import plot
from pretrain_base import read_corpus
from torch import nn
from tuned_bases import RESULTS, ROOT, Bases, Json, Losses, Method, bases_of, changed, gap, score, write_result

from qlora_trainer.numerics.integer_weight import GridSpec
from qlora_trainer.records import LinearLayers
from qlora_trainer.runtime.atomic import write_text
from qlora_trainer.stages.compare.quantizing import stored_bytes

RECIPE: Final = "recipes/quickstart.yaml"
WORK: Final = ROOT / "runs/study"
TEXT: Final = WORK / "text"
EMBEDDED: Final = ROOT / "recipes/quickstart/base"
NAME: Final = "study_size_vs_bits"
SIZES: Final = (64, 128, 192, 256)
PIECE: Final = 1200
"""Characters of a row of text: some 400 tokens."""


@dataclass(frozen=True)
class Cell:
    """How a base's matrices are stored; ``method`` None = 16 bit."""

    method: Method | None
    bits: int

    @property
    def name(self) -> str:
        """Such as ``gptq4``."""
        return "16bit" if self.method is None else f"{self.method}{self.bits}"

    @property
    def spec(self) -> GridSpec:
        """The grids."""
        return GridSpec(self.bits, 64, "none", torch.float16)


CELLS: Final = (
    Cell(None, 16),
    Cell("rtn", 8),
    Cell("gptq", 8),
    Cell("rtn", 4),
    Cell("gptq", 4),
    Cell("rtn", 3),
    Cell("gptq", 3),
)

TUNED: Final = ("16bit", "gptq8", "gptq4", "gptq3")
"""Cells that are fine-tuned where nothing else is asked for; the 16-bit one must be among them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="widths, multiples of 64")
    parser.add_argument("--tokens", type=float, default=5e5, help="pretraining tokens of every size")
    parser.add_argument("--steps", type=int, default=20, help="fine-tuning steps of 16 rows")
    parser.add_argument("--seeds", type=int, default=1, help="fine-tunings of each cell")
    parser.add_argument("--tune", nargs="+", choices=[cell.name for cell in CELLS], default=TUNED, metavar="CELL")
    args = parser.parse_args()
    write_texts(TEXT)
    found = {}
    for size in args.sizes:
        name = f"h{size}"
        pretrain(size, args.tokens)
        found[name] = measured(name, WORK / name, steps=args.steps, seeds=args.seeds, tune=args.tune)
    found["embedded"] = measured("embedded", EMBEDDED, steps=0, seeds=0, tune=())
    settings = {"tokens": args.tokens, "steps": args.steps, "seeds": args.seeds}
    write_result(f"{NAME}.json", f"python {shlex.join(sys.argv)}", summary(found, settings))
    plot(RESULTS / f"{NAME}.json")


def pretrain(size: int, tokens: float) -> None:
    """One model of the family, from its last checkpoint where it was interrupted."""
    folder, work = WORK / f"h{size}", WORK / f"work_h{size}"
    if (folder / "pretraining.json").exists():
        return
    if not (work / "tokenizer").exists():
        shutil.copytree(ROOT / "recipes/quickstart/base", work / "tokenizer", ignore=_but_tokenizer)
    shape = {"hidden": size, "ffn": 3 * size, "layers": 4, "batch": 4, "measure-every": 122, "tokens": f"{tokens:g}"}
    settings = [part for name, value in shape.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "scripts/pretrain_base.py"), "--out", str(folder), "--work", str(work)]
    subprocess.run([*command, *settings], cwd=ROOT, check=True)


def _but_tokenizer(_folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith("tokenizer")]


def write_texts(folder: Path) -> None:
    """Pieces of the pretraining corpus as rows: documents that were trained on for calibration, held-out ones to test.

    Every so-manyth piece is taken, so that all parts of the library have a share.
    """
    if (folder / "test.jsonl").exists():
        return
    corpus = read_corpus()
    folder.mkdir(parents=True, exist_ok=True)
    for target, documents, count in (("train", corpus.train, 200), ("test", corpus.held_out, 80)):
        pieces = [text[start : start + PIECE] for text in documents for start in range(0, len(text) - PIECE, PIECE)]
        chosen = pieces[:: max(1, len(pieces) // count)][:count]
        write_text(folder / f"{target}.jsonl", "".join(json.dumps({"text": piece}) + "\n" for piece in chosen))


def measured(name: str, model: Path, *, steps: int, seeds: int, tune: Sequence[str]) -> Json:
    """Every cell of one model, on text and, where it is fine-tuned, on the task."""
    text = [
        f"data.train={TEXT / 'train.jsonl'}",
        f"data.test={TEXT / 'test.jsonl'}",
        "data.validation=null",
        "data.format=text",
        "data.window=512",
        "data.validation_rows=10",
        "data.overlong=drop",
        "evaluation.batch_size=25",
    ]
    task = ["data.validation_rows=20", "data.test_rows=200"]
    facts = json.loads((model / "pretraining.json").read_text(encoding="utf-8"))
    found: Json = {"parameters": facts["parameters"], "pretraining": facts["curve"][-1], "cells": {}}
    with bases_of(changed(RECIPE, [*_changes(name, model, "text", steps), *text])) as bases:
        for cell in CELLS:
            found["cells"][cell.name] = {**_sizes(bases, cell), "text": _before(bases, cell, name)}
    if not seeds:
        return found
    with bases_of(changed(RECIPE, [*_changes(name, model, "task", steps), *task])) as bases:
        for cell in CELLS:
            if cell.name in tune or cell.method is None:
                row = found["cells"][cell.name]
                row["task_before"] = _before(bases, cell, name)
                row["task_after"] = [_after(bases, cell, name, seed, steps) for seed in range(seeds)]
    return found


def _changes(name: str, model: Path, rows: str, steps: int) -> list[str]:
    return [
        f"run.name=study_{name}_{rows}_{steps}",
        "run.threads=1",
        f"base_model.path={model}",
        "calibration.rows=32",
        "evaluation.metrics=[]",
        f"training.max_steps={max(1, steps)}",
        f"training.checkpoint_every_steps={max(1, steps)}",
        "training.warmup_steps=5",
    ]


def _sizes(bases: Bases, cell: Cell) -> Json:
    """Bytes of the whole model, and of the matrices that are rounded."""
    layers, folder = bases.ground.layers, bases.ground.base.folder
    plain = LinearLayers(quantized={}, adapted=layers.adapted, ignored=layers.ignored)
    matrices = 2 * sum(rows * columns for rows, columns in layers.quantized.values())
    whole = stored_bytes(folder, plain, None)
    total = whole if cell.method is None else stored_bytes(folder, layers, cell.spec)
    return {"bits": cell.bits, "method": cell.method, "bytes": total, "matrix_bytes": total - whole + matrices}


def _opened(bases: Bases, cell: Cell) -> nn.Module:
    return bases.sixteen_bit() if cell.method is None else bases.integers(cell.method, cell.spec)


def _before(bases: Bases, cell: Cell, name: str) -> Json:
    file = WORK / f"measured/{name}-{cell.name}-{_content(bases)}.json"
    if not file.exists():
        _keep(file, bases.losses(_opened(bases, cell)))
    found: Json = json.loads(file.read_text(encoding="utf-8"))
    return found


def _after(bases: Bases, cell: Cell, name: str, seed: int, steps: int) -> Json:
    file = WORK / f"measured/{name}-{cell.name}-{_content(bases)}-tuned-{steps}-{seed}.json"
    if not file.exists():
        _keep(file, bases.tuned(_opened(bases, cell), cell.name, seed=seed).losses)
    found: Json = json.loads(file.read_text(encoding="utf-8"))
    return found


def _content(bases: Bases) -> str:
    """Of the model and of the rows it is measured on, so that nothing of an earlier study is taken for this one's."""
    return f"{bases.ground.content_key[:8]}-{bases.ground.bench_key[:8]}"


def _keep(file: Path, losses: Losses) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(asdict(losses)))
    print(f"{file.stem}: {losses.value:.4f} nats per token", flush=True)


def summary(found: dict[str, Json], settings: Json) -> Json:
    """Scores, what each cell adds to its 16-bit model, and the two questions."""
    sizes = []
    for model, each in found.items():
        cells = {name: _cell_summary(cell, each["cells"]["16bit"]) for name, cell in each["cells"].items()}
        sizes.append({"name": model, **{key: each[key] for key in ("parameters", "pretraining")}, "cells": cells})
    return {**settings, "sizes": sizes, "larger_at_few_bits": _duels(found)}


def _losses(cell: Json, rows: str) -> list[Losses]:
    kept = cell[rows]
    return [Losses(**each) for each in (kept if isinstance(kept, list) else [kept])]


ROWS: Final = ("text", "task_before", "task_after")


def _cell_summary(cell: Json, reference: Json) -> Json:
    made = {key: cell[key] for key in ("bits", "method", "bytes", "matrix_bytes")}
    for rows in (rows for rows in ROWS if rows in cell):
        own, other = _losses(cell, rows), _losses(reference, rows)
        made[rows] = {**score(own), "added": gap(own, other)}
    return made


def _duels(found: dict[str, Json]) -> list[Json]:
    """The larger of two neighbours at 4 (3) bits against the smaller at 8 (4), both by GPTQ; negative = larger wins."""
    duels = []
    family = sorted((name for name in found if name != "embedded"), key=lambda name: found[name]["parameters"])
    for small, large in pairwise(family):
        for few, many in (("gptq4", "gptq8"), ("gptq3", "gptq4"), ("gptq4", "16bit")):
            one, other = found[large]["cells"][few], found[small]["cells"][many]
            duel = {"larger": f"{large} {few}", "smaller": f"{small} {many}"}
            duel |= {"bytes_ratio": one["bytes"] / other["bytes"]}
            duel |= {"matrix_bytes_ratio": one["matrix_bytes"] / other["matrix_bytes"]}
            both = [rows for rows in ROWS if rows in one and rows in other]
            duels.append(duel | {rows: gap(_losses(one, rows), _losses(other, rows)) for rows in both})
    return duels


if __name__ == "__main__":
    main()
