"""Whether learnt offsets run away: counters on the device, read when convenient."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OffsetHealth(nn.Module):
    """Counts offsets of more than ``threshold`` pixels and values that are not finite.

    Deformable networks diverge by their offsets first. Looking at the offsets of every call stalls the device, as
    EDVR's well-known check does; this adds to counters where the offsets are, and only :meth:`read` waits. It has no
    part in the graph of autograd, no entry in a state dict, and works under ``torch.compile`` and in CUDA graphs.

    The deformable modules have an attribute ``health``, None by default; see :func:`watch_offsets`.
    """

    counts: Tensor

    def __init__(self, threshold: float = 50.0) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def forward(self, offset: Tensor) -> None:
        """Count the offsets of a call."""
        finite = offset.isfinite()
        far = (offset.abs() > self.threshold) & finite
        seen = torch.full_like(self.counts[0], offset.numel())
        self.counts += torch.stack([far.sum(), (~finite).sum(), seen])

    def read(self) -> dict[str, int]:
        """The counts since the last :meth:`reset`: ``far`` (finite and beyond the threshold), ``not_finite`` and
        ``seen``, all. Waits for the device."""
        return dict(zip(("far", "not_finite", "seen"), self.counts.tolist()))

    def reset(self) -> None:
        self.counts.zero_()
