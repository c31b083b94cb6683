"""What ``test_contract.py`` needs to know of an op: how to call it, on what, and what PyTorch says.

An op enters the contract, and the support matrix of the docs, by one row in ``CONTRACTS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from oracles import deform_conv2d_torch
from strategies import uniform
from torch import Tensor

import mafnet_ops
from mafnet_ops import reference
from mafnet_ops.pyramid_spatial_attention import LAYERS

Size = tuple[int, int]


@dataclass(frozen=True)
class Contract:
    """One public op at small, fixed channel counts."""

    op: str
    call: Callable[..., Tensor]
    baseline: Callable[..., Tensor]
    """The same function of the same tensors by PyTorch, in whatever dtype they have."""
    make: Callable[[int, Size], list[Tensor]]
    """(batch, size) -> fp64 tensors, the sampled points off the pixel centres."""
    terms: int
    """How many products an output element sums at most, the layers of a network counted together."""
    roundings: int = 1
    """How many maps in a row have the dtype of the arguments, from an argument to a result or its gradient."""
    kinks: bool = False
    """Whether rounding such a map may turn a sign on which gradients depend."""
    coordinates: tuple[int, ...] = ()
    """Arguments that stay fp32 beside half-precision ones."""
    batched: tuple[int, ...] = (0,)
    """Arguments that have a batch dimension; the others are parameters."""
    raw: dict[str, Callable[[list[Tensor]], tuple[object, ...]]] = field(default_factory=dict)
    """The raw ops under it: name -> arguments made of the tensors."""
    refuses: dict[str, str] = field(default_factory=dict)
    """Row of the support matrix -> why not; everything else must work."""

    def tensors(self, batch: int, size: Size, dtype: torch.dtype, device: str) -> list[Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        given = enumerate(self.make(batch, size))
        return [t.to(device, wide if i in self.coordinates else dtype) for i, t in given]


def off_centre(*shape: int, seed: int) -> Tensor:
    """Multiples of 1/4 plus 1/8: the same pixel in every precision, and no knot within 1/8."""
    return (uniform(*shape, reach=2.0, seed=seed) * 4).round() / 4 + 1 / 8


def _warp(batch: int, size: Size) -> list[Tensor]:
    return [uniform(batch, 6, *size), off_centre(batch, *size, 2, seed=1)]


def _convolution(batch: int, size: Size) -> list[Tensor]:
    return [
        uniform(batch, 8, *size),
        off_centre(batch, 36, *size, seed=1),
        (uniform(batch, 18, *size, seed=2) + 1) / 2,
        uniform(4, 8, 3, 3, seed=3),
        uniform(4, seed=4),
    ]


def _align(batch: int, size: Size) -> list[Tensor]:
    input, _, _, weight, bias = _convolution(batch, size)
    flow = uniform(batch, *size, 2, reach=2.0, seed=6).round() + 1 / 2
    return [input, uniform(batch, 54, *size, seed=5), weight, bias, flow]


def _align_baseline(
    input: Tensor, raw: Tensor, weight: Tensor, bias: Tensor, flow: Tensor
) -> Tensor:
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
    offset = 0.25 * wide[:, :36].tanh() + flow.flip(3).permute(0, 3, 1, 2).repeat(1, 18, 1, 1)
    return deform_conv2d_torch(input, offset, wide[:, 36:].sigmoid(), weight, bias, padding=(1, 1))


def _attention(batch: int, size: Size) -> list[Tensor]:
    length = size[0] * size[1]
    return [uniform(batch, 2, length, d, seed=s) for s, d in enumerate((3, 3, 5))]


def _attention_backward(tensors: list[Tensor]) -> tuple[object, ...]:
    out, lse = torch.ops.mafnet_ops.self_attention_forward(*tensors, 1.0, [])
    return (torch.ones_like(out), *tensors, out, lse, 1.0, [], False)


PYRAMID_KERNELS = {"pool_2": 3, "conv_2": 3, "mask": 3}


def _pyramid(batch: int, size: Size) -> list[Tensor]:
    weights, biases = [], []
    for seed, name in enumerate(LAYERS):
        fan_in, kernel = (8 if name.startswith("pool") else 4), PYRAMID_KERNELS.get(name, 1)
        weights.append(uniform(4, fan_in, kernel, kernel, seed=seed, reach=2 / fan_in / kernel**2))
        biases.append(uniform(4, seed=9 + seed))
    return [uniform(batch, 4, *size, seed=99), *weights, *biases]


def _pyramid_call(input: Tensor, *parameters: Tensor) -> Tensor:
    return mafnet_ops.pyramid_spatial_attention(input, parameters[:8], parameters[8:])


def _pyramid_baseline(input: Tensor, *parameters: Tensor) -> Tensor:
    layers = dict(zip(LAYERS, zip(parameters[:8], parameters[8:])))

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, *layers[name], padding=PYRAMID_KERNELS.get(name, 1) // 2)

    def lrelu(name: str, x: Tensor) -> Tensor:
        return F.leaky_relu(conv(name, x), 0.1)

    def pooled(x: Tensor) -> Tensor:
        return torch.cat([F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1)], 1)

    def up(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    level_1 = lrelu("pool_1", pooled(lrelu("reduce", input)))
    level_2 = lrelu("conv_2", lrelu("pool_2", pooled(lrelu("level_2", level_1))))
    mask = conv("mask", up(lrelu("add", up(level_2, level_1) + level_1), input))
    return input * mask.sigmoid() * 2 + lrelu("feature", mask)


def _channel(batch: int, size: Size) -> list[Tensor]:
    """Two layers each for mean and maximum, 4 -> 3 -> 4 channels; a kernel of 3 x 3 sees one pixel.

    The map goes with the gradient that the tests hand to the output: neither its mean nor the gradient of a gate,
    both sums over all pixels, is a small difference of large sums, of which nothing could be told.
    """
    shapes = ((3, 4, 1, 1), (4, 3, 3, 3), (3, 4, 1, 1), (4, 3, 1, 1))
    weights = [uniform(*shape, seed=i) for i, shape in enumerate(shapes)]
    biases = [uniform(shape[0], seed=5 + i) for i, shape in enumerate(shapes)]
    counting = torch.arange(batch * 4 * size[0] * size[1], dtype=torch.float64)
    image = 1 + counting.mul(0.618).frac().mul(2).sub(1).view(batch, 4, *size) / 2
    return [image + uniform(batch, 4, *size, reach=0.25, seed=99), *weights, *biases]


def _channel_call(input: Tensor, *parameters: Tensor) -> Tensor:
    return mafnet_ops.channel_attention(input, parameters[:4], parameters[4:])


def _channel_baseline(input: Tensor, *parameters: Tensor) -> Tensor:
    def layer(i: int, x: Tensor) -> Tensor:
        weight = parameters[i]
        return F.conv2d(x, weight, parameters[4 + i], padding=weight.shape[-1] // 2)

    mean, maximum = input.mean((2, 3), keepdim=True), input.amax((2, 3), keepdim=True)
    logits = layer(1, layer(0, mean).relu()) + layer(3, layer(2, maximum).relu())
    return input * logits.sigmoid()


def _warp_backward(tensors: list[Tensor]) -> tuple[object, ...]:
    return (torch.ones_like(tensors[0]), *tensors, 0, 0, True, True, False)


def _convolution_backward(tensors: list[Tensor]) -> tuple[object, ...]:
    input, offset, mask, weight, _ = tensors
    grad = input.new_ones((input.shape[0], weight.shape[0], *offset.shape[2:]))
    return (grad, input, offset, mask, weight, *SAME_SIZE, *[True] * 5, False)


def _align_forward(tensors: list[Tensor]) -> tuple[object, ...]:
    input, raw, weight, bias, flow = tensors
    return (input, raw, flow, None, weight, bias, 0.25, *SAME_SIZE, 1)


def _align_backward(tensors: list[Tensor]) -> tuple[object, ...]:
    input, raw, weight, _, flow = tensors
    grad = input.new_ones((input.shape[0], weight.shape[0], *raw.shape[2:]))
    return (grad, input, raw, flow, None, weight, 0.25, *SAME_SIZE, 1, *[True] * 6, False)


def _pooled_ones(input: Tensor, channels: int) -> Tensor:
    batch, _, height, width = input.shape
    return input.new_ones(batch, channels, (height + 1) // 2, (width + 1) // 2)


def _gate_arguments(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """input, mask, weight, bias"""
    return (tensors[0], tensors[0] - 0.5, tensors[8], tensors[16])


def _pyramid_convolution(
    op: str, layer: int, options: tuple[object, ...] = ()
) -> dict[str, Callable[[list[Tensor]], tuple[object, ...]]]:
    """Forward and backward of one of the raw convolutions; resize_conv is given a size of its own."""
    size: tuple[int, ...] = (7, 9) if op == "resize_conv" else ()

    def forward(tensors: list[Tensor]) -> tuple[object, ...]:
        return (tensors[0], tensors[1 + layer], tensors[9 + layer], *size, 0.1, *options)

    def backward(tensors: list[Tensor]) -> tuple[object, ...]:
        input, weight = tensors[0], tensors[1 + layer]
        output = {
            "pointwise_conv": torch.ones_like(input),
            "pool_concat_conv": _pooled_ones(input, 4),
            "resize_conv": input.new_ones(input.shape[0], 4, 7, 9),
        }[op]
        return (output * 2, input, weight, output, 0.1, True, True, True)

    return {f"{op}_forward": forward, f"{op}_backward": backward}


SAME_SIZE = (1,) * 6  # stride, padding and dilation of a 3 x 3 kernel that keeps the size

CONTRACTS = (
    Contract(
        "flow_warp",
        mafnet_ops.flow_warp,
        reference.flow_warp,
        _warp,
        terms=4,
        coordinates=(1,),
        batched=(0, 1),
        raw={
            "flow_warp_forward": lambda tensors: (*tensors, 0, 0, True),
            "flow_warp_backward": _warp_backward,
        },
    ),
    Contract(
        "modulated_deform_conv2d",
        lambda *tensors: mafnet_ops.modulated_deform_conv2d(*tensors, padding=1),
        lambda *tensors: deform_conv2d_torch(*tensors, padding=(1, 1)),
        _convolution,
        terms=4 * 72,
        coordinates=(1,),
        batched=(0, 1, 2),
        raw={
            "modulated_deform_conv2d_forward": lambda tensors: (*tensors, *SAME_SIZE),
            "modulated_deform_conv2d_backward": _convolution_backward,
        },
    ),
    Contract(
        "deform_align",
        lambda *tensors: mafnet_ops.deform_align(*tensors, max_residue_magnitude=0.25),
        _align_baseline,
        _align,
        terms=4 * 72,
        coordinates=(4,),
        batched=(0, 1, 4),
        raw={"deform_align_forward": _align_forward, "deform_align_backward": _align_backward},
    ),
    Contract(
        "self_attention",
        mafnet_ops.self_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0),
        _attention,
        terms=81,
        batched=(0, 1, 2),
        raw={
            "self_attention_forward": lambda t: (*t, 1.0, []),
            "self_attention_backward": _attention_backward,
        },
        refuses={"an output changed in place, as by an inplace ReLU": "backward reads the output"},
    ),
    Contract(
        "pyramid_spatial_attention",
        _pyramid_call,
        _pyramid_baseline,
        _pyramid,
        terms=8 * 36,
        roundings=20,  # 10 maps, and their gradients
        kinks=True,
        raw={
            "pool_concat_forward": lambda tensors: (tensors[0],),
            "pool_concat_backward": lambda tensors: (_pooled_ones(tensors[0], 8), tensors[0]),
            "resize_add_forward": lambda tensors: (tensors[0][:, :, :2, :3], tensors[0]),
            "resize_add_backward": lambda tensors: (tensors[0], 2, 3),
            "resize_add_conv_forward": lambda tensors: (
                *(tensors[0][:, :, :2, :3], tensors[0], tensors[6], tensors[14]),
                0.1,
            ),
            "conv_pool_conv_forward": lambda tensors: (
                *(tensors[0], tensors[1], tensors[9], tensors[2], tensors[10]),
                0.1,
            ),
            **_pyramid_convolution("pointwise_conv", 0, (True,)),
            **_pyramid_convolution("pool_concat_conv", 1),
            **_pyramid_convolution("resize_conv", 6),
            "spatial_gate_forward": lambda tensors: (*_gate_arguments(tensors), 2.0, 0.1, False),
            "spatial_gate_backward": lambda tensors: (
                tensors[0] + 1,
                *_gate_arguments(tensors),
                *(2.0, 0.1, True),
                *[True] * 4,
            ),
        },
    ),
    Contract(
        "channel_attention",
        _channel_call,
        _channel_baseline,
        _channel,
        terms=2 * 3 * 4,  # sums within sums: branches, hidden values, channels
        roundings=8,  # statistics, two layers, their sum, the gate, the product, and the gradients
        raw={
            "channel_statistics_forward": lambda tensors: (tensors[0],),
            "channel_statistics_backward": lambda tensors: (
                tensors[0].new_ones(tensors[0].shape[0], 2, 4),
                tensors[0],
                reference.channel_statistics(tensors[0]),
            ),
            "channel_scale_forward": lambda tensors: (tensors[0], tensors[0][:, :, 0, 0]),
            "channel_scale_backward": lambda tensors: (
                *(tensors[0] + 1, tensors[0], tensors[0][:, :, 0, 0]),
                *(True, True),
            ),
        },
    ),
)


def run(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output, then the gradient of every argument for one fixed gradient of the output."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    # Made on the device: a copy from the host cannot be captured in a CUDA graph.
    counting = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
    grad = counting.mul(0.618).frac().mul(2).sub(1).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]
