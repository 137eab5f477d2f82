"""The text of a model card."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_trainer.pages.render_markdown import escape, fenced
from qlora_trainer.pages.wording import interval, metric, nats, percent, share_of_gain, significant, size
from qlora_trainer.records import StageFigures
from qlora_trainer.stages.report.card.discreet import discreet
from qlora_trainer.stages.report.card.loading import snippets
from qlora_trainer.stages.report.card.metadata import flow, metadata
from qlora_trainer.stages.report.card.sources import local_paths, source_names
from qlora_trainer.stages.report.card.subject import CardSubject

REFERENCE_STAGES = {
    "base_16bit": "base, 16 bit",
    "quantized_base": "base, quantized",
    "adapter_unmerged": "base and adapter, as trained",
}
GPTQ_BASE = (
    "**Its exact base is not part of this file.** It was trained on the base in int4, with integers that GPTQ chose on "
    "training rows, and the figures above are those of both together. `qlora-trainer quantize` makes that base again "
    "where the recipe and its rows are. On the 16-bit base, as below, or on another quantized form of it, the adapter "
    "answers a little differently; a merged file needs no base."
)
RECIPE_SECTIONS = ("quantization", "lora", "data", "training", "merge")
VERSIONS = ("qlora-trainer", "torch", "transformers", "peft", "bitsandbytes", "compressed-tensors")


def render_card(subject: CardSubject) -> str:
    """The card whole: YAML head and Markdown; no data row, no output, no local path and no token in it."""
    parts = (_top, _results, _file, _loading, _data, _recipe, _licence, _environment)
    blocks = (block for part in parts for block in part(subject))
    text = "\n\n".join([metadata(subject), *(block for block in blocks if block)]) + "\n"
    return discreet(text, _places(subject)).encode("utf-8", "backslashreplace").decode("utf-8")


def _places(subject: CardSubject) -> Iterator[Path]:
    """Paths of this machine that a sentence of the report may hold."""
    recipe = subject.recipe
    named = (recipe.base_model.path, recipe.run.folder, recipe.quantization.cache_folder)
    sides = (recipe.data.train, recipe.data.validation, recipe.data.test)
    data = (path for side in sides if side is not None for path in local_paths(side))
    yield from (Path(text).absolute() for text in (*named, *data) if text is not None)
    yield from (Path.home(), Path.cwd())


def _top(subject: CardSubject) -> Iterator[str]:
    kind = "LoRA adapter" if subject.is_adapter else "fine-tuned model"
    yield f"# {escape(subject.recipe.run.name)}: {escape(subject.format)}"
    stored = subject.recipe.quantization.data_type
    how = "LoRA (16-bit base" if stored == "none" else f"QLoRA ({escape(stored)} base"
    yield (
        f"A {kind} on the base {escape(subject.base.label)}, trained with {how}, rank {subject.recipe.lora.rank}) by "
        "qlora-trainer. This card was written from the run's report; every figure was measured by that run."
    )
    if subject.export is not None and not subject.export.verified:
        yield "**Not verified: do not rely on this file.**"
    if subject.export is not None and subject.export.status == "below_bar":
        yield "**Below the bar that its recipe sets.** It keeps less of what training won than was asked for."


def _results(subject: CardSubject) -> Iterator[str]:
    rows = {stage.name: stage for stage in subject.report.stages}
    names = {**REFERENCE_STAGES, subject.stage: "**this file**"}
    shown = {title: rows[name] for name, title in names.items() if name in rows}
    metrics = list(dict.fromkeys(name for row in shown.values() for name in row.metrics))
    yield "## Results"
    yield (
        "On the test rows of the run, which chose nothing; the ranges are bootstrap intervals "
        f"({percent(subject.recipe.evaluation.confidence, 0)}). They say nothing of other tasks."
    )
    head = ["", "loss, nats per label token", *map(escape, metrics), "KL to the trained model, nats"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[title, *_figures(row, metrics)] for title, row in shown.items()]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(row: StageFigures, metrics: list[str]) -> Iterator[str]:
    yield f"{nats(row.nats_per_token)} ({interval(row.interval, nats)})"
    for name in metrics:
        bounds = row.metric_intervals.get(name)
        around = "" if bounds is None else f" ({metric(name, bounds[0])} to {metric(name, bounds[1])})"
        yield f"{metric(name, row.metrics[name])}{around}" if name in row.metrics else "—"
    yield "—" if row.kl_to_trained is None else significant(row.kl_to_trained)


def _file(subject: CardSubject) -> Iterator[str]:
    export = subject.export
    if export is None:
        return
    yield "## This file"
    facts = {
        "Format": f"{export.format}, {export.bits} bit, {size(export.bytes)}",
        "Kept of what training won": share_of_gain(export.gain_kept, export.interval),
        "Same most likely token as the trained model": percent(export.top1_agreement, 2),
        "Merged into": "" if export.merged_into is None else f"the {export.merged_into} base",
        "Checked": export.verification,
        "Left in 16 bit": ", ".join(export.layers_16bit),
        "With more bits": ", ".join(export.layers_raised),
    }
    yield "\n".join(f"- {name}: {escape(text)}" for name, text in facts.items() if text and text != "—")
    yield "SHA-256:"
    yield fenced("\n".join(f"{digest}  {name}" for name, digest in sorted(export.sha256.items())))


def _loading(subject: CardSubject) -> Iterator[str]:
    yield "## How to load"
    if subject.format == "peft_adapter" and subject.recipe.lora.init == "pissa":
        yield (
            "**Not loadable from here.** PiSSA took the principal part out of the base before it was quantized, and "
            "this adapter belongs on what was left, which only the machine that trained it has. Use a merged file."
        )
        return
    if subject.format == "peft_adapter" and subject.recipe.quantization.data_type == "gptq_int4":
        yield GPTQ_BASE
    for title, language, text in snippets(subject):
        yield f"{title}:"
        yield fenced(text, language)
    if subject.recipe.data.render == "text":
        template = escape(flow(subject.recipe.data.text_template))
        yield f"Trained without a chat template. A prompt stands in this text: {template}"


def _data(subject: CardSubject) -> Iterator[str]:
    training, file = subject.report.training, source_names(subject.recipe.data.train)
    yield "## Data"
    yield (
        f"{training.steps:,} steps over {training.tokens:,} tokens, of which the loss was taken on "
        f"{training.label_tokens:,} label tokens, from {escape(file)}. The rows are not part of this card; "
        "whether they may be published, and what they make the model say, is for their owner to judge."
    )


def _recipe(subject: CardSubject) -> Iterator[str]:
    yield "## Recipe"
    plain = subject.recipe.model_dump(mode="json", include=set(RECIPE_SECTIONS), exclude_none=True)
    plain["quantization"].pop("cache_folder")
    plain["data"].pop("cache_folder")
    data = subject.recipe.data
    for name, side in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if side is not None:
            plain["data"][name] = source_names(side)
    yield fenced("\n".join(line for name in RECIPE_SECTIONS for line in _section(name, plain[name])), "yaml")


def _section(name: str, values: Mapping[str, object]) -> Iterator[str]:
    yield f"{name}:"
    for key, value in values.items():
        yield f"  {key}: {flow(value) if isinstance(value, str | list) else str(value).lower()}"


def _licence(subject: CardSubject) -> Iterator[str]:
    yield "## Licence"
    found = ", ".join(subject.base.licence.values())
    if found:
        yield f"The base's own card gives its licence as {escape(found)}; it holds for what is made from it too."
    else:
        yield (
            f"The licence of the base {escape(subject.base.label)} was not found beside its weights. Look it up before "
            "you share or use this file: it holds for what is made from the base too."
        )


def _environment(subject: CardSubject) -> Iterator[str]:
    found = subject.report.environment
    yield "## Made with"
    yield "\n".join(f"- {name} {escape(found[name])}" for name in VERSIONS if name in found)
