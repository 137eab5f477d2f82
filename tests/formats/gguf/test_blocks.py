import numpy
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize
from torch import Tensor

from qlora_trainer.formats.gguf.blocks import GgufBlocks, GgufKind
from qlora_trainer.numerics.affine import Grid, integer_range
from qlora_trainer.numerics.integer_weight import IntegerWeight, round_to_nearest
from tests.oracles import ggml_blocks as oracle

QUANTIZED: tuple[GgufKind, ...] = ("q8_0", "q5_0", "q5_1", "q4_0", "q4_1")
each_quantized = pytest.mark.parametrize("kind", QUANTIZED)

F16_EPS = torch.finfo(torch.float16).eps
F32_EPS = torch.finfo(torch.float32).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full_range(kind: GgufKind, *, rows: int = 3, blocks: int = 2) -> IntegerWeight:
    """Every code of the type, and scales that include float16's subnormal and largest numbers."""
    spec = GgufBlocks(kind).spec
    smallest, largest = integer_range(spec.bits)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(smallest, largest + 1, (rows, 32 * blocks), generator=generator, dtype=torch.int8)
    codes.flatten()[0], codes.flatten()[1] = smallest, largest
    scale = torch.rand(rows, blocks, generator=generator).half().float() + 0.0
    scale[0, 0], scale[1, 0] = 2.0**-24, 65504.0
    zero_point = torch.zeros(rows, blocks, dtype=torch.int32)
    if spec.offset == "minimum":
        minimum = torch.randn(rows, blocks, generator=generator).half().double()
        return IntegerWeight(codes, Grid(scale, smallest - minimum / scale.double(), spec.bits))
    return IntegerWeight(codes, Grid(scale, zero_point, spec.bits))


def blocks_of(kind: GgufKind, stored: Tensor) -> list[bytes]:
    size = oracle.BYTES[kind]
    return [bytes(block.tolist()) for block in stored.reshape(-1, size)]


@each_quantized
def test_the_library_dequantizes_the_packed_bytes_to_the_same_bits(kind: GgufKind) -> None:
    blocks = GgufBlocks(kind)
    for weight in (round_to_nearest(normal(6, 96), blocks.spec), full_range(kind)):
        packed = blocks.pack(weight)
        theirs = dequantize(packed["weight"].numpy(), blocks.ggml_type)
        assert numpy.array_equal(blocks.decode(packed).numpy(), theirs)


@each_quantized
def test_packed_bytes_hold_our_codes_and_constants_where_ggml_looks_for_them(kind: GgufKind) -> None:
    weight = full_range(kind)
    smallest, _ = integer_range(weight.grid.bits)
    read = [oracle.read_block(kind, data) for data in blocks_of(kind, GgufBlocks(kind).pack(weight)["weight"])]
    shift = 0 if kind == "q8_0" else smallest
    assert [code + shift for block in read for code in block.codes] == weight.codes.flatten().tolist()
    assert [block.step for block in read] == weight.grid.scale.flatten().tolist()
    if kind.endswith("_1"):
        minimum = weight.grid.scale.double() * (smallest - weight.grid.zero_point)
        assert [block.minimum for block in read] == minimum.half().double().flatten().tolist()


@each_quantized
def test_decoding_is_the_layouts_formula(kind: GgufKind) -> None:
    blocks = GgufBlocks(kind)
    packed = blocks.encode(normal(4, 64, seed=2))
    expected = torch.tensor([oracle.values(kind, data) for data in blocks_of(kind, packed["weight"])])
    # One product and at most one sum in float32; with a minimum the terms may cancel.
    torch.testing.assert_close(blocks.decode(packed).reshape(-1, 32), expected, rtol=F32_EPS, atol=8 * F32_EPS)


@each_quantized
def test_decoding_gives_the_reals_of_the_integers(kind: GgufKind) -> None:
    blocks = GgufBlocks(kind)
    weight = round_to_nearest(normal(5, 64, seed=3), blocks.spec)
    decoded = blocks.decode(blocks.pack(weight))
    if kind.endswith("_0"):
        assert torch.equal(decoded, weight.dequantized())
    else:
        # d q + m against d (q - z): rounded at other places, at the size of the minimum (at most 4 here).
        torch.testing.assert_close(decoded, weight.dequantized(), rtol=0, atol=8 * F32_EPS)


