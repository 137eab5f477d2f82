"""What a run can be talked to or served from, and the exact commands of the servers. Reads names, loads nothing."""

import difflib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.errors import RunFolderError
from qlora_trainer.export_formats import LORA_RANKS_OF_VLLM, lora_rank_of_vllm
from qlora_trainer.recipe import Recipe
from qlora_trainer.runtime.run_folder import RunFolder

SHORT = {
    "base_16bit": "base",
    "quantized_base": "quantized",
    "adapter_unmerged": "trained",
    "merged_16bit": "merged",
}
"""Names of report.json, and the shorter ones that are typed."""
EXPORT_PREFIX = "export:"
ADAPTER = "peft_adapter"
GGUF_ADAPTER = "gguf_adapter"


@dataclass(frozen=True)
class RunModels:
    """The models of a run.

    Attributes:
        names: ``base``, ``quantized`` (where it is another one), ``trained``, ``merged``, then the exports: those that
            are there.
        recommended: the file that the report recommends; without a report the last stage that was reached.
    """

    names: tuple[str, ...]
    recommended: str

    def named(self, at: str | None) -> str:
        """The name that is meant.

        Raises:
            RunFolderError: there is no such model; names those that are there.
        """
        if at is None:
            return self.recommended
        name = short_name(at)
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise RunFolderError(f"this run has no model {at!r}.{hint} It has: {', '.join(self.names)}")
        return name


@dataclass(frozen=True)
class ServeCommand:
    """A command line, and what to know before it is typed."""

    server: str
    command: str
    notes: tuple[str, ...] = ()


def short_name(name: str) -> str:
    """``merged`` for ``merged_16bit`` and ``export:merged_16bit`` alike; a short name is its own."""
    plain = name.removeprefix(EXPORT_PREFIX)
    return SHORT.get(plain, plain)


def stage_name(name: str) -> str:
    """The name in report.json: ``base_16bit`` for ``base``, ``export:gguf_q8_0`` for ``gguf_q8_0``."""
    plain = name.removeprefix(EXPORT_PREFIX)
    if plain != name or plain in SHORT:
        return name
    return next((stage for stage, short in SHORT.items() if short == name), f"{EXPORT_PREFIX}{name}")


def models_of(folder: RunFolder, recipe: Recipe) -> RunModels:
    """The models that a run of the recipe can be talked to with.

    Raises:
        RunFolderError: nothing was trained there.
    """
    if not (folder.adapter / "adapter_config.json").is_file():
        raise RunFolderError(
            f"{folder.root} holds no trained adapter. Carry the recipe out first: qlora-trainer run RECIPE"
        )
    merged = ("merged",) if (folder.merged / "config.json").is_file() else ()
    exports = tuple(sorted(path.name for path in folder.exports.glob("[!.]*") if path.is_dir()))
    quantized = () if recipe.quantization.data_type == "none" else ("quantized",)
    names = ("base", *quantized, "trained", *merged, *exports)
    return RunModels(names, _recommended(folder, names) or (*merged, "trained")[0])


def serve_commands(recipe: Recipe, folder: RunFolder, name: str) -> tuple[ServeCommand, ...]:
    """How each server is started on one model of a run.

    Args:
        recipe: of the run: says base, window, rank and types.
        folder: of the run.
        name: of ``models_of``.

    Raises:
        RunFolderError: the model is no file that a server loads.
    """
    if name in ("trained", ADAPTER):
        return tuple(_adapter_commands(recipe, folder.adapter if name == "trained" else folder.exports / name))
    if name == GGUF_ADAPTER:
        return (_gguf_adapter(recipe, folder.exports / name),)
    if name.startswith("gguf_"):
        return (_llama_server(recipe, next(iter(sorted((folder.exports / name).glob("*.gguf"))))),)
    if name == "quantized":
        raise RunFolderError("the quantized base is no file to serve: it lacks what was trained. Serve an export")
    if name == "base":
        return tuple(_folder_commands(recipe, _base(recipe), quantized=False))
    place = folder.merged if name == "merged" else folder.exports / name
    return tuple(_folder_commands(recipe, [str(place)], quantized=name != "merged"))


