"""The modules that own MAFnet's parameters. Shapes: N frames (or B clips), C channels, H and W in LR pixels."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mafnet_ops import DeformAlign, flow_warp


def conv(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Conv2d:
    """Convolution with stride 1 that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


def lrelu(x: Tensor) -> Tensor:
    """In place: for sums and convolutions that nothing else needs."""
    return F.leaky_relu(x, 0.1, inplace=True)


class ResidualDenseBlock(nn.Module):
    """RDN's block: each layer sees all before it, a 1x1 convolution fuses them, plus the input."""

    def __init__(self, channels: int, layers: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv(channels + i * growth, growth) for i in range(layers))
        self.fuse = conv(channels + layers * growth, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        dense = x
        for layer in self.layers:
            dense = torch.cat([dense, F.relu(layer(dense))], 1)
        return x + self.fuse(dense)


class FeatureExtractor(nn.Module):
    """Frames (N, 3, H, W) -> features (N, C, H, W)."""

    def __init__(
        self, channels: int, blocks: int, layers: int, growth: int, global_fusion: bool
    ) -> None:
        super().__init__()
        self.conv_0 = conv(3, channels)
        self.conv_1 = conv(channels, channels)
        self.blocks = nn.ModuleList(
            ResidualDenseBlock(channels, layers, growth) for _ in range(blocks)
        )
        self.fuse = (
            nn.Sequential(conv(blocks * channels, channels, 1), conv(channels, channels))
            if global_fusion
            else None
        )

    def forward(self, frames: Tensor) -> Tensor:
        shallow = self.conv_0(frames)
        x = self.conv_1(shallow)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        if self.fuse is None:
            return x
        return self.fuse(torch.cat(outputs, 1)) + shallow


# ------------------------------------------------------------------------------------------------- flow


def _halve(x: Tensor) -> Tensor:
    # Of an even size the padding is in no window. With ceil_mode inductor compiles even and odd sizes apart.
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2)


def _resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Flow (N, h, w, 2) in its own pixels -> (N, H, W, 2) in the pixels of the new size, one level finer."""
    planes = F.interpolate(
        flow.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False
    )
    return 2 * planes.permute(0, 2, 3, 1)


def cost_volume(a: Tensor, b: Tensor, radius: int = 2) -> Tensor:
    """Mean absolute difference of ``a`` (N, C, H, W) and ``b`` shifted by up to ``radius`` pixels, relative to the mean
    over the shifts: (N, (2 radius + 1)^2, H, W) in fp32. Without it the flow was measured not to learn."""
    height, width = a.shape[-2:]
    padded = F.pad(b, (radius,) * 4, mode="replicate").to(b.dtype)  # autocast makes it fp32
    side = 2 * radius + 1
    cost = torch.stack(
        [
            (a - padded[:, :, i : i + height, j : j + width]).abs_().mean(1, dtype=torch.float32)
            for i in range(side)
            for j in range(side)
        ],
        1,
    )
    return cost / (cost.mean(1, keepdim=True) + 1e-3) - 1


class FeaturePyramidFlow(nn.Module):
    """Residual coarse-to-fine flow between two feature maps.

    Each level warps the second map by the flow so far and predicts a correction from both maps, the flow and
    a 5x5 local cost volume. The last layers start at zero: an untrained network gives zero flow.
    """

    def __init__(self, channels: int, width: int, levels: int, shared: bool) -> None:
        super().__init__()
        self.levels = levels
        inner = width if shared else width // 2

        def level() -> nn.Sequential:
            layers = nn.Sequential(
                conv(2 * channels + 2 + 25, width),
                nn.LeakyReLU(0.1, True),
                conv(width, width),
                nn.LeakyReLU(0.1, True),
                conv(width, inner),
                nn.LeakyReLU(0.1, True),
                conv(inner, 2),
            )
            nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
            return layers

        self.refine = nn.ModuleList(level() for _ in range(1 if shared else levels))

    def pyramid(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """The flow after each level, coarse to fine, each (N, h, w, 2) fp32 in the pixels of its level."""
        pairs = [(a, b)]
        for _ in range(self.levels - 1):
            pairs.append((_halve(pairs[-1][0]), _halve(pairs[-1][1])))
        flows: list[Tensor] = []
        for i, (x, y) in enumerate(reversed(pairs)):
            if flows:
                flow = _resize_flow(flows[-1], (x.shape[-2], x.shape[-1]))
                y = flow_warp(y, flow, "bilinear", "border")
            else:
                flow = x.new_zeros(x.shape[0], *x.shape[-2:], 2, dtype=torch.float32)
            planes = flow.permute(0, 3, 1, 2).to(x.dtype)
            inputs = torch.cat([x, y, planes, cost_volume(x, y).to(x.dtype)], 1)
            delta = self.refine[i if len(self.refine) > 1 else 0](inputs)
            flows.append(flow + delta.permute(0, 2, 3, 1).float())
        return flows

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Flow (N, H, W, 2), in pixels: a(p) looks like b(p + flow(p))."""
        return self.pyramid(a, b)[-1]


