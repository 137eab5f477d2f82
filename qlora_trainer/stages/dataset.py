"""The recipe's data section -> encoded, split and audited rows.

Knows the recipe and the order of the steps; how each step works is in ``data``. Nothing here imports torch, so
that ``check`` can show what would be trained.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from qlora_trainer.data.audit import MaskAudit, audit_masks, audit_notes, require_sound
from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow, encode_chat, encode_text, fit_window
from qlora_trainer.data.examples import Example, conversation_examples, prompt_completion_examples
from qlora_trainer.data.scoring import require_references
from qlora_trainer.data.sources import SourceFile, read_rows
from qlora_trainer.data.splits import SplitPlan, Splits, split
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError, RecipeError
from qlora_trainer.recipe import Data, Recipe

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class TaskRows:
    """Everything that training and evaluation read.

    Attributes:
        train: rows that are trained on.
        validation: rows for periodic validation.
        test: rows that choose nothing; every reported figure comes from them.
        audit: what the label masks train.
        stop_ids: ids that generation stops at.
        pad_id: id right of a row's end in a batch.
        notes: sentences that the reader should see: what was dropped, cut or found twice.
        tokenizer: the base model's.
    """

    train: tuple[EncodedRow, ...]
    validation: tuple[EncodedRow, ...]
    test: tuple[EncodedRow, ...]
    audit: MaskAudit
    stop_ids: tuple[int, ...]
    pad_id: int
    notes: tuple[str, ...]
    tokenizer: TextTokenizer = field(repr=False)


def load_rows(recipe: Recipe, base_folder: Path) -> TaskRows:
    """Reads the data files, splits, encodes and audits them.

    Args:
        recipe: its ``data`` section, ``run.seed`` and ``evaluation.metrics`` are read; paths of data files start at
            the current folder.
        base_folder: folder of the base model, which holds the tokenizer.

    Raises:
        DataError: a file or its rows cannot be used; holds the problems of all files.
        RecipeError: the base model's tokenizer lacks what the recipe asks for.
        BaseModelError: the tokenizer cannot be loaded.
    """
    tokenizer = TextTokenizer.load(base_folder)
    _require_rendering(recipe.data, tokenizer)
    files = _read_files(recipe.data)
    splits = _split(files, recipe)
    _require_scorable(recipe, splits.test)
    sides = (splits.train, splits.validation, splits.test)
    examples = [example for side in sides for example in side]
    encoded = _encode(examples, tokenizer, recipe.data)
    fitted = fit_window(
        encoded,
        window=recipe.data.window,
        overlong=recipe.data.overlong,
        bos_id=tokenizer.bos_id,
        places=[example.place for example in examples],
    )
    audit = audit_masks(encoded, fitted, bos_id=tokenizer.bos_id, stop_ids=tokenizer.stop_ids)
    require_sound(
        audit,
        tokenizer,
        window=recipe.data.window,
        accept_untrained_stop=recipe.data.accept_untrained_stop,
    )
    train, validation, test = _sides(fitted, [len(side) for side in sides])
    return TaskRows(
        train=train,
        validation=validation,
        test=test,
        audit=audit,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        notes=(*_file_notes(files), *splits.notes, *_empty_notes(examples), *audit_notes(audit)),
        tokenizer=tokenizer,
    )


def token_fingerprint(rows: TaskRows) -> str:
    """SHA-256 of all token ids, labels and prompts, split by split: equal where training sees the same."""
    digest = sha256()
    for side in (rows.train, rows.validation, rows.test):
        digest.update(array("q", [len(side)]))
        for row in side:
            digest.update(array("q", [len(row.token_ids), len(row.prompt_ids)]))
            digest.update(array("q", row.token_ids + row.labels + row.prompt_ids))
    return digest.hexdigest()


def audit_lines(audit: MaskAudit) -> tuple[str, ...]:
    """What the label masks train, in a few lines for people; ``TaskRows.notes`` has what needs attention."""
    return (
        f"{audit.encoded:,} of {audit.rows:,} rows are used, the longest has {audit.longest_row} tokens",
        f"{audit.label_tokens:,} of {audit.tokens:,} tokens are trained ({100 * audit.label_share:.1f} %)",
        f"{100 * audit.stop_token_trained_share:.1f} % of the rows train a token that generation stops at",
    )


def render_example(tokenizer: TextTokenizer, row: EncodedRow) -> list[tuple[str, bool]]:
    """The row's text in pieces, each with whether it is trained; the pieces joined are the whole text."""
    pieces: list[tuple[str, bool]] = []
    end, shown = 0, ""
    for is_trained, tokens in groupby(row.labels, key=lambda label: label != IGNORE_INDEX):
        end += len(list(tokens))
        # Decoded from the beginning each time: a tokenizer may drop the blank before the first token of a text.
        text = tokenizer.decode(row.token_ids[:end], skip_special=False)
        pieces.append((text[len(shown) :], is_trained))
        shown = text
    return pieces


