"""The training curves as metrics.jsonl tells them."""

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path

Series = tuple[tuple[int, float], ...]
"""``(step, value)`` points in order of their steps."""


def read_series(file: Path) -> Mapping[str, Series]:
    """Every figure that was logged, by name, such as ``train/gradient_norm``.

    A step that was repeated after an interruption counts once, as it was last. Values that are not finite have no
    place on a chart and are left out, as is the half line of a process that was killed. No file gives nothing.
    """
    if not file.is_file():
        return {}
    found: dict[str, dict[int, float]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        record = _record(line)
        step = record.pop("step", None)
        if not isinstance(step, int):
            continue
        for name, value in record.items():
            if isinstance(value, int | float) and isfinite(value):
                found.setdefault(name, {})[step] = float(value)
    return {name: tuple(sorted(points.items())) for name, points in found.items()}


def _record(line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
