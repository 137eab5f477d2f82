"""Whether a checkpoint belongs to the training that is about to go on from it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.errors import RunFolderError
from qlora_trainer.stages.train.progress import Progress


def require_own(
    progress: Progress,
    adapter: Mapping[str, Tensor],
    *,
    folder: Path,
    recipe_key: str,
    optimizer: torch.optim.Optimizer,
    trainable: Mapping[str, Tensor],
) -> None:
    """Refuses a checkpoint that this training could not go on from to the same end.

    Args:
        progress: the checkpoint's.
        adapter: its tensors.
        folder: where it lies.
        recipe_key: fingerprint of what shapes this training.
        optimizer: this training's.
        trainable: this training's adapter.

    Raises:
        RunFolderError: says what differs.
    """
    if progress.recipe_key != recipe_key:
        raise RunFolderError(
            f"{folder} holds checkpoints of a training with other settings or rows. "
            "Give the run another run.name, or delete that folder."
        )
    wanted = optimizer_family(optimizer)
    if progress.optimizer != wanted:
        raise RunFolderError(
            f"{folder}: the optimizer's state is that of {progress.optimizer or 'an older version'}, and this machine "
            f"trains with {wanted}, which cannot go on from it. Resume on a machine like the one before "
            "(environment.json), or give the run another run.name."
        )
    differing = sorted(
        name
        for name in adapter.keys() | trainable.keys()
        if name not in adapter or name not in trainable or adapter[name].shape != trainable[name].shape
    )
    if differing:
        raise RunFolderError(
            f"{folder}: {len(differing)} adapter tensors are named or shaped otherwise than in this model, first "
            f"{differing[0]}. It was written by other versions of the libraries (environment.json): go on with those, "
            "or give the run another run.name."
        )


def optimizer_family(optimizer: torch.optim.Optimizer) -> str:
    """Class of an optimizer by what its state looks like; paging changes where the state lies and nothing else."""
    return type(optimizer).__name__.removeprefix("Paged")
