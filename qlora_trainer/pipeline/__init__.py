"""The order of the stages, and which of them need not be repeated.

    base -> quantized base -> adapted -> trained -> merged -> exports -> report
      └ evaluation of each, on the same test rows ┘

``journey`` is that line, ``comparing`` quantizes one 16-bit model by every method, ``ledger`` remembers finished
stages, ``ground`` is what a run stands on, ``adapted`` holds the one model that is in memory while training and
measuring it.
"""

from qlora_trainer.pipeline.comparing import compare
from qlora_trainer.pipeline.journey import Until, run

__all__ = ["Until", "compare", "run"]
