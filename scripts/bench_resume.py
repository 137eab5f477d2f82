"""Does a run that is killed over and over end with the same bits as one that is left alone?

    python scripts/bench_resume.py                # 200 kills on the quickstart; goes on where it was cut off
    python scripts/bench_resume.py --kills 20 --work /tmp/soak --result /tmp/soak.json

One process imports everything and forks a child for each start of ``train``, so that a start costs no imports. The
child gets ``kill -9`` at a random moment, drawn uniformly over the life that it has before it: the undisturbed run's,
less the steps that are saved. Lives are counted in processor time, so that other work on the machine does not matter.
Each fourth kill waits for the next checkpoint to be written and comes while that is done. Then the same command is
given again, until the run ends, and its adapter file and metrics are compared with the undisturbed run's. After each
tenth kill the newest checkpoint is damaged too: a bit is flipped, a file is cut or removed.

Writes ``scripts/results/bench_resume.json``.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from qlora_trainer import pipeline, recipe_file
from qlora_trainer.recipe import Recipe
from qlora_trainer.runtime.atomic import sha256_of_files
from qlora_trainer.runtime.environment import describe_environment

ROOT: Final = Path(__file__).resolve().parents[1]
RESULT: Final = ROOT / "scripts/results/bench_resume.json"
OVERRIDES: Final = (
    "run.threads=1",
    "tracking.wandb=off",
    "data.train_rows=40",  # so that 24 steps of 4 rows end in the third epoch
    "data.validation_rows=8",
    "data.test_rows=8",
    "evaluation.metrics=[]",
    "evaluation.samples=0",
    "lora.dropout=0.05",  # so that a random state that is lost changes the end
    "training.max_steps=24",
    "training.warmup_steps=5",
    "training.micro_batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.log_every_steps=1",
    "training.validate_every_steps=6",
    "training.checkpoint_every_steps=2",
)
"""What makes the quickstart short enough to be killed 200 times, and its checkpoints frequent enough to be hit."""
WHILE_WRITING_EVERY: Final = 4
DAMAGE_EVERY: Final = 10
FILES: Final = ("adapter.safetensors", "optimizer.pt", "random.pt", "progress.json")
DAMAGES: Final = ("flipped", "cut", "missing")
POLL_SECONDS: Final = 0.001
PR_SET_PDEATHSIG: Final = 1

Json = dict[str, Any]


@dataclass(frozen=True)
class Kill:
    """One kill, and what the run folder looked like after it.

    Attributes:
        number: from 0.
        run: which run it struck, from 0.
        cpu_seconds: the child's age in processor time.
        life_seconds: what the moment was drawn from.
        aimed_at_writing: it waited for a checkpoint to be written.
        was_writing: a half-written checkpoint was left.
        step: last step that metrics.jsonl tells of; 0 where training had not begun.
        saved_step: step of the newest whole checkpoint, after ``damage``; 0 where there is none.
        half_lines: lines of metrics.jsonl without their end.
        broken_checkpoints: checkpoints whose checksums do not agree and that this script has not damaged.
        damage: what was done to the newest checkpoint afterwards; None for nothing.
    """

    number: int
    run: int
    cpu_seconds: float
    life_seconds: float
    aimed_at_writing: bool
    was_writing: bool
    step: int
    saved_step: int
    half_lines: int
    broken_checkpoints: int
    damage: str | None = None

    @property
    def lost_steps(self) -> int:
        """Steps that have to be taken again."""
        return max(0, self.step - self.saved_step)


@dataclass(frozen=True)
class Ended:
    """A run that reached its end after kills.

    Attributes:
        run: from 0.
        adapter_sha256: of its adapter file.
        metrics_are_equal: losses and learning rates of every step are the undisturbed run's, none missing or twice.
        passed_over: damaged checkpoints that the log says were passed over.
        resumed_at: as in the record of the stage.
    """

    run: int
    adapter_sha256: str
    metrics_are_equal: bool
    passed_over: int
    resumed_at: list[int]


@dataclass
class Journal:
    """What happened so far, kept as lines of a file so that a soak can go on where it was cut off."""

    path: Path
    reference: Json = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Journal":
        """The journal as far as it was written; empty where there is none."""
        journal = cls(path)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for kind, values in map(json.loads, lines):
            if kind == "reference":
                journal.reference = values
            elif kind == "kill":
                journal.kills.append(Kill(**values))
            else:
                journal.ended.append(Ended(**values))
        return journal

    def add(self, told: Kill | Ended | Json) -> None:
        """Writes it down."""
        kind, values = ("reference", told) if isinstance(told, dict) else (type(told).__name__.lower(), asdict(told))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, values]) + "\n")
        if isinstance(told, Kill):
            self.kills.append(told)
        elif isinstance(told, Ended):
            self.ended.append(told)
        else:
            self.reference = told


def main() -> None:
    arguments = parse(sys.argv[1:])
    arguments.work.mkdir(parents=True, exist_ok=True)
    journal = Journal.read(arguments.work / "journal.jsonl")
    if not journal.reference:
        journal.add(run_undisturbed(arguments))
    for module in journal.reference["modules"]:
        importlib.import_module(module)
    while len(journal.kills) < arguments.kills:
        kill_once(arguments, journal)
    print()
    # The last run is carried to its end, so that the last kill counts.
    recipe = recipe_of(arguments, f"run-{len(journal.ended):04d}")
    if folder_of(recipe).exists():
        wait_for(start(recipe, arguments.work))
        finish(recipe, journal)
    result = summary(arguments, journal)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("kills", "runs", "divergent_runs", "steps_lost")}, indent=2))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench_resume")
    parser.add_argument("--result", type=Path, default=RESULT)
    return parser.parse_args(words)


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The soak's own settings, each but once: one that is asked for takes the place of the script's."""
    asked = {each.partition("=")[0] for each in arguments.overrides}
    return [*(each for each in OVERRIDES if each.partition("=")[0] not in asked), *arguments.overrides]


