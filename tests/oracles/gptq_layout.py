"""GPTQ's checkpoint layout restated bit by bit: numbers written as text, 32 binary digits to a word."""


def words(values: list[int], bits: int) -> list[int]:
    """Consecutive values as signed 32-bit words, the first value in the last digits of its word."""
    per_word = 32 // bits
    packed = []
    for start in range(0, len(values), per_word):
        digits = "".join(format(value, f"0{bits}b") for value in reversed(values[start : start + per_word]))
        number = int(digits, 2)
        packed.append(number - 2**32 if digits[0] == "1" else number)
    return packed


def qweight(codes: list[list[int]], bits: int) -> list[list[int]]:
    """Unsigned codes by output and input, as words by place among the inputs and output."""
    by_output = [words(row, bits) for row in codes]
    return [[row[place] for row in by_output] for place in range(len(by_output[0]))]


def qzeros(zero_points: list[list[int]], bits: int) -> list[list[int]]:
    """Unsigned zero points by group and output, stored less one (the first version of the layout)."""
    return [words([zero_point - 1 for zero_point in row], bits) for row in zero_points]


def weight(code: int, zero_point: int, scale: float) -> float:
    """``scale * (q - z)``."""
    return scale * (code - zero_point)
