"""What a training asks of a model: everything but the model's own sizes that decides how many bytes it takes."""

from dataclasses import dataclass
from typing import Literal

from qlora_trainer.numerics.model_shape import ModelShape

BaseType = Literal["nf4", "fp4", "int8", "gptq_int4", "none"]
"""How a frozen base is stored; ``none``: in the compute type. ``gptq_int4``: integers in groups, bfloat16 scales."""
Checkpointing = Literal["none", "selective", "full"]
"""``none``: nothing is computed again. ``selective``: every second decoder layer. ``full``: every decoder layer."""

POLICIES: tuple[Checkpointing, ...] = ("none", "selective", "full")
"""From the fastest to the smallest."""


@dataclass(frozen=True)
class TrainingLoad:
    """What is asked of the model.

    Attributes:
        data_type: of the frozen base.
        double_quant: ``nf4``, ``fp4``: whether the absmax constants are quantized too.
        group_size: ``gptq_int4``: inputs that share a scale.
        compute_bytes: bytes of an activation: 2 or 4.
        rank: of the adapters.
        target_modules: names of the adapted linear layers; None = all.
        use_dora: whether adapters have a magnitude per output.
        has_dropout: whether the adapters' inputs are dropped out.
        optimizer: as in the recipe: ``adamw``, ``adamw_8bit``, ``paged_adamw``, ``paged_adamw_8bit``.
        tokens: of the largest micro-batch; its rows stand one behind the other, without padding.
        row_tokens: of the longest row.
        label_tokens: of the largest micro-batch.
        accumulates: whether an optimizer step has several micro-batches, so that gradients of the one are held
            through the passes of the next.
        checkpointing: how much is computed again in the backward pass.
        device: where it runs.
    """

    data_type: BaseType = "nf4"
    double_quant: bool = True
    group_size: int = 64
    compute_bytes: int = 2
    rank: int = 16
    target_modules: tuple[str, ...] | None = None
    use_dora: bool = False
    has_dropout: bool = False
    optimizer: str = "paged_adamw_8bit"
    tokens: int = 512
    row_tokens: int = 512
    label_tokens: int = 512
    accumulates: bool = True
    checkpointing: Checkpointing = "full"
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def has_8bit_optimizer(self) -> bool:
        """Whether the optimizer's two moments are stored in 8 bits."""
        return self.optimizer.endswith("8bit")

    def adapted(self, shape: ModelShape) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer that get an adapter."""
        names = self.target_modules
        return {name: size for name, size in shape.linears.items() if names is None or name in names}
