from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_trainer.runtime.record_paths import RUN, from_folder, in_folder


@dataclass(frozen=True)
class Inner:
    folder: Path
    nats: tuple[float, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    places: dict[str, Path]
    parts: tuple[Inner, ...]
    note: str
    nothing: Path | None = None


@pytest.mark.parametrize("root", [Path("runs/one"), Path("/srv/runs/one")])
def test_a_record_follows_its_run(root: Path) -> None:
    def record(folder: Path) -> Outer:
        inner = Inner(folder / "adapter", (1.0, 2.0))
        return Outer(inner, {"base": Path("/models/base"), "merged": folder / "merged"}, (inner,), f"{root}/adapter")

    told = from_folder(record(root), root)
    assert told == record(RUN)
    assert told.places["base"] == Path("/models/base"), "what lies elsewhere is not of the run"
    for place in (root, Path("/elsewhere/two")):
        assert in_folder(told, place) == record(place)
