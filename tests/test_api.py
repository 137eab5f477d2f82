"""The package's face: what it names, that it costs nothing until it is used, and that its example runs."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import qlora_trainer
from qlora_trainer import BaseModelSource, Data, Recipe, Run, Training, check, dump_recipe, load_recipe
from qlora_trainer.recipe import Section
from qlora_trainer.recipe_file import load
from tests.listings import run_listing


def test_every_public_name_is_there_and_listed() -> None:
    for name in qlora_trainer.__all__:
        assert vars(qlora_trainer).get(name) or getattr(qlora_trainer, name)
    assert set(qlora_trainer.__all__) <= set(dir(qlora_trainer))
    assert sorted(qlora_trainer.__all__, key=lambda name: (name.islower(), name)) == qlora_trainer.__all__


def test_every_section_of_a_recipe_can_be_built_from_the_face() -> None:
    sections = {info.annotation for info in Recipe.model_fields.values()}
    named = {section for section in sections if isinstance(section, type) and issubclass(section, Section)}
    assert {section.__name__ for section in named} <= set(qlora_trainer.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qlora_trainer.nothing


def test_the_face_imports_nothing_and_loading_a_recipe_no_torch() -> None:
    code = (
        "import sys, qlora_trainer; heavy = {'torch', 'pydantic'} & set(sys.modules)\n"
        "from qlora_trainer import Recipe, check, load_recipe\n"
        "print(sorted(heavy), 'torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[] False"


def test_the_example_of_the_package_runs_and_says_what_it_promises(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qlora_trainer.__doc__ is not None
    lines = qlora_trainer.__doc__.splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line).strip("\n"))
    assert len(code.splitlines()) <= 12
    printed = run_listing(code, tmp_path, llama_folder, monkeypatch).splitlines()
    assert printed[0] == ""
    assert "Training" in printed[1] or "training" in printed[1]
    assert printed[2].startswith("peft_adapter True ")


def test_a_recipe_built_in_python_is_the_one_that_its_text_says(tmp_path: Path, llama_folder: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "{n}", "completion": "b"}}\n' for n in range(40)), encoding="utf-8"
    )
    recipe = Recipe(
        run=Run(name="mine", folder=str(tmp_path / "runs")),
        base_model=BaseModelSource(path=str(llama_folder)),
        data=Data(train=str(tmp_path / "rows.jsonl"), validation_rows=4, test_rows=4),
        training=Training(max_steps=5),
    )
    (tmp_path / "mine.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml") == load(tmp_path / "mine.yaml") == recipe
    assert check(recipe).plan
