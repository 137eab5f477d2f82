"""Integer weights in GPTQ's checkpoint layout: qweight, qzeros, scales and g_idx, as GPTQModel and vLLM read it.

The layout is that of the GPTQ paper's code (arXiv 2210.17323), in its first version, where a zero point is stored less
one. Any rounding method can fill it: the name is the layout's, not that of how the integers were chosen. Only symmetric
grids are written, and inputs stay in their order.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Granularity, Grid, dequantize
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, round_to_nearest

GROUP_SIZES = (32, 64, 128)
WORD_BITS = 32

_INSIDE_A_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Gptq:
    """Symmetric integers in GPTQ's layout; an ``IntegerFormat``.

    Attributes:
        bits: 4 or 8.
        group_size: consecutive inputs that share a scale: 32, 64 or 128; None = one scale per output.
        quantized: names of the quantized modules, to be given where some linear layer of a block is not; transformers
            wants the list of those that are.

    Raises:
        ValueError: a group size that the runtimes' kernels do not know.
    """

    bits: Literal[4, 8]
    group_size: int | None
    quantized: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size must be one of {GROUP_SIZES} or None (one scale per output), got {self.group_size}"
            )

    @property
    def name(self) -> str:
        """Name of the format, as in the recipe."""
        suffix = "" if self.group_size is None else f"_g{self.group_size}"
        return f"gptq_w{self.bits}{suffix}"

    @property
    def spec(self) -> GridSpec:
        """Symmetric grids with float16 scales, the type of the layout."""
        granularity: Granularity = "channel" if self.group_size is None else self.group_size
        return GridSpec(bits=self.bits, granularity=granularity, scale_dtype=torch.float16)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for ``weight``, rounded to nearest; see ``pack``.

        Raises:
            ValueError: words or groups do not divide the shape, or a value is not finite or too large for the scales.
        """
        self._require_fitting(weight.shape)
        return self.pack(round_to_nearest(weight, self.spec))

    def pack(self, weight: IntegerWeight) -> dict[str, Tensor]:
        """The tensors that stand for integers on a symmetric grid.

        Returns:
            ``qweight``: int32 of shape ``(in_features * bits / 32, out_features)``, consecutive inputs in a word, the
            first in its lowest bits. ``qzeros``: int32 of shape ``(groups, out_features * bits / 32)``, consecutive
            outputs in a word. ``scales``: float16 of shape ``(groups, out_features)``. ``g_idx``: int32 of shape
            ``(in_features,)``, the group of each input.

        Raises:
            ValueError: words or groups do not divide the shape, or the grid is none of ``spec``.
        """
        self._require_fitting(weight.codes.shape)
        self._require_own(weight.grid, weight.codes.shape)
        half = 2 ** (self.bits - 1)
        groups = weight.grid.scale.shape[1]
        outputs, inputs = weight.codes.shape
        zeros = torch.full((groups, outputs), half - 1, dtype=torch.int32, device=weight.codes.device)
        return {
            "qweight": _packed(weight.codes.T.int() + half, self.bits),
            "qzeros": _packed(zeros.T, self.bits).T.contiguous(),
            "scales": weight.grid.scale.T.to(torch.float16).contiguous(),
            "g_idx": torch.arange(inputs, dtype=torch.int32, device=weight.codes.device) // (inputs // groups),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight in float32: the exact product of integer and float16 scale.

        Rounded to float16 it is what GPTQModel's dequantizing kernels multiply by, bit for bit. Its int4 kernel on CPUs
        rounds scales and inputs to bfloat16, whatever type the model is loaded in, so that logits differ by that.

        Raises:
            ValueError: inputs are not in their order (``desc_act``), or zero points are not those of symmetric grids.
        """
        scale = tensors["scales"].T.float()
        half = 2 ** (self.bits - 1)
        codes = (_unpacked(tensors["qweight"], self.bits) - half).to(torch.int8).T
        groups, inputs = scale.shape[1], codes.shape[1]
        if not torch.equal(tensors["g_idx"].cpu(), torch.arange(inputs, dtype=torch.int32) // (inputs // groups)):
            raise ValueError("g_idx does not count groups of consecutive inputs; files with desc_act are not read")
        if bool((_unpacked(tensors["qzeros"].T, self.bits) != half - 1).any()):
            raise ValueError(f"qzeros are not {half - 1} throughout; files with sym: false are not read")
        grid = Grid(scale=scale, zero_point=torch.zeros_like(scale, dtype=torch.int32), bits=self.bits)
        return dequantize(codes, grid)

    def config(self, ignored: Sequence[str]) -> dict[str, object]:
        """The ``quantization_config`` of config.json, as transformers, GPTQModel and vLLM read it.

        Raises:
            ValueError: a linear layer within a block is ignored, and ``quantized`` was not given.
        """
        described: dict[str, object] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": self.bits,
            "group_size": -1 if self.group_size is None else self.group_size,
            "sym": True,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
        }
        inside = [name for name in ignored if _INSIDE_A_BLOCK.search(name)]
        if self.quantized is None and inside:
            raise ValueError(
                f"{', '.join(inside)}: a GPTQ file that leaves layers of a block in 16 bit must list those that it "
                "quantizes; give Gptq(quantized=...)"
            )
        if self.quantized is not None:
            # transformers (through optimum) reads the list, GPTQModel and vLLM read the patterns.
            described["modules_in_block_to_quantize"] = [sorted(self.quantized)]
            described["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in inside}
        return described

    def of(self, module: str) -> "Gptq":
        """Itself: every matrix is stored alike."""
        return self

    def _require_fitting(self, shape: torch.Size) -> None:
        """Refuses matrices that words or groups do not divide."""
        if len(shape) != 2:
            raise ValueError(f"want a matrix (out_features, in_features), got shape {tuple(shape)}")
        outputs, inputs = shape
        per_word = WORD_BITS // self.bits
        whole = f"a weight of shape {tuple(shape)}"
        if outputs % per_word or inputs % per_word:
            raise ValueError(
                f"{self.name} packs {per_word} inputs or outputs into a word, which do not divide {whole}; "
                "compressed_tensors_w8a16 fits every shape"
            )
        if self.group_size is not None and inputs % self.group_size:
            fitting = [size for size in GROUP_SIZES if inputs % size == 0]
            raise ValueError(
                f"groups of {self.group_size} do not divide the {inputs} inputs of {whole}; group sizes that do: "
                f"{', '.join(map(str, fitting)) or 'none'}. compressed_tensors_w8a16 fits every shape"
            )

    def _require_own(self, grid: Grid, shape: torch.Size) -> None:
        """Refuses grids that the layout would change in silence."""
        outputs, inputs = shape
        wanted = (outputs, 1 if self.group_size is None else inputs // self.group_size)
        if grid.bits != self.bits or tuple(grid.scale.shape) != wanted:
            raise ValueError(
                f"a grid of {grid.bits} bits and scales of shape {tuple(grid.scale.shape)} is none of {self.name}, "
                f"which has {self.bits} bits and scales of shape {wanted} here; fit it to the format's spec"
            )
        if bool((grid.zero_point != 0).any()):
            raise ValueError(f"{self.name} is symmetric, the grid has zero points other than 0; fit it to the spec")
        if not torch.equal(grid.scale.to(torch.float16).float(), grid.scale.float()):
            raise ValueError("float16 does not hold the scales exactly; round them before the integers are chosen")


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Non-negative int32 codes of shape ``(n, columns)`` as int32 words of shape ``(n * bits / 32, columns)``."""
    per_word = WORD_BITS // bits
    parts = codes.reshape(-1, per_word, codes.shape[1]).long()
    places = bits * torch.arange(per_word, device=codes.device).view(1, -1, 1)
    # The conversion keeps the lower 32 bits, so that a word whose highest bit is set becomes a negative number.
    return (parts << places).sum(dim=1).to(torch.int32)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The inverse of ``_packed``: int32."""
    places = bits * torch.arange(WORD_BITS // bits, dtype=torch.int32, device=words.device).view(1, -1, 1)
    codes: Tensor = (words.unsqueeze(1) >> places) & (2**bits - 1)
    return codes.reshape(-1, words.shape[1])
