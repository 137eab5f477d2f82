"""Where the weights of a model lie that may be larger than the GPU's memory: as many as fit there, the rest outside.

Training needs none of this, its base has 4 bits. But the 16-bit base, the merged model and the weights that a file is
compared with are measured too. Weights outside visit the GPU one layer at a time during a forward (accelerate's hooks),
so that a measurement takes longer and nothing else changes. On a CPU everything lies in one place anyway.
"""

import logging
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn

logger = logging.getLogger(__name__)

WHOLE_SHARE = 0.9
"""Weights up to this share of the free memory stay on the GPU as a whole."""
HELD_SHARE = 0.6
"""Share of the free memory that weights take where they do not fit: activations, logits and a visiting layer need the
rest."""


def place_for(weight_bytes: int, device: torch.device) -> torch.device:
    """Where a model is loaded: on the device itself where it fits, else in the machine's memory.

    Args:
        weight_bytes: of all weights, as they are in memory after loading.
        device: that work is done on.
    """
    if device.type != "cuda" or weight_bytes <= WHOLE_SHARE * _free_bytes(device):
        return device
    return torch.device("cpu")


def spread(model: nn.Module, device: torch.device) -> nn.Module:
    """Changes a model in the machine's memory so that it runs on ``device``, and gives it back.

    Args:
        model: whole, on the CPU, in evaluation mode.
        device: a CUDA device whose memory is smaller than the model.
    """
    free = _free_bytes(device)
    placed = device_map(model, held_bytes=int(HELD_SHARE * free))
    outside = sum(1 for place in placed.values() if place == "cpu")
    logger.info("%d of %d parts of the model stay in the machine's memory", outside, len(placed))
    spread_out: nn.Module = dispatch_model(model, device_map=placed, main_device=device)
    return spread_out


def device_map(model: nn.Module, *, held_bytes: int) -> dict[str, int | str]:
    """Where each part of a model goes: the first ones to GPU 0 until its share is full, the others to ``cpu``.

    Args:
        model: its decoder blocks stay whole, as the architecture asks for.
        held_bytes: of weights on the GPU.
    """
    door: Any = model
    whole = list(door._no_split_modules or [])
    limits: dict[int | str, int] = {0: held_bytes, "cpu": 1 << 62}
    found: dict[str, int | str] = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=whole)
    return found


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
