"""A recipe that fits: from a base model, a data file and the machine at hand.

Everything that is chosen follows from what is looked at: columns say how rows become prompts, the tokenizer whether
there is a chat template, the longest row the window, free memory the micro-batch, layer sizes the formats. Nothing is
written here, and what cannot be looked at (a hub model that was not downloaded) is chosen small.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.data.sources import read_rows
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError
from qlora_trainer.export_formats import unfit_layers
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.preflight.prediction import cuts, memory_predictions, model_shape, training_load
from qlora_trainer.preflight.room import Memory, free_memory
from qlora_trainer.recipe import ExportFormat, Recipe
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.stages import base_model, dataset

Settings = dict[str, dict[str, object]]

COLUMN_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
)
"""Names of prompt and completion that public data sets use."""
MESSAGES = ("messages", "conversations")
FILLED_SHARE = 0.9
"""Share of the free memory that a prediction may reach."""
ROWS_IN_A_STEP = 16
LONGEST_WINDOW = 2048
EPOCHS_OF_FEW_ROWS, FEW_ROWS = 3.0, 2000
SMALL_MODEL = 1e8
"""Parameters up to which float32 costs a processor no more than bfloat16, and is exact (recipes/quickstart.yaml)."""
LARGE_MODEL = 14e9
"""Parameters from which on QLoRA's table 9 halves the rate."""


@dataclass(frozen=True)
class Wish:
    """What the reader asks for.

    Attributes:
        name: of the run.
        base: a local folder, or ``owner/model`` on the hub.
        data: file of training rows.
        prompt_column: of the prompt; None = by the names that are there.
        completion_column: of the completion; None likewise.
    """

    name: str
    base: str
    data: str
    prompt_column: str | None = None
    completion_column: str | None = None


@dataclass(frozen=True)
class Proposal:
    """A recipe and why it is as it is.

    Attributes:
        recipe: complete and valid.
        reasons: a sentence for each thing that was chosen.
    """

    recipe: Recipe
    reasons: tuple[str, ...]


def propose(wish: Wish) -> Proposal:
    """A fitting recipe.

    Raises:
        DataError: the file cannot be read, or its columns have no names that are known here; lists those it has.
        BaseModelError: the base is a local folder that cannot be used.
    """
    settings: Settings = {"run": {"name": wish.name}, "base_model": _source(wish.base)}
    reasons: list[str] = []
    settings["data"] = _data(wish, reasons)
    settings["training"] = {"epochs": _epochs(wish, reasons), "warmup_steps": 10}
    drafted = Recipe.model_validate(settings)
    base = base_model.resolve_local(drafted.base_model)
    if base is None:
        _guess(settings, reasons)
    else:
        _look(settings, base, reasons)
    return Proposal(Recipe.model_validate(settings), tuple(reasons))


def _source(base: str) -> dict[str, object]:
    if Path(base).is_dir() or base.count("/") != 1 or base.startswith((".", "/", "~")):
        return {"path": base}
    return {"name": base, "revision": "main"}


