"""The compiled libraries, the torch namespace they fill, and which backend an op uses on a device.

``import torch`` comes first: it maps libtorch, which ``_C`` needs. Then the shared objects, then the
schemas (each op module defines its own), so that a mismatch is a Python error and not an abort.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

INSTALL_COMMAND = "pip install --force-reinstall --no-deps ."
"""Rebuilds the kernels, run in a checkout of the project."""


@dataclass(frozen=True)
class Backend:
    """What runs an op on a kind of device (``native``, ``triton`` or ``pytorch``) and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class _Op:
    kernels: tuple[str, ...]
    other: Callable[[str], Backend | None] | None


_OPS: dict[str, _Op] = {}
_WHOLES: dict[str, str] = {}  # part -> op
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def disabled() -> bool:
    """Whether MAFNET_DISABLE_EXT=1 asked for the PyTorch code of every op."""
    return os.environ.get("MAFNET_DISABLE_EXT", "0") == "1"


def build_report() -> dict[str, str | None]:
    """What the build wrote down about itself; empty for a tree that was never built."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _load(name: str) -> str | None:
    """Import one of the shared objects; the reason where that fails, else None."""
    if not Path(__file__).with_name(f"{name}.abi3.so").exists():
        # Asked of the file, not of the import system: another, editable install must not lend its library.
        key = "extension_missing_because" if name == "_C" else "cuda_missing_because"
        return f"mafnet_ops/{name}.abi3.so is not built: " + (
            build_report().get(key) or "no build ran"
        )
    try:
        importlib.import_module(f"mafnet_ops.{name}")
    except ImportError as error:
        return f"mafnet_ops/{name}.abi3.so does not load: {error}"
    return None


def _load_cpu() -> str | None:
    return "MAFNET_DISABLE_EXT=1" if disabled() else _load("_C")


def _load_cuda() -> str | None:
    if disabled():
        return "MAFNET_DISABLE_EXT=1"
    if torch.version.cuda is None:
        return "this torch is a build without CUDA"
    return _load("_C_cuda")


LOAD_ERRORS: dict[str, str | None] = {"cpu": _load_cpu(), "cuda": _load_cuda()}
"""Why a device type has no compiled kernels; None where the library is loaded."""

if LOAD_ERRORS["cpu"] is not None and not disabled():
    warnings.warn(
        f"mafnet_ops runs its slow PyTorch code: {LOAD_ERRORS['cpu']}. To build the kernels: "
        f"{INSTALL_COMMAND} (see python -m mafnet_ops.doctor)",
        RuntimeWarning,
        stacklevel=2,
    )

LIBRARY = torch.library.Library("mafnet_ops", "DEF")


def register_op(
    name: str,
    kernels: tuple[str, ...] = (),
    other: Callable[[str], Backend | None] | None = None,
    parts: tuple[str, ...] = (),
) -> frozenset[str]:
    """Enter a public op into the table that ``doctor`` prints.

    Args:
        name: the public name.
        kernels: its raw ops, e.g. ``("flow_warp_forward", "flow_warp_backward")``; a device type has the
            native backend when its library implements all of them.
        other: asked first, with a device type; a backend, or None for the native one where it is there, else
            PyTorch.
        parts: public functions that the same kernels run.

    Returns:
        The device types with native kernels.
    """
    _OPS[name] = _Op(kernels, other)
    _WHOLES.update(dict.fromkeys(parts, name))
    return frozenset(device for device in _DISPATCH_KEYS if _has_kernels(kernels, device))


def _has_kernels(kernels: tuple[str, ...], device_type: str) -> bool:
    key = _DISPATCH_KEYS[device_type]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(kernels) and all(has(f"mafnet_ops::{kernel}", key) for kernel in kernels)


def op_of(function: str) -> str | None:
    """The registered op that a public function is, or is a part of."""
    return function if function in _OPS else _WHOLES.get(function)


def op_names() -> tuple[str, ...]:
    """Every registered op, in the order of their modules' imports."""
    return tuple(_OPS)


def backend(op: str, device: torch.device | str) -> Backend:
    """What runs ``op`` on ``device``, with the reason.

    Raises:
        KeyError: no such op; the message lists them.
    """
    if op not in _OPS:
        raise KeyError(f"backend: op: expected one of {', '.join(_OPS)}, got {op}")
    entry, kind = _OPS[op], torch.device(device).type
    chosen = entry.other(kind) if entry.other is not None else None
    if chosen is not None:
        return chosen
    if kind in _DISPATCH_KEYS and _has_kernels(entry.kernels, kind):
        return Backend("native", f"compiled {_DISPATCH_KEYS[kind]} kernel")
    return Backend("pytorch", _why_not_native(entry, kind))


def _why_not_native(entry: _Op, kind: str) -> str:
    if not entry.kernels:
        return "this op has no compiled kernel"
    if kind not in _DISPATCH_KEYS:
        return f"no kernels for device type {kind}"
    return LOAD_ERRORS[kind] or f"the library has no {_DISPATCH_KEYS[kind]} kernel of this op"
