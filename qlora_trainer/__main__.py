"""``python -m qlora_trainer`` is the command ``qlora-trainer``."""

from qlora_trainer.cli import main

main()
