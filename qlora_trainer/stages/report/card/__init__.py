"""Model cards: README.md of each file and of the adapter, in the Hugging Face hub's form, written from the report.

``subject`` is what a card is about, ``metadata`` its YAML head, ``loading`` how the file is loaded, ``discreet`` keeps
local paths and tokens out, ``page`` is the whole text, ``writing`` puts it beside the files. Data rows and outputs
never stand in a card: it is made to be public, they may not be.
"""

from qlora_trainer.stages.report.card.page import render_card
from qlora_trainer.stages.report.card.subject import BaseFacts, CardSubject, base_facts
from qlora_trainer.stages.report.card.writing import CARD_FILE, write_cards

__all__ = ["CARD_FILE", "BaseFacts", "CardSubject", "base_facts", "render_card", "write_cards"]
