"""vLLM's reading of our files; needs a CUDA device and vllm 0.33, which has an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.formats.gptq import Gptq
from qlora_trainer.formats.model_folder import read_model
from qlora_trainer.formats.weight_format import WeightFormat
from qlora_trainer.numerics.loss import IGNORE_INDEX, nats_by_row
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.causal_lm import label_logits
from tests.models import linear_names, quantized_copy, random_token_ids, tiny_llama

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not PYTHON.is_file(), reason="needs .venv-vllm; qlora_trainer/runners/vllm.py says how to make it"
    ),
]

SCRIPT = """
import json, sys
from pathlib import Path
from qlora_trainer.runners.vllm import load
folder, rows, labels, out = sys.argv[1:]
model = load(Path(folder), max_tokens=64, memory_share=0.3)
rows = json.loads(rows)
found = {
    "nats": model.row_nats(rows, json.loads(labels)),
    "greedy": model.generate_greedy([row[:8] for row in rows], max_new_tokens=8, stop_ids=[]),
}
Path(out).write_text(json.dumps(found))
"""

FORMATS: list[WeightFormat] = [
    CompressedTensors(4, 128),
    CompressedTensors(8, None),
    CompressedTensors(8, None, activation_bits=8),
    Gptq(4, 128),
    Gptq(8, None),
]


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda weight_format: weight_format.name)
def test_vllm_scores_a_file_as_our_decoding_does(weight_format: WeightFormat, tmp_path: Path) -> None:
    # Heads of 64, the smallest that vLLM's attention kernels know.
    like = tiny_llama(tmp_path / "llama", hidden_size=256)
    folder = quantized_copy(like, tmp_path / "model", weight_format, dtype=torch.bfloat16)
    linears = linear_names(runner.skeleton(folder).state_dict())
    reference = runner.from_weights(
        folder, read_model(folder, weight_format, linear_modules=linears), dtype=torch.float32
    )
    if weight_format.name == "compressed_tensors_w8a8":
        reference = runner.with_dynamic_activations(reference, linears)
    rows = random_token_ids()
    labels = rows.clone()
    labels[:, :12] = IGNORE_INDEX
    with torch.no_grad():
        device = next(reference.parameters()).device
        wanted = nats_by_row(*label_logits(reference, rows.to(device), labels.to(device))).tolist()
    out = tmp_path / "found.json"
    arguments = [str(folder), json.dumps(rows.tolist()), json.dumps(labels.tolist()), str(out)]
    subprocess.run(
        [PYTHON, "-c", SCRIPT, *arguments], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=600
    )
    found = json.loads(out.read_text())
    # 12 labels a row; bfloat16 has steps of 2**-8 of a value, and these logits reach about 4. Not yet run on a device.
    assert found["nats"] == pytest.approx(wanted, abs=12 * 4 * 2**-8)
    assert [len(row) for row in found["greedy"]] == [8, 8]
