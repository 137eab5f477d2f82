import json
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest

from scripts import compare_methods, plot_methods

ROW = {
    "method": "rtn_int8",
    "failed": None,
    "bytes": 2**20,
    "nats_per_token": {"value": 1.5, "interval": [1.4, 1.6]},
    "is_on_front": True,
}
LAYER = {"layer": "model.layers.0.mlp.down_proj", "magnitude": 61.5, "token_share": 0.2, "dimensions": [3]}
FOUND = {
    "model": "base",
    "rows": [ROW, {**ROW, "method": "nf4", "bytes": 2**19, "is_on_front": False}, {**ROW, "failed": "out of memory"}],
    "outliers": [LAYER, {**LAYER, "magnitude": 2.0, "dimensions": []}],
    "recommendation": {"method": "rtn_int8", "why": "words"},
}


def test_every_picture_is_drawn_from_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot_methods, "RESULTS", tmp_path)
    (tmp_path / "compare_tiny.json").write_text(json.dumps(FOUND))
    plot_methods.main()
    assert {path.name for path in tmp_path.glob("*.svg")} == {"affine.svg", "compare_tiny.svg", "outliers_tiny.svg"}
    texts = {
        path.stem: [node.text for node in fromstring(path.read_text()).iter() if node.text]
        for path in tmp_path.glob("*.svg")
    }
    # The worked example: 1.0 stands for 32, 0 for -32.
    assert {"-128", "-32", "32", "127", "S/2"} <= set(texts["affine"])
    assert {"rtn_int8", "nf4"} <= set(texts["compare_tiny"])
    assert "0.mlp.down_proj" in texts["outliers_tiny"]


def test_methods_that_failed_have_no_dot() -> None:
    circles = [node for node in plot_methods.front(FOUND, "tiny").iter() if node.tag.endswith("circle")]
    assert len(circles) == 2


def test_wikitext_becomes_rows_of_a_prompt_and_the_rest() -> None:
    words = [f"w{number}" for number in range(100)]
    text = f" = A heading = \n {' '.join(words)} \n too short \n"
    (row,) = compare_methods.paragraphs(text)
    assert row["prompt"].split() == words[:8]
    assert row["completion"].split() == words[8:80]