def _recommended(folder: RunFolder, names: tuple[str, ...]) -> str | None:
    if not folder.report_json.is_file():
        return None
    choice = json.loads(folder.report_json.read_text(encoding="utf-8")).get("choice") or {}
    name = SHORT.get(str(choice.get("format")), str(choice.get("format")))
    return name if name in names else None


def _folder_commands(recipe: Recipe, model: list[str], *, quantized: bool) -> Iterator[ServeCommand]:
    dtype = recipe.merge.data_type
    gptq = "/gptq_" in model[0]
    notes = ("needs GPTQModel in transformers' environment: pip install gptqmodel optimum",) if gptq else ()
    yield ServeCommand("vLLM", _line("vllm", "serve", *model, *_engine(recipe, dtype)), _window_note(recipe))
    yield ServeCommand(
        "transformers",
        _line("transformers", "serve", model[0], "--dtype", "auto" if quantized else dtype),
        ("needs: pip install 'transformers[serving]'", *notes),
    )


def _adapter_commands(recipe: Recipe, adapter: Path) -> Iterator[ServeCommand]:
    if recipe.lora.use_dora:
        raise RunFolderError("vLLM applies no DoRA adapters. Serve a merged file: qlora-trainer serve RUN --at merged")
    rank = lora_rank_of_vllm(recipe.lora.rank)
    if rank is None:
        raise RunFolderError(
            f"lora.rank: {recipe.lora.rank} is beyond vLLM's {LORA_RANKS_OF_VLLM[-1]}. Serve a merged file: --at merged"
        )
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{recipe.run.name}={adapter}"]
    kind = recipe.quantization.data_type
    four_bits = ["--quantization", "bitsandbytes"] if kind == "nf4" else []
    base = [_trained_on(adapter)] if kind == "gptq_int4" else _base(recipe)
    command = _line("vllm", "serve", *base, *lora, *four_bits, *_engine(recipe, "bfloat16"))
    stored = "in 16 bit" if kind == "none" else f"in {kind}"
    yield ServeCommand(
        "vLLM",
        command,
        (
            f"ask for the model {recipe.run.name!r}; the base answers under its own name",
            f"the adapter was trained on the base {stored}; on another base it answers a little differently",
            *_window_note(recipe),
        ),
    )


def _trained_on(adapter: Path) -> str:
    """The base that an adapter's file names."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return str(settings["base_model_name_or_path"])


def _llama_server(recipe: Recipe, file: Path) -> ServeCommand:
    window = ["-c", str(_window(recipe)), "--jinja", "--port", "8080"]
    return ServeCommand("llama.cpp", _line("llama-server", "-m", str(file), *window), _window_note(recipe))


def _gguf_adapter(recipe: Recipe, folder: Path) -> ServeCommand:
    file = next(iter(sorted(folder.glob("*.gguf"))))
    line = _line("llama-server", "-m", "BASE.gguf", "--lora", str(file), "-c", str(_window(recipe)), "--jinja")
    note = f"BASE.gguf: a GGUF file of {' '.join(_base(recipe)[:1])} itself, without what was trained"
    return ServeCommand("llama.cpp", line, (note, *_window_note(recipe)))


def _engine(recipe: Recipe, dtype: str) -> list[str]:
    return ["--dtype", dtype, "--max-model-len", str(_window(recipe))]


def _window(recipe: Recipe) -> int:
    """Tokens of prompt and answer that the run has seen."""
    return recipe.data.window + recipe.evaluation.max_new_tokens


def _window_note(recipe: Recipe) -> tuple[str, ...]:
    seen = f"{recipe.data.window} tokens of a row and {recipe.evaluation.max_new_tokens} new ones"
    length = f"the length is what the run has measured, {seen}; raise it up to what the base was made for"
    if recipe.data.render == "chat":
        return (length,)
    return (length, f"trained without a chat template: ask /v1/completions, with the prompt as {_template(recipe)}")


def _template(recipe: Recipe) -> str:
    return json.dumps(recipe.data.text_template)


def _base(recipe: Recipe) -> list[str]:
    source = recipe.base_model
    if source.path is not None:
        return [source.path]
    return [f"{source.name}", *(["--revision", source.revision] if source.revision else [])]


def _line(*parts: str) -> str:
    return shlex.join(parts)
