"""report.json: the contract with every tool that reads a run."""

import json
from dataclasses import asdict

from qlora_trainer.records import RunReport


def render_json(report: RunReport) -> str:
    """The report as JSON that fits ``schema.json``.

    Raises:
        ValueError: a figure is not finite; JSON has no such number.
    """
    return json.dumps(asdict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
