"""What the package logs while a run lasts, as a file in its folder; the terminal is ``cli``'s."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = "qlora_trainer"
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Adds the package's records from INFO up to the end of a file while the block lasts; an error is its last line."""
    package = logging.getLogger(PACKAGE)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        package.info("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()
