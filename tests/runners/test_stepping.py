from pathlib import Path

import torch

from qlora_trainer.runners import transformers
from qlora_trainer.runners.stepping import CachedSteps
from tests.models import random_token_ids


def test_token_after_token_gives_the_logits_of_the_whole_text_at_once(llama_folder: Path) -> None:
    model = transformers.load(llama_folder, dtype=torch.float32)
    token_ids = random_token_ids(rows=1, tokens=12)
    with torch.no_grad():
        whole = model(input_ids=token_ids).logits[0]
    steps, ids = CachedSteps(model), token_ids[0].tolist()
    stepped = [steps.next_logits(ids[:5], start=0)]
    stepped += [steps.next_logits([token], start=place) for place, token in enumerate(ids[5:], start=5)]
    # Sums of 64 float32 products in another order.
    torch.testing.assert_close(torch.stack(stepped), whole[4:], rtol=1e-4, atol=1e-5)


def test_a_new_text_forgets_the_one_before(llama_folder: Path) -> None:
    steps = CachedSteps(transformers.load(llama_folder, dtype=torch.float32))
    first = steps.next_logits([7, 8, 9], start=0)
    steps.next_logits([10], start=3)
    assert torch.equal(steps.next_logits([7, 8, 9], start=0), first)
