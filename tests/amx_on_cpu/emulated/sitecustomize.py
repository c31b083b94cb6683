"""Loads mafnet_ops with the emulated tile registers, in every process that has this folder on its PYTHONPATH."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch  # noqa: F401  # maps libtorch, which the library needs

sys.path.append(str(Path(__file__).resolve().parents[2]))
from amx_on_cpu.build import extension

_spec = importlib.util.spec_from_file_location("mafnet_ops._C", extension())
assert _spec is not None
sys.modules["mafnet_ops._C"] = importlib.util.module_from_spec(_spec)  # found there when imported
