"""Argument checks: every message names the op, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Asked once: Dynamo of torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)


def require(condition: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raise ``ValueError`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def require_count(op: str, argument: str, value: object, or_none: bool = False) -> None:
    """Raise unless ``value`` is an int of at least 1, or None where that is allowed."""
    fits = isinstance(value, Integral) and int(value) >= 1
    expected = "None or an int >= 1" if or_none else "an int >= 1"
    require(fits or (or_none and value is None), op, argument, expected, repr(value))


def require_tensor(op: str, argument: str, value: object, dims: int) -> None:
    """Raise unless ``value`` is a floating-point tensor with ``dims`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {argument}: expected dtype float64, float32, float16 or bfloat16, got {value.dtype}"
        )
    if value.layout != torch.strided:
        require(False, op, argument, "a dense tensor", str(value.layout))
    if value.dim() != dims:
        require(False, op, argument, f"{dims} dimensions", f"shape {tuple(value.shape)}")


def require_shape(op: str, argument: str, value: Tensor, shape: Sequence[int], why: str) -> None:
    """Raise ``ValueError`` unless ``value`` has exactly ``shape``; ``why`` spells the shape in names."""
    if tuple(value.shape) != tuple(shape):
        require(False, op, argument, f"{why} = {tuple(shape)}", tuple(value.shape))


def require_same_device(op: str, first: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise ``ValueError`` unless all tensors are on the device of the one named ``first``."""
    reference = tensors[first]
    assert reference is not None
    device = reference.device
    for argument, value in tensors.items():
        if value is not None and value.device != device:
            raise ValueError(
                f"{op}: {argument}: expected device {device} as {first}, got {value.device}"
            )


def require_same_dtype(op: str, first: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise ``TypeError`` unless all tensors have the dtype of the one named ``first``."""
    reference = tensors[first]
    assert reference is not None
    for argument, value in tensors.items():
        if value is not None and value.dtype != reference.dtype:
            raise TypeError(
                f"{op}: {argument}: expected dtype {reference.dtype} as {first}, got {value.dtype}"
            )


def require_pixels(op: str, argument: str, value: Tensor) -> None:
    """Raise ``ValueError`` for a map without rows or columns."""
    if min(value.shape[2:]) <= 0:
        require(False, op, argument, "H and W of at least 1", tuple(value.shape))


def require_layers(
    op: str, names: Sequence[str], weights: Any, biases: Any
) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias or None) of each layer named; raise unless there is one of each for every layer."""
    columns = []
    for argument, values, what in (("weights", weights, names), ("biases", biases, "or None")):
        iterable = isinstance(values, Iterable)
        items = tuple(values) if iterable else ()
        got = len(items) if iterable else type(values).__name__
        require(len(items) == len(names), op, argument, f"{len(names)} tensors {what}", got)
        columns.append(items)
    return list(zip(*columns, strict=True))


def require_convolution(
    op: str,
    input: Tensor,
    tensors: dict[str, Tensor | None],
    shape: Sequence[int],
    form: str,
    first: str = "input",
) -> None:
    """Raise unless ``tensors``, a weight of ``shape`` and its bias or None, go with ``input``, called ``first``."""
    (weight_name, weight), (bias_name, bias) = tensors.items()
    require_tensor(op, weight_name, weight, 4)
    if bias is not None:
        require_tensor(op, bias_name, bias, 1)
    every = {first: input, **tensors}
    require_same_device(op, first, every)
    present = [t for t in every.values() if t is not None]
    if any(t.dtype != input.dtype for t in present):
        wide = any(t.dtype == torch.float64 for t in present)  # which autocast leaves alone
        if wide or autocast_dtype(input.device) is None:
            require_same_dtype(op, first, every)
    assert weight is not None
    require_shape(op, weight_name, weight, shape, form)
    if bias is not None:
        require_shape(op, bias_name, bias, shape[:1], "(C_out,)")


def number(op: str, argument: str, value: Any) -> float:
    """``value`` as a float."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {argument}: expected a number, got {value!r}") from None


def pair(op: str, argument: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """An int or a pair of ints, each at least ``minimum``, as a pair."""
    items = (value, value) if isinstance(value, int) else value
    ok = isinstance(items, Sequence) and len(items) == 2
    ok = ok and all(isinstance(v, (int, torch.SymInt)) and v >= minimum for v in items)
    require(ok, op, argument, f"an int or a pair of ints >= {minimum}", value)
    return items[0], items[1]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on ``device``, or None where autocast is off."""
    if device.type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