def recipe_of(arguments: argparse.Namespace, name: str) -> Recipe:
    places = (
        f"run.name={name}",
        f"run.folder={arguments.work}",
        f"quantization.cache_folder={arguments.work}/quantized",
    )
    return recipe_file.load(arguments.recipe, [*overrides(arguments), *places])


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe.run.folder) / recipe.run.name


def run_undisturbed(arguments: argparse.Namespace) -> Json:
    """The run that all others are compared with; also tells how long a life is and what to import before forking."""
    recipe = recipe_of(arguments, "undisturbed")
    modules_file = arguments.work / "modules.json"
    wait_for(start(recipe, arguments.work, modules_file))  # fills the caches, so that the next one is timed
    shutil.rmtree(folder_of(recipe))
    modules = [name for name in json.loads(modules_file.read_text(encoding="utf-8")) if name not in sys.modules]
    modules = [
        name for name in modules if name.split(".")[0] in ("transformers", "peft", "bitsandbytes", "qlora_trainer")
    ]
    for module in modules:
        importlib.import_module(module)
    began = time.monotonic()
    cpu_seconds = wait_for(start(recipe, arguments.work))
    seconds = time.monotonic() - began
    folder = folder_of(recipe)
    record, took = record_of(folder, "train"), record_of(folder, "train.took")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "cpu_seconds_in_stage": cpu_seconds * took["seconds"] / seconds,
        "cpu_seconds_in_steps": cpu_seconds * record["seconds"] / seconds,
        "adapter_sha256": adapter_sha256(folder),
        "metrics": comparable_metrics(folder),
        "modules": modules,
    }


