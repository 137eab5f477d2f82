"""GGUF, the one-file format of llama.cpp: block formats, architectures, vocabularies, models and adapters.

``blocks`` packs matrices, ``architecture`` and ``vocabulary`` translate a Hugging Face folder, ``model_file`` and
``adapter_file`` write and read. With these modules the package ``gguf`` has its door here.
"""

from qlora_trainer.formats.gguf.adapter_file import write_gguf_adapter
from qlora_trainer.formats.gguf.blocks import GgufBlocks, GgufKind
from qlora_trainer.formats.gguf.model_file import read_gguf, require_supported, write_gguf

__all__ = ["GgufBlocks", "GgufKind", "read_gguf", "require_supported", "write_gguf", "write_gguf_adapter"]
