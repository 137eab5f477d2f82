"""What every section of a recipe is, and the kinds of values that several have."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

FloatType = Literal["float32", "bfloat16", "float16"]

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def bytes_of(size: str) -> int:
    """Bytes of an amount of memory: ``24GiB``, ``24 GB``, ``1.5GiB``, ``512MiB``.

    Raises:
        ValueError: it is not written like that, or is nothing.
    """
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", size.strip())
    count = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if not count:
        raise ValueError(f"is not an amount of memory: {size!r}. Write a number and one of {', '.join(UNITS)}: 24GiB")
    return count


def _is_size(size: str) -> str:
    bytes_of(size)
    return size


MemorySize = Annotated[str, AfterValidator(_is_size)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )
