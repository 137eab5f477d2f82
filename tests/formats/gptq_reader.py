"""Loads GPTQ folders by stock transformers with GPTQModel and saves their logits; run by .venv-gptq's Python.

Arguments: a JSON list of cases ``{folder, dtype, backend}`` (backend null = the library's own choice), a JSON list of
token ids by row, and the file that the logits go to, named by the case's place, as float32.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTQConfig

torch.set_num_threads(1)
found = {}
for place, case in enumerate(json.loads(sys.argv[1])):
    settings = {}
    if case["backend"] is not None:
        settings["quantization_config"] = GPTQConfig(bits=case["bits"], backend=case["backend"])
    model = AutoModelForCausalLM.from_pretrained(
        case["folder"], dtype=getattr(torch, case["dtype"]), device_map="cpu", **settings
    ).eval()
    with torch.no_grad():
        found[str(place)] = model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits.float()
    found[f"{place}.quantized"] = torch.tensor(sum("qweight" in name for name in model.state_dict()))
save_file(found, sys.argv[3])
