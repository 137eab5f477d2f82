"""The order of the stages, and which of them need not be repeated.

    base -> quantized base -> adapted -> trained -> merged -> exports -> report
      └ evaluation of each, on the same test rows ┘

``journey`` is that line, ``comparing`` quantizes one 16-bit model by every method, ``ledger`` remembers finished
stages, ``ground`` is what a run stands on, ``adapted`` holds the one model that is in memory while training and
measuring it, ``talking`` opens a model of a finished run, ``telling`` is what trackers hear, ``pushing`` sends files to
the hub.
"""

from qlora_trainer.pipeline.comparing import compare
from qlora_trainer.pipeline.journey import Until, run
from qlora_trainer.pipeline.pushing import Asked, Parcel, pack, push
from qlora_trainer.pipeline.talking import Sampling, Voice, talk
from qlora_trainer.pipeline.whole import run_whole

__all__ = ["Asked", "Parcel", "Sampling", "Until", "Voice", "compare", "pack", "push", "run", "run_whole", "talk"]