class SpyNet(nn.Module):
    """SPyNet (Ranjan and Black, CVPR 2017) on RGB frames in [0, 1]; loads the public state dict (BasicSR's key names).

    Frames of any size: they are resized to a multiple of 32 and the flow back.
    """

    class Level(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (8, 32, 64, 32, 16, 2)
            layers: list[nn.Module] = []
            for i, (n_in, n_out) in enumerate(pairwise(widths)):
                layers += [nn.ReLU()] if i else []
                layers += [conv(n_in, n_out, 7)]
            self.basic_module = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.basic_module(x)

    mean: Tensor
    std: Tensor

    def __init__(self, levels: int = 6) -> None:
        super().__init__()
        self.basic_module = nn.ModuleList(self.Level() for _ in range(levels))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Frames (N, 3, H, W) -> flow (N, H, W, 2) in pixels: a(p) looks like b(p + flow(p))."""
        height, width = a.shape[-2:]
        whole = (-(-height // 32) * 32, -(-width // 32) * 32)
        pairs = [
            tuple(
                F.interpolate(
                    (t - self.mean) / self.std, size=whole, mode="bilinear", align_corners=False
                )
                for t in (a, b)
            )
        ]
        for _ in range(len(self.basic_module) - 1):
            x, y = pairs[-1]
            pairs.append((F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)))
        coarsest = pairs[-1][0]
        planes = coarsest.new_zeros(coarsest.shape[0], 2, *coarsest.shape[-2:], dtype=torch.float32)
        for level, (x, y) in zip(self.basic_module, reversed(pairs), strict=True):
            if planes.shape[-2:] != x.shape[-2:]:
                size = (x.shape[-2], x.shape[-1])
                planes = 2 * F.interpolate(planes, size=size, mode="bilinear", align_corners=True)
            warped = flow_warp(y, planes.permute(0, 2, 3, 1), "bilinear", "border")
            planes = planes + level(torch.cat([x, warped, planes.to(x.dtype)], 1)).float()
        planes = F.interpolate(planes, size=(height, width), mode="bilinear", align_corners=False)
        ratio = planes.new_tensor([width / whole[1], height / whole[0]])
        return planes.permute(0, 2, 3, 1) * ratio


# ------------------------------------------------------------------------------------- deformable ConvLSTM


class DeformableConvLSTM(nn.Module):
    """ConvLSTM whose states are aligned to each frame by a flow-guided deformable convolution.

    Both states share one set of offsets and masks: flow to the previous frame plus a learnt residue. Directions are
    batched by the caller. ``offset_stride`` s > 1 predicts the offsets on an s times smaller map.
    """

    def __init__(
        self,
        channels: int,
        deform_groups: int,
        max_residue: float,
        align: bool,
        offset_stride: int,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.offset_stride = offset_stride
        self.input = conv(2 * channels, channels, 1)
        self.gates = conv(2 * channels, 4 * channels)
        with torch.no_grad():
            assert self.gates.bias is not None
            self.gates.bias[channels : 2 * channels] += 1  # remember by default
        self.align = None
        if align:
            self.head_in = conv(2 * channels + 2, channels)
            self.head_mid = conv(channels, channels)
            self.head_out = conv(channels, 27 * deform_groups)
            nn.init.zeros_(self.head_out.weight)
            nn.init.zeros_(self.head_out.bias)  # type: ignore[arg-type]
            # One call aligns both states: channels [h, c], two groups, sampled at the same places.
            self.align = DeformAlign(
                2 * channels, 2 * channels, groups=2, max_residue_magnitude=max_residue, parts=2
            )
            self.align.init_identity()

    def forward(self, y1: Tensor, y2: Tensor, flow: Tensor) -> Tensor:
        """y1, y2 (B, T, C, H, W), flow to the previous frame (B, T, H, W, 2) in LSTM pixels -> (B, T, C, H, W)."""
        batch, frames, channels = y1.shape[:3]
        both = torch.cat([y1, y2], 2).flatten(0, 1)
        # The part of each convolution that does not depend on the state runs over all frames at once.
        weight, bias = self.gates.weight, self.gates.bias
        x = self.input(both)
        gates_x = F.conv2d(x, weight[:, :channels], bias, padding=1)
        gates_x = gates_x.unflatten(0, (batch, frames)).unbind(1)
        head_x = None if self.align is None else self._head_input(x).unflatten(0, (batch, frames))
        heads = [None] * frames if head_x is None else head_x.unbind(1)

        h = c = None
        outputs = []
        for t, (gates, flow_t) in enumerate(zip(gates_x, flow.unbind(1), strict=True)):
            if h is not None and c is not None:
                if self.align is not None:
                    raw = self._head(heads[t], h, flow_t)  # type: ignore[arg-type]
                    h, c = self._align(h, c, raw, flow_t)
                gates = gates + F.conv2d(h, weight[:, channels:], None, padding=1)
            # The sigmoid of all four: one pass over whole memory costs less than three over parts of every pixel.
            i, f, o, _ = torch.sigmoid(gates).chunk(4, 1)
            update = i * torch.tanh(gates[:, 3 * channels :])
            c = update if c is None else f * c.to(update.dtype) + update
            h = o * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, 1)

    def _shrink(self, x: Tensor) -> Tensor:
        return x if self.offset_stride == 1 else F.avg_pool2d(x, self.offset_stride)

    def _head_input(self, x: Tensor) -> Tensor:
        weight = self.head_in.weight[:, : self.channels]
        return F.conv2d(self._shrink(x), weight, self.head_in.bias, padding=1)

    def _head(self, head_x: Tensor, h: Tensor, flow: Tensor) -> Tensor:
        """Raw offsets and masks (B, 27 * groups, H, W) from the current frame, the state and the flow."""
        planes = self._shrink(flow.permute(0, 3, 1, 2)).to(h.dtype)
        state = torch.cat([self._shrink(h), planes], 1)
        weight = self.head_in.weight[:, self.channels :]
        x = lrelu(head_x + F.conv2d(state, weight, None, padding=1))
        raw = self.head_out(lrelu(self.head_mid(x)))
        if self.offset_stride > 1:
            size = (h.shape[-2], h.shape[-1])
            raw = F.interpolate(raw, size=size, mode="bilinear", align_corners=False)
        return raw

    def _align(self, h: Tensor, c: Tensor, raw: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        assert self.align is not None
        states = self.align(torch.cat([h, c.to(h.dtype)], 1), raw, flow)
        h, c = states.chunk(2, 1)
        return h, c


# ----------------------------------------------------------------------------------------- reconstruction


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_1 = conv(channels, channels)
        self.conv_2 = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_2(F.relu(self.conv_1(x)))


def _cubic(x: float) -> float:
    """Keys' cubic with a = -0.5, MATLAB's bicubic kernel, for |x| <= 2."""
    x = abs(x)
    return (1.5 * x - 2.5) * x * x + 1 if x <= 1 else ((-0.5 * x + 2.5) * x - 4) * x + 2


def _upscale_x4_along(x: Tensor, dim: int) -> Tensor:
    """Output 4 i + p lies at i + (p - 1.5) / 4; borders are mirrored, the edge pixel included."""
    size = x.shape[dim]
    index = torch.arange(-2, size + 2, device=x.device)
    # By comparisons: the remainder by a size is not in ONNX while the size is free. The clamp is for a single pixel.
    index = torch.where(index < 0, -1 - index, index)
    index = torch.where(index < size, index, 2 * size - 1 - index).clamp(min=0)
    x = x.index_select(dim, index)
    phases = []
    for p in range(4):
        position = (p - 1.5) / 4
        first = -2 if p < 2 else -1
        taps = [(tap, _cubic(position - tap)) for tap in range(first, first + 4)]
        phases.append(sum(x.narrow(dim, tap + 2, size) * weight for tap, weight in taps))
    return torch.stack(phases, dim + 1).flatten(dim, dim + 1)  # type: ignore[arg-type]


def bicubic_upscale_x4(x: Tensor) -> Tensor:
    """MATLAB's ``imresize(x, 4, 'bicubic')`` of (N, C, H, W) in fp32 (fp64 for double): the global skip.

    Elementwise on purpose: autocast leaves it in fp32.
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return _upscale_x4_along(_upscale_x4_along(x, 2), 3)
