"""GGML's plain block layouts restated byte by byte, from ggml-common.h (``block_q4_0`` ... ``block_q8_0``)
and the loops of ``dequantize_row_q*`` in ggml-quants.c."""

import struct
from dataclasses import dataclass

BLOCK = 32
BYTES = {"q8_0": 34, "q5_0": 22, "q5_1": 24, "q4_0": 18, "q4_1": 20}


@dataclass(frozen=True)
class Block:
    """Codes as the file holds them, unsigned but for q8_0."""

    step: float
    minimum: float
    codes: list[int]


def read_block(kind: str, data: bytes) -> Block:
    """``{half d; [half m;] [uint8 qh[4];] uint8 qs[16] | int8 qs[32]}``."""
    assert len(data) == BYTES[kind]
    (step,) = struct.unpack_from("<e", data, 0)
    if kind == "q8_0":
        return Block(step, 0.0, list(struct.unpack_from("<32b", data, 2)))
    at = 2
    minimum = 0.0
    if kind.endswith("_1"):
        (minimum,) = struct.unpack_from("<e", data, at)
        at += 2
    high = 0
    if kind.startswith("q5"):
        (high,) = struct.unpack_from("<I", data, at)
        at += 4
    codes = [0] * BLOCK
    for place in range(16):
        byte = data[at + place]
        codes[place] = (byte & 0x0F) | (((high >> place) & 1) << 4)
        codes[place + 16] = (byte >> 4) | (((high >> (place + 16)) & 1) << 4)
    return Block(step, minimum, codes)


def values(kind: str, data: bytes) -> list[float]:
    """``d (q - 8)``, ``d (q - 16)``, ``d q + m`` or ``d q``, in double precision."""
    block = read_block(kind, data)
    shift = {"q4_0": 8, "q5_0": 16}.get(kind, 0)
    return [block.step * (code - shift) + block.minimum for code in block.codes]