def start(recipe: Recipe, work: Path, modules_file: Path | None = None) -> int:
    """Forks a child that trains, and gives its process id; the child dies with this process."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(work / "children.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        pipeline.run(recipe, until="train")
        if modules_file is not None:
            modules_file.write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")
        code = 0
    except BaseException:  # noqa: BLE001 - a fork must end here, whatever happens
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for(child: int) -> float:
    """Waits for a child to end well and gives its processor time in seconds."""
    _, status, used = os.wait4(child, 0)
    require_good(status)
    return used.ru_utime + used.ru_stime


def require_good(status: int) -> None:
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a child ended with {os.waitstatus_to_exitcode(status)}: see children.log in --work")


def kill_once(arguments: argparse.Namespace, journal: Journal) -> None:
    """Starts the run at hand and kills it, or sees it end before that."""
    number, run = len(journal.kills), len(journal.ended)
    # Also of the run: where it ends before the kill, the same kill is tried on the next one at another moment.
    chance = random.Random(f"{arguments.seed}/{number}/{run}")
    recipe = recipe_of(arguments, f"run-{run:04d}")
    aims = number % WHILE_WRITING_EVERY == WHILE_WRITING_EVERY - 1
    folder, life = folder_of(recipe), life_before(recipe, journal.reference)
    left_over, broken = half_written(folder), broken_in(folder)
    child = start(recipe, arguments.work)
    writes = (lambda: bool(half_written(folder) - left_over)) if aims else None
    status, age = watch(child, chance.uniform(0, life), writes, chance)
    if status is None:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        require_good(status)
        finish(recipe, journal)
        return
    newly_broken = broken_in(folder) - broken
    damages = number % DAMAGE_EVERY == DAMAGE_EVERY - 1
    was_writing = bool(half_written(folder) - left_over)
    damage = damage_newest(folder, chance) if damages else None
    lines, half_lines = metrics_of(folder)
    kill = Kill(
        number=number,
        run=run,
        cpu_seconds=round(age, 3),
        life_seconds=round(life, 3),
        aimed_at_writing=aims,
        was_writing=was_writing,
        step=max((line["step"] for line in lines), default=0),
        saved_step=max((step for step, place in checkpoints(folder) if is_whole(place)), default=0),
        half_lines=half_lines,
        broken_checkpoints=len(newly_broken),
        damage=damage,
    )
    journal.add(kill)
    print(
        f"\r{number + 1} kills, {run} runs ended, {sum(each.was_writing for each in journal.kills)} while writing",
        end="",
        flush=True,
    )


def life_before(recipe: Recipe, reference: Json) -> float:
    """Processor seconds that a child will take to the end of the run, from what is kept now."""
    folder = folder_of(recipe)
    saved = max((step for step, _ in checkpoints(folder)), default=0)
    life = reference["cpu_seconds"] - reference["cpu_seconds_in_steps"] * saved / (recipe.training.max_steps or 1)
    if (folder / "stages/validate-quantized_base.json").is_file():  # the stages before training are read back
        life -= reference["cpu_seconds"] - reference["cpu_seconds_in_stage"]
    return float(life)


def watch(
    child: int, until: float, writes: Callable[[], bool] | None, chance: random.Random
) -> tuple[int | None, float]:
    """Waits for the moment of the kill.

    Args:
        child: its process id.
        until: age in processor seconds.
        writes: where given, the kill comes up to 30 ms after the first moment from ``until`` on at which this is true.
        chance: how long after it.

    Returns:
        The child's status where it ended before, and its age.
    """
    age, moment = 0.0, None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status, age
        age = int(Path(f"/proc/{child}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9
        if age >= until:
            if moment is None and (writes is None or writes()):
                moment = time.monotonic() + (0 if writes is None else chance.uniform(0, 0.03))
            if moment is not None and time.monotonic() >= moment:
                return None, age
        time.sleep(POLL_SECONDS)


def half_written(folder: Path) -> set[tuple[str, int]]:
    """Checkpoints that are not in their place, by name and inode: those being written, and those that a kill left."""
    found = set()
    for place in (folder / "checkpoints").glob(".step-*"):
        with contextlib.suppress(FileNotFoundError):  # it was put in its place between two looks
            found.add((place.name, place.stat().st_ino))
    return found


def metrics_of(folder: Path) -> tuple[list[Json], int]:
    """Whole lines of metrics.jsonl, each of which must be JSON, and how many are without their end."""
    content = (folder / "metrics.jsonl").read_bytes() if (folder / "metrics.jsonl").is_file() else b""
    lines = content.splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return whole, len(lines) - len(whole)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(place.name.removeprefix("step-")), place) for place in (folder / "checkpoints").glob("step-*"))


def broken_in(folder: Path) -> set[Path]:
    return {place for _, place in checkpoints(folder) if not is_whole(place)}


def is_whole(place: Path) -> bool:
    try:
        wanted = json.loads((place / "checksums.json").read_bytes())
    except (OSError, ValueError):
        return False
    found = sha256_of_files(place)
    return set(FILES) <= wanted.keys() and all(found.get(name) == wanted[name] for name in FILES)


def damage_newest(folder: Path, chance: random.Random) -> str | None:
    """Spoils a file of the newest checkpoint where there is one before it; says what was done."""
    saved = checkpoints(folder)
    if len(saved) < 2:
        return None
    path = chance.choice(sorted(saved[-1][1].iterdir()))
    kind = chance.choice(DAMAGES)
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    else:
        path.unlink()
    return f"{kind} {path.name}"


def finish(recipe: Recipe, journal: Journal) -> None:
    """Compares a run that has ended with the undisturbed one and removes it."""
    folder, reference = folder_of(recipe), journal.reference
    ended = Ended(
        run=len(journal.ended),
        adapter_sha256=adapter_sha256(folder),
        metrics_are_equal=comparable_metrics(folder) == reference["metrics"],
        passed_over=(folder / "log.txt").read_text(encoding="utf-8").count("is damaged and passed over"),
        resumed_at=record_of(folder, "train")["resumed_at"],
    )
    if ended.adapter_sha256 == reference["adapter_sha256"] and ended.metrics_are_equal:
        shutil.rmtree(folder)
    else:
        folder.rename(folder.with_name(f"{folder.name}-divergent"))
    journal.add(ended)


def record_of(folder: Path, stage: str) -> Json:
    record: Json = json.loads((folder / f"stages/{stage}.json").read_text(encoding="utf-8"))["record"]
    return record


def adapter_sha256(folder: Path) -> str:
    return sha256((folder / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def comparable_metrics(folder: Path) -> list[Json]:
    """The lines of metrics.jsonl without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    drop = ("train/label_tokens_per_second", "train/memory_bytes")
    return [{name: value for name, value in line.items() if name not in drop} for line in lines]


