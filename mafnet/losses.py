"""Training losses.  All compute in float32, whatever the dtype of their inputs.

In half precision eps**2 = 1e-12 is zero and the gradient of the square root at 0 is not a number.
"""

from __future__ import annotations

from typing import Literal

import torch

LossName = Literal["charbonnier", "l1", "paper"]

CHARBONNIER_EPS = 1e-6


def charbonnier(
    prediction: torch.Tensor, target: torch.Tensor, eps: float = CHARBONNIER_EPS
) -> torch.Tensor:
    """Mean of sqrt(d**2 + eps**2), d = prediction - target: a scalar float32 tensor.

    The inputs have one shape and any floating dtype.  The gradient is finite everywhere and zero
    at d = 0.

    Raises:
        ValueError: the shapes differ.
    """
    difference = _difference("charbonnier", prediction, target)
    return torch.sqrt(difference * difference + eps * eps).mean()


def l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of |prediction - target|: a scalar float32 tensor; see ``charbonnier`` for the rest."""
    return _difference("l1", prediction, target).abs().mean()


def paper_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The paper's objective, L1 and Charbonnier added with equal weights."""
    return l1(prediction, target) + charbonnier(prediction, target)


def reconstruction_loss(
    name: LossName, prediction: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """The loss called ``name``: ``charbonnier``, ``l1`` or ``paper``.

    Raises:
        ValueError: another name, or shapes that differ.
    """
    losses = {"charbonnier": charbonnier, "l1": l1, "paper": paper_loss}
    if name not in losses:
        raise ValueError(f"loss: expected one of {', '.join(losses)}, got {name!r}")
    return losses[name](prediction, target)


def _difference(caller: str, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if prediction.shape != target.shape:
        raise ValueError(
            f"{caller}: target: expected shape {tuple(prediction.shape)} of the prediction, "
            f"got {tuple(target.shape)}"
        )
    # Autocast leaves subtraction alone, but the operands may already be of half precision.
    return prediction.float() - target.float()