def _data(wish: Wish, reasons: list[str]) -> dict[str, object]:
    """The section, but for what depends on the tokenizer."""
    path = Path(wish.data)
    file = read_rows(path)
    data: dict[str, object] = {"train": wish.data, **_columns(wish, file.rows[0].columns, reasons)}
    for split in ("validation", "test"):
        beside = path.with_name(f"{split}{path.suffix}")
        if beside.is_file() and beside != path:
            data[split] = str(beside)
            reasons.append(f"data.{split}: {beside} lies beside the training rows")
        else:
            data[f"{split}_rows"] = max(1, min(200, len(file.rows) // 10))
            reasons.append(f"data.{split}_rows: a tenth of {len(file.rows):,} rows, 200 at most")
    return data


def _columns(wish: Wish, row: Mapping[str, object], reasons: list[str]) -> dict[str, object]:
    given = (wish.prompt_column, wish.completion_column)
    if given == (None, None) and {"instruction", "output"} <= row.keys():
        reasons.append("data.format: instruction, after the columns instruction and output")
        return {"format": "instruction"}
    pairs = (given,) if given != (None, None) else COLUMN_PAIRS
    named = next((pair for pair in pairs if set(pair) <= row.keys()), None)
    if named is not None:
        reasons.append(f"data: the columns {named[0]} and {named[1]} are prompt and completion")
        return {"prompt_column": named[0], "completion_column": named[1]}
    messages = next((name for name in MESSAGES if isinstance(row.get(name), list)), None)
    if messages is not None and given == (None, None):
        reasons.append(f"data: the column {messages} holds conversations")
        return {"format": _conversation_format(row[messages]), "messages_column": messages}
    if set(row) == {"text"}:
        reasons.append("data.format: text, every token is trained, because there is no other column")
        return {"format": "text"}
    raise DataError(
        f"{wish.data} has the columns {', '.join(row)}, and it is not clear which are prompt and completion. "
        "Give --prompt-column and --completion-column"
    )


def _conversation_format(turns: object) -> str:
    """``sharegpt`` where turns are ``{from, value}``, else ``messages``."""
    first = turns[0] if isinstance(turns, list) and turns else None
    return "sharegpt" if isinstance(first, dict) and {"from", "value"} <= first.keys() else "messages"


def _epochs(wish: Wish, reasons: list[str]) -> float:
    count = len(read_rows(Path(wish.data)).rows)
    epochs = EPOCHS_OF_FEW_ROWS if count < FEW_ROWS else 1.0
    reasons.append(f"training.epochs: {epochs:g} over {count:,} rows")
    return epochs


def _guess(settings: Settings, reasons: list[str]) -> None:
    """What is said of a base that is not on this machine yet."""
    settings["data"]["window"] = 1024
    settings["training"] |= {"micro_batch_size": 1, "gradient_accumulation_steps": ROWS_IN_A_STEP}
    settings["evaluation"] = {"batch_size": 1}
    settings["export"] = {"formats": ["peft_adapter", "merged_16bit"]}
    reasons.append(
        "the base is not on this machine yet: window, micro-batch and formats are small. After `hf download "
        f"{settings['base_model']['name']}` say `qlora-trainer new` again to have them chosen"
    )


def _look(settings: Settings, base: BaseCheckpoint, reasons: list[str]) -> None:
    """Chooses what the base, its tokenizer and the machine say."""
    if not TextTokenizer.load(base.folder).has_chat_template:
        settings["data"]["render"] = "text"
        reasons.append("data.render: text, because the base has no chat template")
    if base.parameters >= LARGE_MODEL:
        settings["training"]["learning_rate"] = 1.0e-4
        reasons.append("training.learning_rate: 1e-4 for a base of this size (QLoRA, table 9)")
    rows = dataset.load_rows(Recipe.model_validate(_with_window(settings, LONGEST_WINDOW)), base.folder)
    window = min(LONGEST_WINDOW, -(-rows.audit.longest_row // 64) * 64)
    settings["data"]["window"] = window
    reasons.append(f"data.window: the longest row has {rows.audit.longest_row} tokens")
    settings["calibration"] = {"rows": min(128, len(rows.train)), "batch_size": 1}
    # Rung 4 holds the whole model unquantized.
    settings["ladder"] = {"last_rung": 3}
    shape = _shape(base)
    formats = _formats(shape)
    settings["export"] = {"formats": list(formats)}
    reasons.append(f"export.formats: {formats[-1]} fits the sizes of every layer")
    if shape is not None:
        _fit(settings, shape, rows, free_memory(), reasons)


def _shape(base: BaseCheckpoint) -> ModelShape | None:
    """The base's sizes; None where its architecture is not one whose memory can be predicted."""
    try:
        return model_shape(base)
    except ValueError:
        return None


def _with_window(settings: Settings, window: int) -> Settings:
    return {**settings, "data": {**settings["data"], "window": window}}


def _formats(shape: ModelShape | None) -> tuple[ExportFormat, ...]:
    four_bits: tuple[ExportFormat, ...] = (
        "compressed_tensors_w4a16_g128",
        "compressed_tensors_w4a16_g64",
        "compressed_tensors_w4a16_g32",
    )
    fitting = [name for name in four_bits if shape is not None and not unfit_layers(name, shape.linears)]
    return ("peft_adapter", "merged_16bit", fitting[0] if fitting else "compressed_tensors_w8a16")


def _fit(settings: Settings, shape: ModelShape, rows: dataset.TaskRows, room: Memory, reasons: list[str]) -> None:
    """The largest micro-batch, and batches of evaluation and calibration, that free memory holds."""
    is_small = room.device == "cpu" and shape.parameters < SMALL_MODEL
    settings["quantization"] = {"compute_dtype": "float32" if is_small else "bfloat16"}
    limit = FILLED_SHARE * room.free_bytes
    for size in (16, 8, 4, 2, 1):
        settings["training"] |= {"micro_batch_size": size, "gradient_accumulation_steps": ROWS_IN_A_STEP // size}
        if _needed(settings, shape, rows, room)["training"] <= limit:
            break
    for size in (16, 8, 4, 2, 1):
        settings["evaluation"] = {"batch_size": size}
        if _needed(settings, shape, rows, room)["evaluation"] <= limit:
            break
    while _needed(settings, shape, rows, room)["rounding"] > limit and _calibration_rows(settings) > 16:
        settings["calibration"]["rows"] = _calibration_rows(settings) // 2
    needed = _needed(settings, shape, rows, room)["training"]
    reasons.append(
        f"training.micro_batch_size: {settings['training']['micro_batch_size']}, which needs {needed / 2**30:.1f} of "
        f"{room.free_bytes / 2**30:.1f} GiB that are free ({room.place})"
    )


def _needed(settings: Settings, shape: ModelShape, rows: dataset.TaskRows, room: Memory) -> dict[str, int]:
    """Predicted bytes by purpose; nothing for rounding where nothing is rounded."""
    recipe = Recipe.model_validate(settings)
    load = training_load(recipe, rows.train, room.device, cuts(recipe)[0])
    predicted = memory_predictions(recipe, shape, rows, load)
    return {"rounding": 0} | {purpose: footprint.total for purpose, footprint in predicted.items()}


def _calibration_rows(settings: Settings) -> int:
    return int(str(settings["calibration"]["rows"]))
