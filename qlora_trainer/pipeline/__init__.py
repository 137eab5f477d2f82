"""The order of the stages, and which of them need not be repeated.

    base -> quantized base -> adapted -> trained -> merged -> exports -> report
      └ evaluation of each, on the same test rows ┘

``journey`` is that line, ``ledger`` remembers finished stages, ``ground`` is what a run stands on, ``adapted``
holds the one model that is in memory while training and measuring it. ``pushing`` sends a finished run's files to the
hub.
"""

from qlora_trainer.pipeline.journey import Until, run
from qlora_trainer.pipeline.pushing import Asked, Parcel, pack, push

__all__ = ["Asked", "Parcel", "Until", "pack", "push", "run"]
