"""The task's rows: where they lie, what their columns mean, and how they become tokens and labels."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_trainer.recipe.section import PositiveInt, Section

RowFormat = Literal["prompt_completion", "messages", "sharegpt", "instruction", "text"]


class Source(Section):
    """One of several places that rows come from, written as ``{path: a.jsonl, weight: 3.0}``."""

    path: str | None = None
    """A .jsonl, .json, .csv, .parquet or .txt file, or a folder of such files. Give this or ``hub``."""
    hub: str | None = None
    """Data set on the Hugging Face hub, ``owner/name@revision``; a commit as the revision makes the run repeatable."""
    files: str | None = None
    """Which files of a folder or of a hub data set, such as ``data/train-*.parquet``. Absent = all of a folder's; a hub
    data set needs it, since its test rows lie beside its training rows."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the training rows that come from here, relative to the other sources' weights; see
    ``data.when_used_up``. Give it to every training source or to none."""
    format: RowFormat | None = None
    """What a row of this source is; absent = ``data.format``."""
    rename: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it
    """Columns of this source by the names that the data section has for them, such as ``{question: prompt}``."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of 'path' (a file or folder) and 'hub' (owner/name@revision)")
        if self.hub is not None and self.files is None:
            raise ValueError("'hub' needs 'files', such as files: data/train-*.parquet: which rows are to be read")
        return self


Sources = str | Source | Annotated[tuple[str | Source, ...], Field(strict=False, min_length=1)]


