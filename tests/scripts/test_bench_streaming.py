import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlora_trainer.formats.peft_adapter import read
from qlora_trainer.numerics.low_rank import delta_weight
from qlora_trainer.runtime.weight_files import read_tensors
from tests.models import tiny_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts/bench_streaming.py"
BLOCKS = 2


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bench_streaming", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_streaming"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_streaming"]


@pytest.fixture(scope="module")
def place(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A quantized checkpoint with its adapter."""
    place = bench.Place(tmp_path_factory.mktemp("checkpoint") / "tiny")
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    bench.write_base(place, bench.QUICK_SHAPE, blocks=BLOCKS, tokenizer=tokenizer)
    bench.write_factors(place, bench.QUICK_SHAPE, blocks=BLOCKS)
    bench.quantize_base(place)
    return place


def checkpoint(size: int, peak: int) -> dict[str, Any]:
    return {"blocks": size, "checkpoint_bytes": size * 10**9, "work": {"merge": {"peak_bytes": peak * 10**6}}}


def test_so_many_blocks_as_come_nearest_to_the_size(bench: ModuleType) -> None:
    block = 2 * (2 * 1024 * 1024 + 2 * 256 * 1024 + 3 * 1536 * 1024 + 2 * 1024)
    assert bench.blocks_for(1000, bench.SHAPE) == round(1e9 / block)
    assert bench.blocks_for(4000, bench.SHAPE) == round(4e9 / block)
    assert bench.blocks_for(0, bench.SHAPE) == 1


def test_every_linear_layer_has_an_adapter_of_about_a_hundredth_of_its_size(bench: ModuleType, place: Any) -> None:
    factors, settings = read(place.adapter)
    assert len(factors) == 7 * BLOCKS
    assert factors.keys() == place.layers().quantized.keys()
    for name, weight in read_tensors(place.base, [f"{module}.weight" for module in factors]):
        own = factors[name.removesuffix(".weight")]
        delta = delta_weight(own.lora_a, own.lora_b, scale=settings.scale)
        # Of random factors of rank 8: the share spreads by about 1 / sqrt(8 * 128) for the narrowest layer.
        assert delta.norm() / weight.float().norm() == pytest.approx(bench.DELTA_SHARE, rel=0.2)


def test_every_work_on_a_checkpoint_is_measured(bench: ModuleType, place: Any) -> None:
    for work in bench.WORK:
        found = bench.measured(work, place)
        # The kernel's two counters lag behind each other by some pages, and "imports only" does nothing in between.
        assert found["peak_bytes"] >= found["resident_before"] - 2**20 > 0, work
        made = place.folder / "file"
        assert made.exists() == (work not in ("imports only", "quantize to NF4")), work
        if made.exists():
            made.rename(place.folder / work.replace("/", " "))
    files = {work: place.folder / work / "model.safetensors" for work in bench.WORK if work.startswith("int4")}
    assert len({file.read_bytes() for file in files.values()}) == len(files) == 3, "each rung has other integers"


def test_growth_is_told_for_each_byte_of_the_checkpoint(bench: ModuleType) -> None:
    small, large = checkpoint(1, 500), checkpoint(4, 800)
    assert bench.growths(small, large) == {"merge": pytest.approx(0.1)}
    text = bench.table({"checkpoints": [small, large], "growth": bench.growths(small, large)})
    assert "500 MB = 50%" in text
    assert "800 MB = 20%" in text
    assert "1.60" in text
    assert "0.100" in text


@pytest.mark.parametrize(("peak", "is_refused"), [(900, False), (1000, True)])
def test_memory_that_grows_with_the_blocks_is_refused(
    peak: int, is_refused: bool, bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.15 bytes for each byte of the checkpoint are let pass: 450 MB for 3 GB."""
    out = tmp_path / "result.json"
    monkeypatch.setattr(bench, "measure", lambda *_: iter([[checkpoint(1, 500), checkpoint(4, peak)]]))
    monkeypatch.setattr(sys, "argv", ["bench_streaming.py", "--out", str(out), "--folder", str(tmp_path)])
    if is_refused:
        with pytest.raises(SystemExit, match="memory grows with the number of blocks: merge"):
            bench.main()
    else:
        bench.main()
    assert out.exists()


def test_a_process_that_fails_ends_the_bench_with_what_it_said(
    bench: ModuleType, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no room")
    monkeypatch.setattr(bench.subprocess, "run", lambda *_args, **_kwargs: failed)
    with pytest.raises(SystemExit, match=r"(?s)imports only.*failed:\nno room"):
        bench.in_own_process("imports only", place, threads=1)


def test_other_sizes_do_not_replace_the_committed_result(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_streaming.py", "--quick"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "give another file with --out" in capsys.readouterr().err