def summary(arguments: argparse.Namespace, journal: Journal) -> Json:
    kills, ended, reference = journal.kills, journal.ended, journal.reference
    training = [kill for kill in kills if kill.step > 0]
    lost = sorted(kill.lost_steps for kill in training)
    divergent = [
        run.run for run in ended if run.adapter_sha256 != reference["adapter_sha256"] or not run.metrics_are_equal
    ]
    damaged = [kill for kill in kills if kill.damage is not None]
    return {
        "command": shlex.join(["python", "scripts/bench_resume.py", *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "environment": describe_environment(),
        "recipe": str(
            arguments.recipe.relative_to(ROOT) if arguments.recipe.is_relative_to(ROOT) else arguments.recipe
        ),
        "overrides": overrides(arguments),
        "seed": arguments.seed,
        "undisturbed_seconds": round(reference["seconds"], 2),
        "adapter_sha256": reference["adapter_sha256"],
        "kills": len(kills),
        "runs": len(ended),
        "divergent_runs": divergent,
        "most_kills_of_a_run": max(Counter(kill.run for kill in kills).values(), default=0),
        "kills_before_the_first_step": len(kills) - len(training),
        "kills_aimed_at_writing": sum(kill.aimed_at_writing for kill in kills),
        "kills_while_writing_a_checkpoint": sum(kill.was_writing for kill in kills),
        "broken_checkpoints_after_kills": sum(kill.broken_checkpoints for kill in kills),
        "half_lines_of_metrics_after_kills": sum(kill.half_lines for kill in kills),
        "checkpoint_every_steps": recipe_of(arguments, "any").training.checkpoint_every_steps,
        "steps_lost": {
            "p50": lost[len(lost) // 2] if lost else 0,
            "max": max(lost, default=0),
            "mean": round(sum(lost) / max(1, len(lost)), 2),
        },
        "checkpoints_damaged_on_purpose": dict(Counter(str(kill.damage).split()[0] for kill in damaged)),
        "resumes_from_an_earlier_checkpoint": sum(run.passed_over for run in ended),
    }


def commit() -> str:
    """Of the code that was measured."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
