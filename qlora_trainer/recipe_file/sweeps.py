"""The settings of one trial of a sweep, as ``--set`` overrides."""

import json
from collections.abc import Mapping

import yaml

from qlora_trainer.errors import RecipeError


def trial_overrides(trial: str) -> list[str]:
    """Overrides for one trial of a wandb sweep.

    JSON and not ``${args}``: wandb writes 0.00001 there as 1e-05, which YAML reads as text.

    Args:
        trial: what wandb's agent puts in place of ``${args_json}``: ``{"training.learning_rate": 1e-05, ...}``.

    Raises:
        RecipeError: it is not such an object.
    """
    try:
        settings = json.loads(trial)
    except ValueError as error:
        raise RecipeError(f"the trial is not JSON ({error}): {trial[:200]!r}. Give '${{args_json}}' there") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"the trial is no object of settings: {trial[:200]!r}. Give '${{args_json}}' there")
    return [f"{path}={_yaml(value)}" for path, value in _flat(settings)]


def _flat(settings: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Settings by dotted path; a sweep may nest its parameters."""
    found: list[tuple[str, object]] = []
    for name, value in settings.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return found


def _yaml(value: object) -> str:
    """On one line, as the recipe's rules want it."""
    listed = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=1_000_000)
    return listed.strip().removeprefix("[").removesuffix("]")
