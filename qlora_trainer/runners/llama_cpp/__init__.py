"""GGUF files as llama.cpp loads, runs, compares and quantizes them. How files are written is not known here."""

from qlora_trainer.runners.llama_cpp.model import LlamaCppModel, load
from qlora_trainer.runners.llama_cpp.parity import parity_problems
from qlora_trainer.runners.llama_cpp.quantizer import KQuant, requantize

__all__ = ["KQuant", "LlamaCppModel", "load", "parity_problems", "requantize"]