def _require_rendering(data: Data, tokenizer: TextTokenizer) -> None:
    if data.render == "chat" and not tokenizer.has_chat_template:
        raise RecipeError(
            "data.render: chat needs a chat template, and the base model has none. Set data.render: text with a "
            "data.text_template, or name a base model that was tuned for chat."
        )
    if data.render == "text":
        _stop_id(data, tokenizer)


def _stop_id(data: Data, tokenizer: TextTokenizer) -> int:
    """Id of the token that ends a completion of ``render: text``."""
    text = tokenizer.eos_text if data.stop_token is None else data.stop_token
    found = tokenizer.token_id(text)
    if found is not None and found in tokenizer.stop_ids:
        return found
    stops = ", ".join(repr(tokenizer.decode([stop], skip_special=False)) for stop in tokenizer.stop_ids)
    problem = "is no token of the base model" if found is None else "is no token that generation stops at"
    source = "data.stop_token" if data.stop_token is not None else "data.stop_token is absent, and the eos token"
    raise RecipeError(f"{source} {text!r} {problem}. Set data.stop_token to one of: {stops}.")


def _read_files(data: Data) -> dict[str, SourceFile]:
    """The files by split; raises the problems of all of them as one."""
    paths = {"train": data.train, "validation": data.validation, "test": data.test}
    tasks = {name: Path(path) for name, path in paths.items() if path is not None}
    return _all_or_problems(tasks, read_rows)


def _split(files: dict[str, SourceFile], recipe: Recipe) -> Splits:
    data = recipe.data

    def examples(file: SourceFile) -> list[Example]:
        if data.format == "messages":
            return conversation_examples(file, messages_column=data.messages_column, group_column=data.split_by)
        return prompt_completion_examples(
            file,
            prompt_column=data.prompt_column,
            completion_column=data.completion_column,
            group_column=data.split_by,
        )

    found = _all_or_problems(files, examples)
    plan = SplitPlan(
        validation_rows=data.validation_rows,
        test_rows=data.test_rows,
        train_rows=data.train_rows,
        seed=recipe.run.seed,
    )
    return split(found["train"], validation=found.get("validation"), test=found.get("test"), plan=plan)


def _all_or_problems(tasks: dict[str, Given], make: Callable[[Given], Made]) -> dict[str, Made]:
    made, problems = {}, []
    for name, given in tasks.items():
        try:
            made[name] = make(given)
        except DataError as error:
            problems.append(f"data.{name}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return made


def _require_scorable(recipe: Recipe, test: Sequence[Example]) -> None:
    require_references(
        recipe.evaluation.metrics,
        [example.completion for example in test],
        places=[example.place for example in test],
    )


def _encode(examples: Sequence[Example], tokenizer: TextTokenizer, data: Data) -> list[EncodedRow]:
    if data.render == "chat":
        return encode_chat(examples, tokenizer, train_turns=data.train_turns)
    return encode_text(examples, tokenizer, template=data.text_template, stop_id=_stop_id(data, tokenizer))


def _sides(
    fitted: Sequence[EncodedRow | None], sizes: Sequence[int]
) -> tuple[tuple[EncodedRow, ...], tuple[EncodedRow, ...], tuple[EncodedRow, ...]]:
    """Training, validation and test rows that have labels, from all rows one behind the other."""
    first, second = sizes[0], sizes[0] + sizes[1]
    train, validation, test = (_used(part) for part in (fitted[:first], fitted[first:second], fitted[second:]))
    empty = [name for name, side in (("training", train), ("validation", validation), ("test", test)) if not side]
    if empty:
        raise DataError(
            f"no {' and no '.join(empty)} row fits into data.window with a trainable token. Raise data.window, or set "
            "data.overlong: truncate_prompt."
        )
    return train, validation, test


def _used(rows: Iterable[EncodedRow | None]) -> tuple[EncodedRow, ...]:
    return tuple(row for row in rows if row is not None and row.label_count)


def _file_notes(files: dict[str, SourceFile]) -> list[str]:
    return [f"{file.path}: {file.blank_lines} blank lines skipped" for file in files.values() if file.blank_lines]


def _empty_notes(examples: Sequence[Example]) -> list[str]:
    empty = [example.place for example in examples if not example.completion.strip()]
    return [f"{len(empty)} rows have an empty completion, the first at {empty[0]}"] if empty else []
