"""What training works on, where it leaves things, and whom it tells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.records import Cut
from qlora_trainer.runtime.progress import Observer
from qlora_trainer.runtime.tracking import Tracker


@dataclass(frozen=True)
class Fitting:
    """What ``auto`` chooses from and with.

    Attributes:
        cuts: what the recipe leaves open, policies from the fastest on, of each the most rows first.
        predict: peak bytes of a training with such a cut; 0 where the model is of a kind that cannot be predicted.
        evaluate: takes the largest batches of validation and generation through the model.
    """

    cuts: tuple[Cut, ...]
    predict: Callable[[Cut], int]
    evaluate: Callable[[nn.Module], object]


@dataclass(frozen=True)
class TrainingInputs:
    """Everything that training needs besides the model and the recipe.

    Attributes:
        rows: training rows.
        pad_id: token that fills short rows of a batch.
        checkpoints: folder of the checkpoints.
        adapter: folder for the finished adapter in PEFT format.
        base_name: model that the adapter belongs on, written into its config.
        recipe_key: fingerprint of all that shapes the training.
        predicted_peak_bytes: what ``check`` predicted.
        validate: gives nats per label token on the validation rows.
        tracker: gets metrics.
        observer: gets progress.
        fitting: what ``auto`` needs; None where the recipe leaves nothing open.
    """

    rows: Sequence[EncodedRow]
    pad_id: int
    checkpoints: Path
    adapter: Path
    base_name: str
    recipe_key: str
    predicted_peak_bytes: int
    validate: Callable[[nn.Module], float]
    tracker: Tracker
    observer: Observer
    fitting: Fitting | None = None
