"""When a run's checkpoints are written, and that its disk has room for them before they are."""

from pathlib import Path

from qlora_trainer.runtime import checkpoint
from qlora_trainer.runtime.checkpoint import CheckpointState
from qlora_trainer.runtime.memory import free_disk_bytes

RESERVE_BYTES = 32 * 2**20
"""Room that is left for metrics, logs and what other programs write between two steps."""


class Saving:
    """The checkpoints that a run writes.

    Attributes:
        saved_step: of the newest checkpoint; -1 where there is none.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.saved_step = -1
        self._bytes = 0

    def save(self, step: int, state: CheckpointState) -> None:
        """Writes a checkpoint.

        Raises:
            RunFolderError: it cannot be written; the older ones are as they were.
        """
        place = checkpoint.save(self.folder, step, state, keep=self.keep)
        self.saved_step = step
        self._bytes = sum(path.stat().st_size for path in place.iterdir())

    def expect(self, state: CheckpointState) -> None:
        """Notes how large checkpoints will be, where none was written yet."""
        self._bytes = self._bytes or checkpoint.size_on_disk(state)

    @property
    def is_size_known(self) -> bool:
        """Whether ``lack_of_room`` can tell anything."""
        return self._bytes > 0

    def lack_of_room(self) -> str | None:
        """What is wrong where the disk has hardly room for the next checkpoint, beside those that are there."""
        free = free_disk_bytes(self.folder)
        if free >= self._bytes + RESERVE_BYTES:
            return None
        return (
            f"the disk of {self.folder} has {free / 2**20:,.1f} MiB free; a checkpoint takes "
            f"{self._bytes / 2**20:,.1f} MiB, and {RESERVE_BYTES / 2**20:.0f} MiB are kept for metrics and logs"
        )

    def fits(self) -> bool:
        """Whether a checkpoint can be written now, with nothing in reserve."""
        return free_disk_bytes(self.folder) >= self._bytes
