from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest

from qlora_trainer.stages.compare import write
from scripts import compare_methods, plot_methods
from tests.stages.compare.compared import COMPARISON


def test_every_picture_is_drawn_from_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot_methods, "RESULTS", tmp_path)
    write(COMPARISON, tmp_path)
    (tmp_path / "compare.json").rename(tmp_path / "compare_tiny.json")
    plot_methods.main()
    assert {path.name for path in tmp_path.glob("*.svg")} == {"affine.svg", "compare_tiny.svg", "outliers_tiny.svg"}
    texts = {
        path.stem: [node.text for node in fromstring(path.read_text()).iter() if node.text]
        for path in tmp_path.glob("*.svg")
    }
    # The worked example: 1.0 stands for 32, 0 for -32.
    assert {"-128", "-32", "32", "127", "S/2"} <= set(texts["affine"])
    assert {"rtn_int8", "nf4"} <= set(texts["compare_tiny"])
    assert "awq_int4" not in texts["compare_tiny"]
    assert {"mlp.down_proj", "61.5"} <= set(texts["outliers_tiny"])


def test_wikitext_becomes_rows_of_a_prompt_and_the_rest() -> None:
    words = [f"w{number}" for number in range(100)]
    text = f" = A heading = \n {' '.join(words)} \n too short \n"
    (row,) = compare_methods.paragraphs(text)
    assert row["prompt"].split() == words[:8]
    assert row["completion"].split() == words[8:80]
