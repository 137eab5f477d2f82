"""The YAML head of a model card, as the hub reads it (huggingface.co/docs/hub/model-cards).

Written as YAML flow values: strings in JSON's quotes, numbers with a point, so that no text can become markup and no
number a text.
"""

import json
from collections.abc import Mapping, Sequence

from qlora_trainer.records import StageFigures
from qlora_trainer.stages.report.card.discreet import discreet
from qlora_trainer.stages.report.card.sources import source_names
from qlora_trainer.stages.report.card.subject import CardSubject

Value = str | float | Sequence["Value"] | Mapping[str, "Value"]


def metadata(subject: CardSubject) -> str:
    """The head, between its two rules.

    Without a hub name of the base there is no ``base_model``, and without a known licence no ``license``: the hub
    shows neither, instead of a guess.
    """
    values: dict[str, Value] = dict(subject.base.licence)
    if subject.base.hub_name is not None:
        values["base_model"] = subject.base.hub_name
        # A merged file is no quantized form of its base: it was trained first.
        values["base_model_relation"] = "adapter" if subject.is_adapter else "finetune"
    values |= {"library_name": library(subject), "pipeline_tag": "text-generation", "tags": _tags(subject)}
    results = _results(subject)
    if results:
        values["model-index"] = [{"name": subject.recipe.run.name, "results": results}]
    return "\n".join(["---", *(f"{key}: {flow(value)}" for key, value in values.items()), "---"])


def library(subject: CardSubject) -> str:
    """The hub's name for the library that loads the file here."""
    if subject.format.startswith("gguf_"):
        return "llama-cpp-python"
    return "peft" if subject.is_adapter else "transformers"


def flow(value: Value) -> str:
    """A value on one line of YAML.

    >>> flow({"name": "a: b", "value": 0.00001})
    '{"name": "a: b", "value": 0.000010}'
    """
    if isinstance(value, str):
        # What JSON leaves as it is and YAML does not take: unprintable characters and halves of pairs.
        clean = "".join(character if character.isprintable() else " " for character in value)
        return json.dumps(clean.encode("utf-8", "replace").decode("utf-8"), ensure_ascii=False)
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(part)}" for key, part in value.items()) + "}"
    return "[" + ", ".join(map(flow, value)) + "]"


def _tags(subject: CardSubject) -> list[str]:
    export, name = subject.export, subject.format
    stored = subject.recipe.quantization.data_type
    tags = ["qlora-trainer", *(["lora"] if stored == "none" else ["qlora", "lora", stored])]
    tags += [kind for kind in ("bitsandbytes", "gptq", "gguf") if name.startswith(f"{kind}_")]
    if name.startswith("compressed_tensors_"):
        tags.append("compressed-tensors")
    if export is not None and export.bits < 16:
        tags.append(f"{export.bits}-bit")
    return tags


def _results(subject: CardSubject) -> list[Value]:
    """The test rows' figures of this file, under names that say what they are and no public benchmark's."""
    row = next((stage for stage in subject.report.stages if stage.name == subject.stage), None)
    if row is None:
        return []
    data = subject.recipe.data
    file = discreet(source_names(data.test or data.train))
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": f"test rows of this run ({file})", "type": "private-test-rows", "split": "test"},
            "metrics": _metrics(row),
        }
    ]


def _metrics(row: StageFigures) -> list[Value]:
    found: list[Value] = [
        _metric("nats_per_label_token", "loss in nats per label token", row.nats_per_token, row.interval)
    ]
    for name, value in row.metrics.items():
        bounds = row.metric_intervals.get(name, (value, value))
        scale = "0 to 100" if name == "bleu" else "share"
        found.append(_metric(name, f"{name} ({scale})", value, bounds))
    return found


def _metric(kind: str, title: str, value: float, interval: tuple[float, float]) -> Value:
    return {"type": kind, "name": f"{title}, interval {interval[0]:.4f} to {interval[1]:.4f}", "value": float(value)}
