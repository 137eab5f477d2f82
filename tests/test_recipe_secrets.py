"""A recipe that holds a key is refused, and the key is not shown."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from qlora_trainer.errors import RecipeError
from qlora_trainer.recipe import Recipe
from qlora_trainer.recipe.secrets import secrets_in
from qlora_trainer.recipe_file import load

TEXT = """\
run: {name: tiny}
base_model: {name: owner/model, revision: 0123456789abcdef0123456789abcdef01234567}
data: {train: rows.jsonl}
training: {learning_rate: 2e-4}
"""
KEYS = [
    "hf_" + "aB3" * 11,
    "wandb_v1_" + "aB3" * 11,
    "0a1b2c3d" * 5,
    "ghp_" + "aB3" * 12,
    "sk-proj-" + "aB3" * 11,
    "AKIA" + "AB12" * 4,
    "https://me:word@host/x",
]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_a_recipe_is_refused_and_not_shown(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{TEXT}tracking:\n  tags: [one, '{key}']\n  tokn: '{key}'\n")
    with pytest.raises(RecipeError) as caught:
        load(path)
    message = str(caught.value)
    assert key not in message
    assert "mine.yaml: 2 problems" in message
    assert "tracking.tokn: looks like a key or a password" in message


@pytest.mark.parametrize("key", KEYS)
def test_a_key_on_the_command_line_is_refused_and_not_shown(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    with pytest.raises(RecipeError) as caught:
        load(path, [f"tracking.name={key}"])
    assert key not in str(caught.value)
    assert "--set tracking.name=…" in str(caught.value)


def test_a_key_in_a_recipe_made_in_python_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"tracking\.name looks like a key"):
        Recipe.model_validate({"tracking": {"name": KEYS[0]}})


def test_commits_paths_and_ordinary_words_are_no_keys() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    fine = {
        "revision": commit,
        "path": f"models--owner--model/snapshots/{commit}",
        "hub": f"owner/name@{commit}",
        "train": "https://host/data.jsonl",
        "tags": ["sk-learn-like-names-are-long", "hf_hub", "local-model"],
    }
    assert list(secrets_in(fine)) == []
