"""The model: where it lies, how it is stored while adapters train, what the adapters are."""

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_trainer.recipe.section import Names, PositiveInt, Section, Share

BitsandbytesType = Literal["nf4", "fp4", "int8"]
DataType = Literal["nf4", "fp4", "int8", "gptq_int4", "none"]
GroupSize = Literal[32, 64, 128]
WITH_ABSMAX = ("nf4", "fp4")
NO_ABSMAX = {
    "int8": "one float scale per row",
    "gptq_int4": "one bfloat16 scale per group",
    "none": "nothing is quantized",
}


class BaseModelSource(Section):
    """The 16-bit model to start from: a local folder or a name on the Hugging Face hub."""

    path: str | None = None
    """Local folder in Hugging Face layout (config.json, tokenizer.json, *.safetensors)."""
    name: str | None = None
    """Name on the hub, ``owner/model``."""
    revision: str | None = None
    """Commit, branch or tag on the hub; only with ``name``. A commit makes the run repeatable."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError("give exactly one of 'path' (a local folder) and 'name' (owner/model on the hub)")
        if self.revision is not None and self.name is None:
            raise ValueError("'revision' belongs to 'name' (a hub model); a local 'path' has no revision")
        return self


class Quantization(Section):
    """How the frozen base is stored while adapters train on it (QLoRA, arXiv 2305.14314, section 3)."""

    data_type: DataType = "nf4"
    """``nf4`` or ``fp4`` (4 bits, one absmax per block of 64), ``int8`` (LLM.int8, one scale per row), ``gptq_int4``
    (integers that GPTQ, arXiv 2210.17323, chooses on ``calibration.rows`` training rows; a bfloat16 scale per group) or
    ``none``: nothing is quantized (plain LoRA), the base is held in ``compute_dtype``."""
    double_quant: bool | None = None
    """Quantize the absmax constants too (``nf4`` and ``fp4``: 0.5 -> 0.127 bit per parameter). Absent = true for
    these; the other types have no absmax constants."""
    group_size: GroupSize | None = None
    """``gptq_int4``: consecutive inputs that share a scale. Absent = 64; the other types have no such groups."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations and matrix products, and of what is not quantized; adapters are float32 either way."""
    cache_folder: str = "runs/quantized_bases"
    """Quantized bases are kept here and reused, keyed by the content of the weights and these settings (``gptq_int4``:
    and of the calibration rows). ``none`` writes nothing there, except with ``lora.init: pissa``."""

    @model_validator(mode="after")
    def _constants_fit(self) -> Self:
        kind = self.data_type
        if self.double_quant and kind not in WITH_ABSMAX:
            raise ValueError(f"double_quant: true has no meaning for {kind} ({NO_ABSMAX[kind]}); remove it")
        if self.group_size is not None and kind != "gptq_int4":
            raise ValueError(
                f"group_size: {self.group_size} has no meaning for {kind}; remove it, or set data_type: gptq_int4"
            )
        return self

    @property
    def doubly_quantized(self) -> bool:
        """Whether the absmax constants are quantized too, the default resolved."""
        return self.data_type in WITH_ABSMAX and self.double_quant is not False

    @property
    def inputs_per_scale(self) -> GroupSize:
        """Inputs that share a scale under ``gptq_int4``, the default resolved."""
        return self.group_size or 64


class Lora(Section):
    """The trained low-rank factors (LoRA, arXiv 2106.09685): W + s B A with s = alpha / rank."""

    rank: PositiveInt = 16
    """Rank of B A. The QLoRA paper found 8 to 256 alike once every linear layer has an adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Numerator of the scale s."""
    dropout: Share = 0.0
    """Dropout on the adapter's input while training."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """``all-linear`` (every linear layer but the output head) or a list of module names such as ``[q_proj,
    v_proj]``."""
    use_rslora: bool = False
    """s = alpha / sqrt(rank) (rank-stabilised LoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train a magnitude per output beside the direction (DoRA, arXiv 2402.09353)."""
    init: Literal["default", "loftq", "pissa"] = "default"
    """``default``: B = 0. ``loftq``: B A starts at what quantization lost (arXiv 2310.08659, one iteration).
    ``pissa``: B A starts at the principal part, the rest is quantized (arXiv 2404.02948)."""

    @property
    def scale(self) -> float:
        """The factor s before B A."""
        return float(self.alpha / (self.rank**0.5 if self.use_rslora else self.rank))

    def unknown_targets(self, layers: Iterable[str]) -> tuple[str, ...]:
        """A sentence for each target module that is no layer of the model.

        Args:
            layers: the last parts of the names of the model's linear layers, such as ``q_proj``.
        """
        if self.target_modules == "all-linear":
            return ()
        known = sorted(set(layers))
        sentences = []
        for name in self.target_modules:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                sentences.append(f"the model has no linear layer {name!r}.{hint} It has: {', '.join(known)}")
        return tuple(sentences)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.use_dora and self.init != "default":
            raise ValueError(f"use_dora needs init: default, got init: {self.init}")
        return self
