"""The verbs that carry a recipe some way, and what their ``--help`` says."""

from dataclasses import dataclass
from typing import Literal

from qlora_trainer.cli.format_help import FORMATS_HELP
from qlora_trainer.cli.tasks_verb import TASKS_HELP


@dataclass(frozen=True)
class Verb:
    """A command that runs the stages of a recipe up to one of them.

    Attributes:
        name: the command.
        until: the last stage.
        does: one line for the list of commands.
        text: what it does, reads and writes.
        following: the command that goes on from there, without its arguments; None after the last.
    """

    name: str
    until: Literal["quantize", "train", "evaluate", "merge", "export", "report"]
    does: str
    text: str
    following: str | None

    @property
    def help(self) -> str:
        """The whole help text; a line with a backspace keeps the next paragraph's line breaks."""
        example = f"\b\nExample:\n  qlora-trainer {self.name} recipes/quickstart.yaml"
        following = "" if self.following is None else f"\n\nNext: qlora-trainer {self.following} RECIPE"
        return f"{self.does}\n\n{self.text}\n\n{example}{following}"


ENDS = (
    "The exit code is 1 where an exported file could not be verified, and 4 where all were verified and one is not as "
    "good as the recipe asks (ladder.bar_int4, ladder.bar_int8)."
)
RESUMES = (
    "Stages that were finished before with the same settings are read back, not repeated; after an interruption "
    "the same command goes on where it stopped."
)

VERBS = (
    Verb(
        name="run",
        until="report",
        does="The whole way, from the base model to the report.",
        text="Reads the recipe, the base model and the data files that it names. Writes run.folder/run.name/: "
        "recipe.yaml, metrics.jsonl, checkpoints/, adapter/, merged/, exports/ and report.json, .md and .html. "
        f"Ends with a table of the loss at every stage and one of the files. {ENDS} {RESUMES}",
        following=None,
    ),
    Verb(
        name="quantize",
        until="quantize",
        does="Quantize the base model and keep it.",
        text="Reads the 16-bit base model. Writes the quantized base into quantization.cache_folder, where every run "
        "with the same base and settings finds it, and tells the stored bits per parameter. gptq_int4 reads training "
        "rows too, and a data_type of none leaves the base as it is.",
        following="train",
    ),
    Verb(
        name="train",
        until="train",
        does="Train LoRA adapters on the quantized base.",
        text="Does first what is still to be done before it. Reads the training and validation rows. Writes "
        "checkpoints/ while it trains and adapter/ (PEFT format) at the end; metrics go to metrics.jsonl. Ctrl-C saves "
        f"a checkpoint first. {RESUMES}",
        following="evaluate",
    ),
    Verb(
        name="evaluate",
        until="evaluate",
        does="Measure base, quantized base and trained model.",
        text="On the test rows: nats per label token, and the task metrics of evaluation.metrics by greedy generation, "
        "each with a bootstrap interval; the same rows for every model. Does first what is still to be done before it."
        f"\n\n{TASKS_HELP}",
        following="merge",
    ),
    Verb(
        name="merge",
        until="merge",
        does="Merge the adapter into the base and measure that.",
        text="Writes merged/, a 16-bit model in Hugging Face layout, shard by shard, so that memory is bounded by the "
        "largest shard. merge.into says which base: the dequantized one that training saw, the original, or (measured, "
        "the default) both, of which the better on the validation rows is kept.",
        following="export",
    ),
    Verb(
        name="export",
        until="export",
        does="Write the exports, each loaded again and verified.",
        text="Writes exports/FORMAT/ for each of export.formats. Each is loaded by its runtime and compared with the "
        "weights that were written (verified) and with the trained model (KL, gain kept). A quantized file is made "
        "anew, rung by rung and from both merge bases, until it meets the recipe's bar; the validation rows choose.\n\n"
        f"{FORMATS_HELP}",
        following="report",
    ),
    Verb(
        name="report",
        until="report",
        does="Write the report from what was measured.",
        text="Writes report.json, report.md and report.html. Stages that are missing are carried out first, so "
        f"this ends as `run` does; where none is missing it takes seconds. {ENDS}",
        following=None,
    ),
)

CHECK_SHORT_HELP = "Show what a run would do and need, and every problem."

CHECK_HELP = """What a run would do and need, in about a second: nothing is loaded, written or downloaded.

Prints the resolved recipe with all defaults, predicted memory and disk beside what is free, the stages with their
figures, an audit of what the label masks train, and one training example with trained and ignored tokens told
apart. All problems are told at once; with problems the exit code is 2.

\b
Example:
  qlora-trainer check recipes/quickstart.yaml --set training.max_steps=20

Next: qlora-trainer run RECIPE"""

EVENTS_SHORT_HELP = "List what --json prints."

EVENTS_HELP = """What `--json` prints: every event with its fields.

One JSON object a line on standard output; errors and warnings stand on standard error as well. Fields may be added in
later versions; none changes its meaning or goes.

\b
Example:
  qlora-trainer run recipes/quickstart.yaml --json | while read -r line; do ...; done"""

APP_HELP = """QLoRA training from one recipe to verified int4 and int8 files, with the loss at every stage reported.

A recipe is one YAML file: base model, data, training, exports. Begin with

\b
  qlora-trainer recipes                          what is there; recipes copy NAME makes one yours
  qlora-trainer new                              a recipe for your base, data and machine
  qlora-trainer check recipes/quickstart.yaml    what it would do and need
  qlora-trainer run recipes/quickstart.yaml      the whole way
  qlora-trainer chat runs/quickstart             talk to what came of it

Any setting can be changed on the command line: --set training.max_steps=20
For scripts: --quiet prints only where the report lies, --json one object a line (see `events`). NO_COLOR is respected.

\b
Exit codes:
    0  all went well
    1  an exported file could not be verified: do not use it
    2  something must be mended first: recipe, data, base model, run folder
    3  training or writing a file cannot go on
    4  every file was verified, but one is below the recipe's bar
  130  interrupted; the same command goes on from there"""
