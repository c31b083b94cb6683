"""The non-local block (Wang et al., "Non-local Neural Networks", CVPR 2018) over self_attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import require, require_count
from ._state_dict import RenameOnLoad
from .self_attention import self_attention

_OP = "NonLocalBlock"
_MODES = ("embedded_gaussian", "gaussian")

# mmcv wraps each convolution (theta.conv) and sub-sampling puts it into a Sequential (g.0); others call the
# convolution after the attention W and put its normalisation beside it.
_NAMES = (
    (r"(theta|phi|g)(\.0)?(\.conv)?\.(weight|bias)", r"\1.\4"),
    (r"(W|conv_out)(\.0|\.conv)?\.(weight|bias)", r"conv_out.\3"),
    (r"(W\.1|conv_out\.1|conv_out\.bn)\.(.*)", r"norm.\2"),
)


class NonLocalBlock(nn.Module):
    """``x + norm(conv_out(attention))`` of 1 x 1 embeddings, for any size of frame.

    ``theta`` gives the queries, ``phi`` the keys, ``g`` the values. The state dicts of mmcv's ``NonLocal2d`` and of
    the widely copied ``NONLocalBlock2D`` (``W`` for ``conv_out``) load as they are.

    Args:
        channels: C of the (N, C, H, W) input and output.
        inter_channels: of the embeddings; default ``max(C // 2, 1)``.
        mode: ``"embedded_gaussian"``, or ``"gaussian"``: the input itself is query and key. The paper's other two
            forms have no softmax and are not attention.
        sub_sample: max-pool keys and values 2 x 2 (section 3.3 of the paper).
        batch_norm: a normalisation after ``conv_out``.
        use_scale: divide the scores by the square root of their width, as mmcv does.

    The last layer starts at zero, so an untrained block is the identity.

    Raises:
        ValueError: fewer than 1 channel, an unknown mode; at a call, no whole 2 x 2 square to pool.
    """

    def __init__(
        self,
        channels: int,
        inter_channels: int | None = None,
        mode: str = "embedded_gaussian",
        sub_sample: bool = False,
        batch_norm: bool = False,
        use_scale: bool = False,
    ) -> None:
        super().__init__()
        require_count(_OP, "channels", channels)
        require_count(_OP, "inter_channels", inter_channels, or_none=True)
        inner = max(channels // 2, 1) if inter_channels is None else inter_channels
        require(mode in _MODES, _OP, "mode", " or ".join(map(repr, _MODES)), repr(mode))
        embedded = mode == "embedded_gaussian"
        self.sub_sample = sub_sample
        self.scale = (inner if embedded else channels) ** -0.5 if use_scale else 1.0
        self.theta = nn.Conv2d(channels, inner, 1) if embedded else None
        self.phi = nn.Conv2d(channels, inner, 1) if embedded else None
        self.g = nn.Conv2d(channels, inner, 1)
        self.conv_out = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels) if batch_norm else None
        last = self.norm or self.conv_out
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.register_load_state_dict_pre_hook(RenameOnLoad(_NAMES))

    def forward(self, input: Tensor) -> Tensor:
        query = input if self.theta is None else self.theta(input)
        key = input if self.phi is None else self.phi(input)
        value = self.g(input)
        if self.sub_sample:
            size = tuple(input.shape[-2:])
            require(min(size) >= 2, _OP, "input", "H and W of at least 2 with sub_sample", size)
            key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)
        query, key, value = (x.flatten(2).mT.unsqueeze(1) for x in (query, key, value))
        attended = self_attention(query, key, value, self.scale).squeeze(1).mT
        out = self.conv_out(attended.unflatten(2, input.shape[-2:]))
        return input + (out if self.norm is None else self.norm(out))
