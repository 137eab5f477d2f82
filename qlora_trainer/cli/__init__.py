"""Arguments in, exit code out; the only printer of the package.

``app`` holds the verbs and ``verbs`` their help, ``guard`` turns errors into messages and exit codes, ``screen``
writes to the terminal, ``checked`` shows what ``check`` found, ``watching`` shows a run while it works,
``summary`` shows what it gave, ``shipped`` lists recipes and their settings.
"""

from qlora_trainer.cli.app import main

__all__ = ["main"]
