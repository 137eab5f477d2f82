"""How long does one optimizer step take here, and how much memory, against TRL + PEFT + bitsandbytes?

Both sides train the same Llama with random weights on the same rows, on the processor, in turns; each run is a process
of its own (ours in this file, the peer's in ``bench_peer.py``), with as many threads as the other.

    python scripts/bench_step.py          # needs: pip install -e '.[bench]'

Prints a table and writes ``scripts/results/bench_step.json``. Every batch has one row that fills the window, or nearly,
and three that come as they come, so that all steps multiply matrices of about one size and padding has its usual
share. Both sides pad a batch to its longest row. A comparison of different work is refused: tokens must be the
same, and the losses equal within ``LOSS_TOLERANCE``.
"""

import argparse
import importlib.util
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_trainer.data.batches import collate
from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow, encode_chat
from qlora_trainer.data.examples import prompt_completion_examples
from qlora_trainer.data.sources import read_rows
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.recipe import Lora, Quantization
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.runners.causal_lm import set_checkpointing
from qlora_trainer.runtime import bnb
from qlora_trainer.runtime.device import World
from qlora_trainer.runtime.environment import describe_environment
from qlora_trainer.runtime.memory import PeakMemory
from qlora_trainer.runtime.weight_files import copy_companions
from qlora_trainer.stages.adapt import adapt, choose_layers
from qlora_trainer.stages.quantize import quantize
from qlora_trainer.stages.train.step import optimizer_step
