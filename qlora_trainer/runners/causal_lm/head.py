"""The output head of a transformers model as plain values, with the scalings that some architectures put behind it."""

from typing import Any

from torch import nn

from qlora_trainer.numerics.chunked_loss import OutputHead


def output_head(model: nn.Module) -> OutputHead | None:
    """The head as its config describes it; None where it is no plain frozen linear layer.

    Whether the model's logits are these has to be shown by comparing them: a config does not tell everything.
    """
    door: Any = model
    try:
        head = door.get_output_embeddings()
    except AttributeError:  # another runtime behind the same calls, such as llama.cpp
        return None
    if type(head) is not nn.Linear or head.weight.requires_grad or not head.weight.is_floating_point():
        return None
    settings = door.config.get_text_config().to_dict()
    factor = float(settings.get("logit_scale") or 1.0) / float(settings.get("logits_scaling") or 1.0)
    softcap = settings.get("final_logit_softcapping")
    return OutputHead(
        weight=head.weight.detach(),
        bias=None if head.bias is None else head.bias.detach(),
        factor=factor,
        softcap=None if softcap is None else float(softcap),
    )
