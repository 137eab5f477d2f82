"""The 16-bit base -> a quantized base on disk, with what that did to every layer; and that base in memory.

``stage`` keeps quantized bases in a cache, ``encoding`` streams a base into its format and meters it, ``storage`` knows
the formats and opens what was written.
"""

from qlora_trainer.formats.model_folder import Stored
from qlora_trainer.stages.quantize.encoding import Calibrated
from qlora_trainer.stages.quantize.stage import quantize
from qlora_trainer.stages.quantize.storage import open_base, weight_format_of

__all__ = ["Calibrated", "Stored", "open_base", "quantize", "weight_format_of"]
