import logging
from pathlib import Path

import pytest

from qlora_trainer.runtime.run_log import logged_to


def test_a_run_s_file_holds_what_the_package_logs_and_how_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    logger = logging.getLogger("qlora_trainer.some.module")
    with logged_to(path):
        logger.info("training from step %d", 3)
    with pytest.raises(ValueError, match="bad rows"), logged_to(path):
        raise ValueError("bad rows")
    logger.info("after the run")
    text = path.read_text(encoding="utf-8")
    assert "INFO qlora_trainer.some.module: training from step 3" in text
    assert "ended by ValueError: bad rows" in text
    assert "after the run" not in text
    assert logging.getLogger("qlora_trainer").level == logging.NOTSET