@each_quantized
def test_every_value_is_within_half_a_step(kind: GgufKind) -> None:
    blocks = GgufBlocks(kind)
    weight = normal(8, 64, seed=4)
    error = (blocks.decode(blocks.encode(weight)) - weight).abs().reshape(8, 2, 32).amax(dim=-1)
    values = weight.reshape(8, 2, 32)
    steps = 2**blocks.bits - 1
    span = values.amax(-1) - values.amin(-1) if kind.endswith("_1") else 2 * values.abs().amax(-1)
    # The step and the minimum are rounded to float16: a step is off by eps / 2 of itself, over up to 255 steps.
    limit = span / steps / 2 + span * F16_EPS + values.abs().amax(-1) * F16_EPS
    assert bool((error <= limit).all())
    assert bool((error > span / steps / 8).any())


@each_quantized
def test_rows_take_the_bytes_that_the_library_says(kind: GgufKind) -> None:
    blocks = GgufBlocks(kind)
    block_size, type_size = GGML_QUANT_SIZES[blocks.ggml_type]
    assert blocks.row_bytes(96) == 96 // block_size * type_size
    assert blocks.encode(normal(2, 96))["weight"].shape == (2, blocks.row_bytes(96))


def test_f16_is_the_weight_rounded_to_half_precision() -> None:
    weight = normal(3, 20)
    blocks = GgufBlocks("f16")
    assert torch.equal(blocks.decode(blocks.encode(weight)), weight.half().float())


@each_quantized
def test_rows_that_blocks_do_not_divide_are_refused_with_the_mend(kind: GgufKind) -> None:
    with pytest.raises(ValueError, match=r"172 inputs\. .*export\.allow_16bit_layers: true.* gguf_f16"):
        GgufBlocks(kind).encode(normal(2, 172))


def test_a_value_beyond_float16_is_refused_with_the_value() -> None:
    weight = normal(2, 32)
    weight[1, 3] = -70000.0
    with pytest.raises(ValueError, match=r"1 of 64 values are not finite in float16.*70000"):
        GgufBlocks("f16").encode(weight)


@pytest.mark.parametrize("kind", ["q8_0", "q4_1"])
def test_a_scale_that_is_no_float16_number_is_refused(kind: GgufKind) -> None:
    weight = full_range(kind)
    weight.grid.scale[2, 1] = 0.1
    with pytest.raises(ValueError, match=r"1 of 6 scales are no float16 numbers, such as 0\.1"):
        GgufBlocks(kind).pack(weight)


def test_a_minimum_that_is_no_float16_number_is_refused() -> None:
    weight = round_to_nearest(normal(2, 32), GgufBlocks("q4_1").spec)
    weight.grid.zero_point[0, 0] += 0.01
    with pytest.raises(ValueError, match="1 of 2 minima are no float16 numbers"):
        GgufBlocks("q4_1").pack(weight)


def test_zero_points_have_no_place_in_a_symmetric_format() -> None:
    weight = full_range("q4_0")
    weight.grid.zero_point[0, 0] = 1
    with pytest.raises(ValueError, match="no zero points"):
        GgufBlocks("q4_0").pack(weight)


def test_integers_of_other_bits_or_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="4-bit integers with a scale for each 32 inputs; got 8 bits"):
        GgufBlocks("q4_0").pack(full_range("q8_0"))


def test_integers_are_not_for_f16() -> None:
    with pytest.raises(ValueError, match="holds no integers"):
        GgufBlocks("f16").pack(full_range("q8_0"))


def test_raised_modules_are_stored_in_8_bits() -> None:
    mixed = GgufBlocks("q4_0", raised=frozenset({"a"}))
    assert (mixed.of("a").kind, mixed.of("b").kind, mixed.name) == ("q8_0", "q4_0", "gguf_q4_0")
