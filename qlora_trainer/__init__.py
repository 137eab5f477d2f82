"""QLoRA training from one recipe to verified int4 and int8 files.

The command line is ``qlora-trainer``; ``pipeline.run`` is the same from Python.
"""

__version__ = "0.1.0"
