import pytest
import torch

from qlora_trainer.runners import transformers as runner
from qlora_trainer.stages.compare import walking
from qlora_trainer.stages.compare.walking import walk
from tests.stages.compare.conftest import MakeInputs, calibration


def test_blocks_come_in_order_with_the_inputs_of_the_whole_model(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    model = runner.load(inputs.folder, dtype=torch.float32)
    seen: dict[str, list[torch.Tensor]] = {}
    for name in inputs.layers.quantized:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.setdefault(name, []).append(args[0])
        )
    with torch.no_grad():
        for batch in calibration():
            model(input_ids=batch.token_ids, use_cache=False)
    names = []
    for block in walk(inputs):
        names.append(block.name)
        for module, given in block.inputs.items():
            expected = torch.cat([part[batch.real] for part, batch in zip(seen[module], calibration(), strict=True)])
            assert torch.equal(given, expected)
    assert names == ["model.layers.0", "model.layers.1"]


def test_the_norms_and_their_readers_are_found(make_inputs: MakeInputs) -> None:
    for block in walk(make_inputs()):
        readers = {
            norm.removeprefix(f"{block.name}."): {module.rpartition(".")[2] for module in modules}
            for norm, modules in block.readers_by_norm.items()
        }
        assert readers == {
            "input_layernorm": {"q_proj", "k_proj", "v_proj"},
            "post_attention_layernorm": {"gate_proj", "up_proj"},
        }


def test_of_many_tokens_every_second_is_held(make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = next(iter(walk(make_inputs()))).inputs
    monkeypatch.setattr(walking, "MOST_TOKENS", 70)
    part = next(iter(walk(make_inputs()))).inputs
    # Three batches of 42 real tokens.
    assert {len(given) for given in whole.values()} == {126}
    for module, given in part.items():
        assert torch.equal(given, torch.cat([batch[::2] for batch in whole[module].split(42)]))
