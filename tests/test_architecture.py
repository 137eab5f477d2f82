"""The layers: who may import whom, where each library has its door, and what must load without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "qlora_trainer"
NAME = "qlora_trainer"

# A layer's name is the first part below the package. What a layer may import, itself apart:
ALLOWED = {
    # The face names them; it imports none at import.
    "__init__": {"errors", "pipeline", "preflight", "recipe", "recipe_file", "records"},
    "__main__": {"cli"},
    "cli": {
        "export_formats",
        "pipeline",
        "preflight",
        "recipe_file",
        "recipe",
        "records",
        "runtime",
        "serving",
        "errors",
    },
    "pipeline": {"export_formats", "preflight", "serving", "stages", "recipe", "records", "runtime", "errors"},
    "serving": {"export_formats", "recipe", "runtime", "errors"},
    "preflight": {
        "export_formats",
        "stages",
        "data",
        "numerics",
        "runtime",
        "recipe_file",
        "recipe",
        "records",
        "errors",
    },
    "stages": {
        "export_formats",
        "pages",
        "recipe",
        "records",
        "errors",
        "data",
        "formats",
        "runners",
        "numerics",
        "runtime",
    },
    "pages": {"records"},
    "runners": {"export_formats", "numerics", "runtime", "records", "errors"},
    "formats": {"numerics", "runtime", "records", "errors"},
    "data": {"errors"},
    "runtime": {"errors"},
    "numerics": set(),
    "recipe_file": {"recipe", "errors"},
    "recipe": set(),
    "records": set(),
    "export_formats": {"recipe"},
    "errors": set(),
}

# Formats do not know each other; these three are what they share.
SHARED_BY_FORMATS = {"weight_format", "model_folder"}

# Nor do runners; all of them may ask for the architecture, and where a model finds room.
SHARED_BY_RUNNERS = {"transformers", "placement"}

# The only modules that may import a library.
DOORS = {
    "accelerate": {"runners.transformers", "runners.placement"},
    "bitsandbytes": {"runtime.bnb"},
    "peft": {"stages.adapt", "formats.peft_adapter"},
    "wandb": {"runtime.wandb_run"},
    "tensorboard": {"runtime.tensorboard_run"},
    "trackio": {"runtime.trackio_run"},
    "yaml": {"recipe_file", "runtime.run_folder"},
    "compressed_tensors": {"formats.compressed_tensors"},
    "gguf": {"formats.gguf"},
    "llama_cpp": {"runners.llama_cpp"},
    "transformers": {"runners.transformers", "runners.causal_lm.attention", "runners.kv_cache", "runtime.bnb"},
    "tokenizers": {"data.tokenizer"},
    "jinja2": {"data.chat_template", "pages"},
    "typer": {"cli"},
    "rich": {"cli"},
    "huggingface_hub": {"stages.base_model", "data.hub", "runtime.hub"},
    "pyarrow": {"data.sources"},
    "safetensors": {"runtime.weight_files", "runtime.checkpoint", "formats.peft_adapter"},
    "lm_eval": {"stages.tasks"},
    "sacrebleu": {"data.scoring"},
    "rouge_score": {"data.scoring"},
    "vllm": {"runners.vllm"},
    "gptqmodel": set(),  # only in .venv-gptq, by tests
}

WITHOUT_TORCH = (
    "cli",
    "preflight",
    "recipe_file",
    "records",
    "serving",
    "stages.dataset",
    "stages.base_model",
    "runtime.run_folder",
)

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def layer(self) -> str:
        return self.name.split(".")[0]

    def imports(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield str(node.module)
                yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module is not None)


def modules() -> list[Module]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"))))
    return found


MODULES = modules()
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)


def own(imported: str) -> str | None:
    """The imported module's name below the package; None for other packages and for the package itself."""
    return imported.removeprefix(f"{NAME}.") if imported.startswith(f"{NAME}.") else None


@each_module
def test_a_layer_imports_only_lower_layers(module: Module) -> None:
    reached = {inner.split(".")[0] for name in module.imports() if (inner := own(name)) is not None}
    layers = {layer for layer in reached if layer in ALLOWED} - {module.layer}
    assert layers <= ALLOWED[module.layer], f"{module.name} imports {layers - ALLOWED[module.layer]}"


@pytest.mark.parametrize(
    "module",
    [module for module in MODULES if module.layer in ("stages", "formats", "runners") and "." in module.name],
    ids=lambda module: module.name,
)
def test_no_stage_imports_another_and_no_format_another(module: Module) -> None:
    siblings = {
        inner.split(".")[1]
        for name in module.imports()
        if (inner := own(name)) is not None and inner.startswith(f"{module.layer}.")
    }
    shared = {"formats": SHARED_BY_FORMATS, "runners": SHARED_BY_RUNNERS}
    allowed = {module.name.split(".")[1]} | shared.get(module.layer, set())
    assert siblings <= allowed, f"{module.name} imports its siblings {siblings - allowed}"


@each_module
def test_each_library_has_one_door(module: Module) -> None:
    for library, doors in DOORS.items():
        if any(name == library or name.startswith(f"{library}.") for name in module.imports()):
            is_door = any(module.name == door or module.name.startswith(f"{door}.") for door in doors)
            assert is_door, f"{module.name} imports {library}, whose doors are {sorted(doors)}"


@each_module
def test_modules_and_functions_stay_short(module: Module) -> None:
    assert len(module.path.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= MAX_FUNCTION_LINES, f"{module.name}.{node.name} has {lines} lines"


@each_module
def test_every_module_says_what_it_is(module: Module) -> None:
    assert ast.get_docstring(module.tree), f"{module.path} has no docstring"


def test_every_layer_is_in_the_table() -> None:
    assert {module.layer for module in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_check_needs_loads_without_torch(name: str) -> None:
    code = f"import sys, {NAME}.{name}; print(sorted({{'torch', 'transformers', 'peft'}} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
