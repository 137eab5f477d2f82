"""Rung 3: rounding and clipping learned by signed gradient, one block at a time (AutoRound, arXiv 2309.05516).

The teacher is the trained function: a block's rounded matrices are to give, from what the rounded blocks before it
give, the hidden states that the trained function has behind the block.
"""

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight
from qlora_trainer.numerics.rounding import LearnedRounding, hard, initial, sign_step, soft
from qlora_trainer.recipe import Rounding
from qlora_trainer.runtime.progress import counted
from qlora_trainer.stages.export.blockwise import BlockAtWork, BlockMethod, RoundedBlock


def learned_method(spec: GridSpec, settings: Rounding, *, seed: int) -> BlockMethod:
    """Rounds a block by so many signed-gradient steps, one batch a step.

    The rate is ``1 / steps`` and falls linearly to zero, so that an offset can travel the half step that it may. Signed
    steps drive offsets to where roundings tie, and the last step can be worse than the first; so the rounding of least
    loss is kept, looked at once a pass over the rows.
    """

    def round_block(work: BlockAtWork) -> RoundedBlock:
        with torch.no_grad():
            wanted = [work.call(work.trained, hidden, batch) for batch, hidden in enumerate(work.before_trained)]
        learned = {module: initial(work.merged[f"{module}.weight"], spec) for module in work.linears}
        steps, draw = settings.learned_steps, random.Random(f"{seed}/{work.name}")
        best, least = _hardened(work, learned, spec), _whole_loss(work, learned, wanted, spec)
        for step in counted(range(1, steps + 1), "learning to round", unit="steps", total=steps):
            batch = draw.randrange(len(work.batches))
            with torch.enable_grad():
                torch.autograd.backward(_loss(work, learned, wanted, batch, spec))
            for each in learned.values():
                sign_step(each, (1 - (step - 1) / steps) / steps)
            if step % len(work.batches) == 0 or step == steps:
                loss = _whole_loss(work, learned, wanted, spec)
                if loss < least:
                    best, least = _hardened(work, learned, spec), loss
        return RoundedBlock(best)

    return round_block


def _hardened(work: BlockAtWork, learned: Mapping[str, LearnedRounding], spec: GridSpec) -> dict[str, IntegerWeight]:
    return {module: hard(work.merged[f"{module}.weight"], each, spec) for module, each in learned.items()}


@torch.no_grad()
def _whole_loss(
    work: BlockAtWork, learned: Mapping[str, LearnedRounding], wanted: Sequence[Tensor], spec: GridSpec
) -> float:
    """The loss over all calibration rows, each real token weighing the same."""
    tokens = [int(batch.real.sum()) for batch in work.batches]
    losses = [float(_loss(work, learned, wanted, batch, spec)) for batch in range(len(tokens))]
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


def _loss(
    work: BlockAtWork,
    learned: Mapping[str, LearnedRounding],
    wanted: Sequence[Tensor],
    batch: int,
    spec: GridSpec,
) -> Tensor:
    """Mean squared difference of one batch's hidden states behind the block from the trained function's."""
    matrices = {module: soft(work.merged[f"{module}.weight"], each, spec) for module, each in learned.items()}
    given = work.call(work.with_matrices(matrices), work.before_rounded[batch], batch)
    real = work.batches[batch].real
    return torch.nn.functional.mse_loss(given[real], wanted[batch][real])
