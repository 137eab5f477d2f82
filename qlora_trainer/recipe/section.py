"""What every section of a recipe is, and the kinds of values that several have."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FloatType = Literal["float32", "bfloat16", "float16"]

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
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
