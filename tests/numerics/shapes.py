"""Shapes that several tests of memory share."""

from qlora_trainer.numerics.model_shape import ModelShape

SMALL = ModelShape.from_config(
    {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 320,
    }
)
LLAMA_65B = ModelShape.from_config(
    {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 22016,
        "vocab_size": 32000,
    }
)
