"""A file of a finished run on its way to the hub: what is packed, what is refused, what arrives."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from qlora_trainer import pipeline
from qlora_trainer.errors import HubError, RunFolderError, VerificationError
from qlora_trainer.formats.peft_adapter import quiet_peft
from qlora_trainer.pipeline import Asked, pack
from qlora_trainer.stages.report.render_json import render_json
from tests.finished import FinishedRun
from tests.hub_stand_in import TOKEN, StandIn, serving

# isort: split
from peft import PeftModel

INT8 = "compressed_tensors_w8a16"
TO = "me/tuned"


@pytest.fixture
def own_run(finished_run: FinishedRun, tmp_path: Path) -> FinishedRun:
    """The finished run in a place of its own, for tests that change it."""
    root = tmp_path / "runs" / "tiny"
    shutil.copytree(finished_run.root, root)
    run = finished_run.recipe.run.model_copy(update={"folder": str(tmp_path / "runs")})
    return replace(finished_run, recipe=finished_run.recipe.model_copy(update={"run": run}), root=root)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with serving() as found:
        yield found


def said_of(run: FinishedRun, **changes: object) -> None:
    """Changes what the report says of the 8-bit file."""
    exports = tuple(
        replace(each, **changes) if each.format == INT8 else each  # type: ignore[arg-type]  # as the record names them
        for each in run.report.exports
    )
    (run.root / "report.json").write_text(render_json(replace(run.report, exports=exports)))


def test_the_run_left_a_card_beside_every_file_and_the_adapter(finished_run: FinishedRun) -> None:
    for place in ("adapter", "merged", "exports/peft_adapter", f"exports/{INT8}"):
        card = (finished_run.root / place / "README.md").read_text()
        head = yaml.safe_load(card.split("---\n")[1])
        assert head["model-index"][0]["results"][0]["metrics"][0]["type"] == "nats_per_label_token"
        assert str(finished_run.root.parent.parent) not in card


def test_a_parcel_holds_what_was_verified_and_a_card_for_its_repository(finished_run: FinishedRun) -> None:
    parcel = pack(finished_run.recipe, Asked(INT8, TO))
    export = next(each for each in finished_run.report.exports if each.format == INT8)
    assert set(parcel.files) == {*export.sha256, "README.md"}
    card = parcel.files["README.md"]
    assert isinstance(card, bytes)
    assert b'from_pretrained("me/tuned", dtype="auto")' in card
    assert str(finished_run.path.parent).encode() not in card
    assert b"/tmp/" not in card


def test_an_adapter_goes_out_without_the_local_path_of_its_base_and_loads_in_peft(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    parcel = pack(finished_run.recipe, Asked("peft_adapter", TO))
    for name, content in parcel.files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None
    named = pack(finished_run.recipe, Asked("peft_adapter", TO, base_on_hub="owner/base"))
    config, card = named.files["adapter_config.json"], named.files["README.md"]
    assert isinstance(config, bytes)
    assert isinstance(card, bytes)
    assert json.loads(config)["base_model_name_or_path"] == "owner/base"
    assert b'base_model: "owner/base"' in card
    base = AutoModelForCausalLM.from_pretrained(str(finished_run.recipe.base_model.path))
    with quiet_peft():
        model = PeftModel.from_pretrained(base, str(tmp_path))
    assert model.peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("changes", "message", "allowed"),
    [
        ({"verified": False, "status": "unverified"}, "not verified.*--even-if-unverified", {"even_unverified": True}),
        ({"status": "below_bar"}, "below the recipe's bar.*--even-if-below-bar", {"even_below_bar": True}),
    ],
)
def test_a_file_that_is_not_good_is_sent_only_when_told(
    own_run: FinishedRun, changes: dict[str, object], message: str, allowed: dict[str, bool]
) -> None:
    said_of(own_run, **changes)
    with pytest.raises(VerificationError, match=message):
        pack(own_run.recipe, Asked(INT8, TO))
    assert pack(own_run.recipe, Asked(INT8, TO, **allowed)).bytes > 0  # type: ignore[arg-type]  # flags by name


def test_a_file_that_was_changed_or_lost_since_is_never_sent(own_run: FinishedRun) -> None:
    place = own_run.root / "exports" / INT8
    (place / "config.json").write_text("{}")
    (place / "tokenizer.json").unlink()
    with pytest.raises(VerificationError) as told:
        pack(own_run.recipe, Asked(INT8, TO, even_unverified=True, even_below_bar=True))
    assert "config.json was changed since" in str(told.value)
    assert "tokenizer.json is missing" in str(told.value)


def test_what_is_not_there_is_named(own_run: FinishedRun) -> None:
    with pytest.raises(RunFolderError, match=r"no file 'gguf_q4_0'\. It has: peft_adapter, merged_16bit"):
        pack(own_run.recipe, Asked("gguf_q4_0", TO))
    with pytest.raises(HubError, match="owner/name"):
        pack(own_run.recipe, Asked(INT8, "tuned"))
    (own_run.root / "report.json").write_text("{}")
    with pytest.raises(RunFolderError, match="damaged or of another version"):
        pack(own_run.recipe, Asked(INT8, TO))
    (own_run.root / "report.json").unlink()
    with pytest.raises(RunFolderError, match="no report"):
        pack(own_run.recipe, Asked(INT8, TO))


def test_the_command_shows_first_and_sends_with_yes(finished_run: FinishedRun, stand_in: StandIn) -> None:
    def push(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "qlora_trainer",
                "push",
                str(finished_run.path),
                "--format",
                INT8,
                "--to",
                TO,
                *more,
            ],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "HF_ENDPOINT": stand_in.url,
                "HF_TOKEN": TOKEN,
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            },
        )

    shown = push()
    assert shown.returncode == 0, shown.stderr
    assert "Nothing was sent" in shown.stdout
    assert stand_in.calls == []
    sent = push("--yes")
    assert sent.returncode == 0, sent.stderr
    assert f"Sent: {stand_in.url}/{TO}" in sent.stdout
    assert stand_in.private == {TO: True}
    assert len(stand_in.commits) == 1
    weights = finished_run.root / "exports" / INT8 / "model.safetensors"
    assert stand_in.repositories[TO]["model.safetensors"] == weights.read_bytes()
    assert TOKEN not in sent.stdout + sent.stderr


def test_the_face_of_the_pipeline_sends(finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_trainer.runtime.hub.get_token", lambda: None)
    with pytest.raises(HubError, match="no login"):
        pipeline.push(pack(finished_run.recipe, Asked(INT8, TO)))
