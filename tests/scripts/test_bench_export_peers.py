import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.recipe import Rounding
from qlora_trainer.records import LinearLayers
from qlora_trainer.runners import transformers as runner
from qlora_trainer.stages import evaluate
from qlora_trainer.stages.export import ExportInputs
from tests.models import quantized_copy
from tests.stages.workbench import bench_for, export_inputs, random_rows, recipe_for, shake

SCRIPTS = Path(__file__).parents[2] / "scripts"


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    yield loaded("bench_export_peers", SCRIPTS / "bench_export_peers.py")
    del sys.modules["bench_export_peers"]


@pytest.fixture(scope="module")
def inputs(wide_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportInputs:
    folder = tmp_path_factory.mktemp("peers")
    # Enough tokens that no layer has fewer of them than inputs: GPTQ would fit those few alone.
    bench = bench_for(recipe_for(wide_llama_folder, folder, calibration={"rows": 64, "batch_size": 16}))
    adapter = bench.written_adapter(shake(bench.adapted()), folder / "adapter")
    made = export_inputs(bench, adapter, folder, rows=80)
    return replace(made, rounding=Rounding(learned_steps=8, scale_epochs=2, scale_learning_rate=2e-3))


@pytest.fixture(scope="module")
def case(script: ModuleType, inputs: ExportInputs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of random weights, its merged float32 folder, and six test rows."""
    rows = random_rows(6, seed=5)
    merged = tmp_path_factory.mktemp("merged") / "merged"
    merged.mkdir()
    for companion in ("config.json", "generation_config.json"):
        (merged / companion).write_text((inputs.base / companion).read_text())
    weights = {name: tensor.float().contiguous() for name, tensor in inputs.weights("dequantized")}
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    trained = runner.from_weights(inputs.base, weights.items(), dtype=torch.float32)
    teacher = evaluate.teach(trained, rows, tokens=1000, batch_size=3, pad_id=inputs.data.pad_id)
    recipe = recipe_for(inputs.base, merged.parent, evaluation={"batch_size": 3})
    return script.Case(recipe, inputs, merged, teacher, rows)


@pytest.fixture(scope="module")
def layers(inputs: ExportInputs) -> LinearLayers:
    return inputs.layers


def copy_in(weight_format: CompressedTensors, like: Path, folder: Path) -> Path:
    return quantized_copy(like, folder / "file", weight_format, dtype=torch.float32)


def test_peers_get_the_calibration_rows_without_padding(script: ModuleType, inputs: ExportInputs) -> None:
    job = script.job_of(inputs, 64)
    known = [list(row.token_ids) for row in inputs.data.rows]
    assert len(job["token_ids"]) == inputs.calibration.rows
    assert len({len(row) for row in job["token_ids"]}) > 1, "rows of one length would need no padding"
    assert all(row in known for row in job["token_ids"])
    assert len({tuple(row) for row in job["token_ids"]}) == inputs.calibration.rows, "no row stands twice"
    assert job["ignored"] == ["lm_head"]
    assert json.loads(json.dumps(job)) == job


@pytest.mark.parametrize("group", [32, 64])
def test_a_file_on_the_same_grid_is_accepted(
    group: int, script: ModuleType, wide_llama_folder: Path, layers: LinearLayers, tmp_path: Path
) -> None:
    script.require_same_grid(copy_in(CompressedTensors(4, group), wide_llama_folder, tmp_path), layers, group)


def without_a_layer(file: Path) -> None:
    weights = load_file(file / "model.safetensors")
    kept = {name: each for name, each in weights.items() if not name.startswith("model.layers.1.mlp.down_proj.")}
    save_file(kept, file / "model.safetensors", metadata={"format": "pt"})


def with_groups_of_its_own(file: Path) -> None:
    weights = load_file(file / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight_g_idx"] = torch.zeros(4, dtype=torch.int32)
    save_file(weights, file / "model.safetensors", metadata={"format": "pt"})


def with_scheme(**changes: object) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        config = json.loads((file / "config.json").read_text())
        scheme = config["quantization_config"]["config_groups"]["group_0"]
        for key, value in changes.items():
            (scheme if key in scheme else scheme["weights"])[key] = value
        (file / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without_a_layer, "1 layers have other grids, the first is model.layers.1.mlp.down_proj"),
        (with_groups_of_its_own, "weight_g_idx"),
        (with_scheme(symmetric=False), "'symmetric': False"),
        (with_scheme(num_bits=8), "'num_bits': 8"),
        (with_scheme(group_size=32), "'group_size': 32"),
        (with_scheme(input_activations={"num_bits": 8}), "activations"),
    ],
    ids=["layer", "g_idx", "asymmetric", "bits", "groups", "activations"],
)
def test_a_file_on_another_grid_is_refused(
    change: Callable[[Path], None],
    named: str,
    script: ModuleType,
    wide_llama_folder: Path,
    layers: LinearLayers,
    tmp_path: Path,
) -> None:
    file = copy_in(CompressedTensors(4, 64), wide_llama_folder, tmp_path)
    change(file)
    with pytest.raises(ValueError, match=named):
        script.require_same_grid(file, layers, 64)


def test_scales_of_another_group_size_than_the_config_tells_are_refused(
    script: ModuleType, wide_llama_folder: Path, layers: LinearLayers, tmp_path: Path
) -> None:
    file = copy_in(CompressedTensors(4, 32), wide_llama_folder, tmp_path)
    with_scheme(group_size=64)(file)
    with pytest.raises(ValueError, match="layers have other grids"):
        script.require_same_grid(file, layers, 64)


def test_our_methods_are_measured_as_files(script: ModuleType, case: Any, tmp_path: Path) -> None:
    rows = list(script.our_rows(case, 64, tmp_path / "ours"))
    assert [row["method"] for row in rows] == [script.NEAREST, script.GPTQ, script.LEARNED, script.TUNED]
    kl = {row["method"]: row["kl_to_trained"] for row in rows}
    assert len(set(kl.values())) == 4, "four methods, four files"
    assert kl[script.GPTQ] < kl[script.NEAREST]
    seconds = {row["method"]: row["seconds"] for row in rows}
    assert seconds[script.NEAREST] == 0
    assert seconds[script.TUNED] > seconds[script.LEARNED] > 0, "tuning comes on top of learning"
    assert all(0 < row["top1"] <= 1 and row["nats_per_token"] > 0 for row in rows)


PEER = """
import json, os, shutil, sys
from pathlib import Path
merged, job, made = sys.argv[1:]
job = json.loads(Path(job).read_text())
shutil.copytree({source!r}.format(group=job["group_size"]), made)
told = {{"file": made, "seconds": float(job["steps"]), "threads": int(os.environ["OMP_NUM_THREADS"]), "versions": {{}}}}
Path(made, "peer.json").write_text(json.dumps(told))
"""


@pytest.fixture
def nearest_as_peers(script: ModuleType, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that give the merged model rounded to nearest and say that each step took a second."""
    quantized_copy(case.merged, tmp_path / "nearest-64", CompressedTensors(4, 64), dtype=torch.float32)
    peer = tmp_path / "peer.py"
    peer.write_text(PEER.format(source=str(tmp_path / "nearest-{group}")))
    monkeypatch.setattr(script, "PEERS", dict.fromkeys(script.PEERS, (Path(sys.executable), peer)))


@pytest.mark.usefixtures("nearest_as_peers")
def test_peers_are_measured_like_ours(script: ModuleType, case: Any, tmp_path: Path) -> None:
    """A peer that rounds to nearest gets the very figures of our rounding to nearest."""
    ours = next(script.our_rows(case, 64, tmp_path / "ours"))
    rows = list(script.peer_rows(case, 64, tmp_path / "peers", threads=1))
    assert [row["method"] for row in rows] == [script.PEER_GPTQ, script.PEER_LEARNED, script.PEER_LEARNED_FLOAT32]
    for row in rows:
        assert row["kl_to_trained"] == pytest.approx(ours["kl_to_trained"], rel=0.05)  # its embeddings are float32
        assert row["seconds"] == case.inputs.rounding.learned_steps
    assert [row.get("seconds_of_warm_up") for row in rows] == [None, script.WARM_UP_STEPS, script.WARM_UP_STEPS]
    jobs = [json.loads(file.read_text()) for file in sorted((tmp_path / "peers").glob("*/job.json"))]
    assert sorted(str(job.get("amp")) for job in jobs) == ["False", "False", "None", "True", "True"]


@pytest.mark.usefixtures("nearest_as_peers")
def test_a_peer_with_other_threads_is_not_compared(
    script: ModuleType, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, peer = script.PEERS["AutoRound"]
    peer.write_text(peer.read_text().replace('int(os.environ["OMP_NUM_THREADS"])', "7"))
    with pytest.raises(ValueError, match="7 threads, not 1"):
        script.run_peer("AutoRound", case.merged, tmp_path / "place", script.job_of(case.inputs, 64), threads=1)


@pytest.mark.usefixtures("nearest_as_peers")
def test_a_peer_that_fails_says_why(script: ModuleType, case: Any, tmp_path: Path) -> None:
    _, peer = script.PEERS["AutoRound"]
    peer.write_text("raise ValueError('no such scheme')")
    with pytest.raises(SystemExit, match="no such scheme"):
        script.run_peer("AutoRound", case.merged, tmp_path / "place", {}, threads=1)


def row(method: str, *, kl: float, seconds: float, group: int = 64) -> dict[str, Any]:
    return {"group": group, "method": method, "kl_to_trained": kl, "seconds": seconds}


def test_verdicts_say_how_near_and_how_fast(script: ModuleType) -> None:
    rows = [
        row(script.GPTQ, kl=0.01, seconds=4.0),
        row(script.PEER_GPTQ, kl=0.02, seconds=10.0),
        row(script.LEARNED, kl=0.03, seconds=20.0),
        row(script.PEER_LEARNED, kl=0.02, seconds=10.0),
        row(script.GPTQ, kl=0.1, seconds=1.0, group=32),
    ]
    found = script.verdicts(rows)
    assert [(each["ours"], each["peer"]) for each in found] == [
        (script.GPTQ, script.PEER_GPTQ),
        (script.LEARNED, script.PEER_LEARNED),
    ]
    assert [each["kl_share"] for each in found] == pytest.approx([0.5, 1.5])
    assert [each["times_as_fast"] for each in found] == [2.5, 0.5]
    assert [each["is_at_least_as_good"] for each in found] == [True, False]


def test_missing_environments_are_named_with_the_mend(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PEERS", {"AutoRound": (tmp_path / "no-python", tmp_path / "peer.py")})
    monkeypatch.setattr(sys, "argv", ["bench_export_peers.py"])
    with pytest.raises(SystemExit, match=r"no-python: not there.*scripts/peer_environments"):
        script.main()


def test_autoround_gets_rows_of_one_length_and_learns_from_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("auto_round")
    vars(library).update(AutoRound=object, SignRoundConfig=object)
    monkeypatch.setitem(sys.modules, "auto_round", library)
    monkeypatch.setitem(sys.modules, "peer_autoround", ModuleType("peer_autoround"))
    peer = loaded("peer_autoround", SCRIPTS / "peers/autoround.py")
    rows = [[5, 6, 7], [8], [9, 10]]
    batches = peer.batches_of(rows, 2)
    assert {each["input_ids"].shape for each in batches} == {(1, 4)}
    for token_ids, batch in zip(rows, batches, strict=True):
        assert batch["input_ids"][batch["attention_mask"] == 1].tolist() == token_ids
        assert batch["attention_mask"][0, -1] == 0, "AutoRound leaves the last position out"
