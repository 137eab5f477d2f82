"""Fixtures that every test may ask for."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.browser import Browser, find_browser, started
from tests.finished import FinishedRun, carry_out
from tests.models import tiny_llama

# Before any import of huggingface_hub, which reads it once: a test that reaches for the network fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """More threads than cores make small tensors many times slower, and tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in bfloat16, hidden size 64, own output head. Not to be changed."""
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def wide_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with hidden size 128, so that groups of 128 fit. Not to be changed."""
    return tiny_llama(tmp_path_factory.mktemp("wide_llama"), hidden_size=128)


@pytest.fixture(scope="session")
def tied_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with hidden size 64, tied embeddings and biases in attention. Not to be changed."""
    return tiny_llama(tmp_path_factory.mktemp("tied_llama"), is_tied=True, has_biases=True)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of real models and data beside the repository; a test that needs it skips where it is not."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"needs the models and data of {folder}, which is not there")
    return folder


@pytest.fixture(scope="session")
def finished_run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A small run that was carried out to its report; tests that change it copy it first."""
    return carry_out(llama_folder, tmp_path_factory.mktemp("finished-run"))


@pytest.fixture(scope="session")
def gguf_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A small run with files for llama.cpp; its base has rows of 256, which K-quants need."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'qlora-trainer[gguf]'")
    base = tiny_llama(tmp_path_factory.mktemp("llama256"), hidden_size=256)
    formats = ("merged_16bit", "gguf_q8_0", "gguf_q6_k", "gguf_adapter")
    return carry_out(base, tmp_path_factory.mktemp("gguf-run"), formats)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium, for modules that are marked ``IN_BROWSER``."""
    with started(str(find_browser()), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def nothing_to_complain_of(browser: Browser) -> Iterator[None]:
    """The page that a test opens writes no error and asks for nothing."""
    browser.complaints.clear()
    browser.requests.clear()
    yield
    assert browser.complaints == []
    assert browser.requests == []
