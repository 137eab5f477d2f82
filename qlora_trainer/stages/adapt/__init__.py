"""A base in memory -> the same model with LoRA adapters in it, the base frozen.

``insertion`` chooses layers and puts adapters in; ``lean_linear`` is what an adapted layer computes with.
With ``formats.peft_adapter`` this folder is the door to peft: insertion here, files there.
"""

from qlora_trainer.stages.adapt.insertion import choose_layers, insert, load_adapter

__all__ = ["choose_layers", "insert", "load_adapter"]
