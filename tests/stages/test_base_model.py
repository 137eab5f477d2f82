import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from qlora_trainer.errors import BaseModelError
from qlora_trainer.recipe import BaseModelSource
from qlora_trainer.stages.base_model import content_key, resolve
from tests.models import tiny_llama


def source(folder: Path) -> BaseModelSource:
    return BaseModelSource(path=str(folder))


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "base")


def test_a_whole_folder_is_counted_without_reading_a_tensor(base: Path) -> None:
    found = resolve(source(base))
    # Two layers of q, k, v, o (64 x 64 and 32 x 64 twice) and 3 x 64 x 128; five norms; embedding and head.
    assert found.parameters == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + 5 * 64 + 2 * 320 * 64
    assert found.bytes == (base / "model.safetensors").stat().st_size


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="there is no folder"):
        resolve(source(tmp_path / "nowhere"))


def test_all_problems_of_a_folder_come_at_once(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    change_config(base, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(BaseModelError) as caught:
        resolve(source(base))
    text = str(caught.value)
    assert "no tokenizer.json" in text
    assert "pickle" in text
    assert "LlamaForSequenceClassification" in text


def test_a_truncated_shard_is_refused(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        resolve(source(base))


def test_a_quantized_base_is_refused(base: Path) -> None:
    change_config(base, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(BaseModelError, match="quantized already"):
        resolve(source(base))


def test_code_of_the_model_needs_the_flag_of_the_command_line(base: Path) -> None:
    change_config(base, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(BaseModelError, match="--trust-remote-code"):
        resolve(source(base))
    assert resolve(source(base), trust_remote_code=True).parameters > 0


def test_the_content_key_follows_the_content_and_not_the_place(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    assert content_key(resolve(source(copy))) == content_key(resolve(source(base)))
    change_config(copy, rms_norm_eps=1e-6)
    assert content_key(resolve(source(copy))) != content_key(resolve(source(base)))


def test_a_name_is_fetched_from_the_hub_at_its_revision(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith((".bin", ".pt")) for pattern in allow_patterns)
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve(BaseModelSource(name="owner/model", revision="abc")).folder == base
    assert asked == [("owner/model", "abc")]


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_names: str, **_options: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(BaseModelError, match="cannot be reached"):
        resolve(BaseModelSource(name="owner/model"))


def test_a_model_that_sees_images_is_refused_with_the_way_to_its_text_part(base: Path) -> None:
    change_config(base, architectures=["Gemma3ForConditionalGeneration"], text_config={})
    with pytest.raises(BaseModelError, match="recipes show gemma3_4b_16gb"):
        resolve(source(base))