class Data(Section):
    """Task rows and how they become token ids and labels."""

    train: Sources
    """Training rows: a .jsonl, .json, .csv, .parquet or .txt file, a folder of such files, ``{path or hub,
    files, weight, format, rename}``, or a list of these. Without weights an epoch is every row of every source once."""
    validation: Sources | None = None
    """Rows for periodic validation, given as ``train`` is. Absent = ``validation_rows`` are held out of ``train``."""
    test: Sources | None = None
    """Rows that choose nothing; every reported figure comes from them. Absent = ``test_rows`` are held out of
    ``train``."""
    validation_rows: PositiveInt | None = None
    """Rows to hold out of ``train`` where there is no ``validation`` file; with one, use at most so many of its
    rows."""
    test_rows: PositiveInt | None = None
    """Rows to hold out of ``train`` where there is no ``test`` file; with one, use at most so many of its rows."""
    train_rows: PositiveInt | None = None
    """Use at most so many training rows."""
    when_used_up: Literal["repeat", "stop"] = "repeat"
    """With weights: an epoch ends when every source's rows were all used, and sources that are used up before begin
    again (``repeat``), or when the first source is used up, and of the others a choice by the seed is used
    (``stop``)."""
    split_by: str | None = None
    """A column; rows with the same value never stand on two sides of a split, and overlap between files is dropped
    from ``train``."""
    format: RowFormat = "prompt_completion"
    """``prompt_completion``: two text columns. ``messages``: a list of {role, content}; ``train_turns`` says which
    assistant turns are trained. ``sharegpt``: the same as {from, value}, from human or gpt. ``instruction``:
    instruction, input (may be empty) and output, as Alpaca has them. ``text``: plain text, of which every token is
    trained and the eos token at its end."""
    prompt_column: str = "prompt"
    """Column of the prompt (``prompt_completion``)."""
    completion_column: str = "completion"
    """Column of the completion (``prompt_completion``)."""
    messages_column: str = "messages"
    """Column of the messages (``messages``, ``sharegpt``)."""
    tools_column: str = "tools"
    """Column of the tool definitions, a list or its JSON text, handed to the chat template (``messages``); rows
    without it have no tools."""
    instruction_column: str = "instruction"
    """Column of the instruction (``instruction``)."""
    input_column: str = "input"
    """Column of the input, which stands behind the instruction and a blank line; rows may lack it (``instruction``)."""
    output_column: str = "output"
    """Column of the answer (``instruction``)."""
    text_column: str = "text"
    """Column of the text (``text``); that of a .txt file is named ``text``."""
    text_separator: str | None = None
    """A line that stands between two documents of a .txt file, such as ``<|endoftext|>``; an empty text means blank
    lines. Absent = the whole file is one document."""
    train_turns: Literal["all", "last"] = "all"
    """Assistant turns of a conversation that are trained: each, or the last alone; but for messages that say ``train:
    false`` or ``weight: 0``."""
    render: Literal["chat", "text"] = "chat"
    """``chat``: through the chat template. ``text``: through ``text_template``, for models without a chat template.
    Rows of ``format: text`` need neither."""
    chat_template: str | None = None
    """A Jinja file to use in place of the base model's chat template; it is written into every file that the run
    makes."""
    text_template: str = "{prompt}\n"
    """What stands before the completion when ``render: text``; must hold ``{prompt}``."""
    stop_token: str | None = None
    """Token that ends a completion when ``render: text``; absent = the tokenizer's eos token. Must be one that
    generation stops at."""
    accept_untrained_stop: bool = False
    """Train with ``render: chat`` even where no row trains a token that generation stops at. The tuned model does not
    learn to end an answer; without this field such rows are refused."""
    window: PositiveInt = 512
    """Longest row in tokens."""
    overlong: Literal["drop", "truncate_prompt", "split", "refuse"] = "drop"
    """Rows longer than the window: dropped and counted, cut at the prompt's beginning and counted, refused, or (rows of
    ``format: text``) split into pieces that overlap by one token, so that no token but the first is left untrained."""
    cache_folder: str = "runs/encoded_rows"
    """Encoded rows are kept here and reused, keyed by the content of the data files and the tokenizer and by these
    settings."""

    @property
    def row_formats(self) -> set[str]:
        """Every format that a row of some source has."""
        return {source.format or self.format for side in self._sides for source in sources_of(side)}

    @property
    def _sides(self) -> tuple[Sources, ...]:
        return tuple(side for side in (self.train, self.validation, self.test) if side is not None)

    @model_validator(mode="after")
    def _rendering_fits(self) -> Self:
        if self.render == "text" and self.row_formats & {"messages", "sharegpt"}:
            raise ValueError("render: text reads prompt and completion; use render: chat with conversations")
        if "{prompt}" not in self.text_template:
            raise ValueError(f"text_template must hold {{prompt}}, got {self.text_template!r}")
        if self.stop_token is not None and self.render == "chat":
            raise ValueError(
                "stop_token is for render: text; with render: chat the chat template writes the stop token"
            )
        if self.chat_template is not None and self.render == "text":
            raise ValueError("chat_template is for render: chat; with render: text give a text_template")
        if self.accept_untrained_stop and self.render == "text":
            raise ValueError(
                "accept_untrained_stop is for render: chat; with render: text every row trains stop_token. "
                "Remove accept_untrained_stop"
            )
        if self.overlong == "split" and self.row_formats != {"text"}:
            raise ValueError("overlong: split is for format: text; a conversation cannot be cut into pieces")
        return self

    @model_validator(mode="after")
    def _sides_fit(self) -> Self:
        for split, side, count in (
            ("validation", self.validation, self.validation_rows),
            ("test", self.test, self.test_rows),
        ):
            if side is None and count is None:
                raise ValueError(f"give {split} (a file) or {split}_rows (rows to hold out of train)")
            if side is not None and any(source.weight is not None for source in sources_of(side)):
                raise ValueError(f"{split}: weights are for train alone; every {split} row is measured once")
        weighted = [source.weight is not None for source in sources_of(self.train)]
        if any(weighted) and not all(weighted):
            raise ValueError("train: give a weight to every source or to none")
        if self.when_used_up == "stop" and not any(weighted):
            raise ValueError("when_used_up: stop is for sources with weights; without them every row is used once")
        return self


def sources_of(side: Sources) -> tuple[Source, ...]:
    """The sources of one side, a plain path as a source of its own."""
    given = side if isinstance(side, tuple) else (side,)
    return tuple(Source(path=source) if isinstance(source, str) else source for source in given)
