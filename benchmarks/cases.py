"""What is measured: each case builds its inputs and names the implementations, ours first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import mafnet_ops
from mafnet_ops import reference
from mafnet_ops.pyramid_spatial_attention import LAYERS

LAYOUTS = {"planar": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def unchanged(*inputs: Tensor) -> tuple[Tensor, ...]:
    return inputs


@dataclass(frozen=True)
class Implementation:
    """``call(*prepare(*inputs))``; only the call is timed, so prepare holds what a user would have beforehand."""

    name: str
    call: Callable[..., Tensor]
    prepare: Callable[..., tuple[Tensor, ...]] = unchanged


@dataclass(frozen=True)
class Case:
    """One op at one shape. All inputs are differentiated in the pass `forward+backward`."""

    op: str
    shape: str
    dtype: str  # of the features; coordinates are float32
    layout: str
    distribution: str  # of the coordinates
    inputs: tuple[Tensor, ...]
    implementations: tuple[Implementation, ...]
    definition: Callable[..., Tensor]  # called in float64 for the match
    flops: int  # of the forward pass
    terms: int  # products that an output element sums
    # The definition with the roundings on the way that the op's page states, where they matter.
    rounded: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Suite:
    """Which cases to build. `small` ones take milliseconds: for tests and for sanitizers."""

    device: str = "cpu"
    small: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        return (
            ("float32", "bfloat16", "float16") if self.device == "cuda" else ("float32", "bfloat16")
        )


# ----------------------------------------------------------------------------------------- flow_warp


def make_grid(image: Tensor, flow: Tensor) -> Tensor:
    """Flow in pixels as the normalised coordinates that F.grid_sample wants."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device, dtype=flow.dtype),
        torch.arange(width, device=flow.device, dtype=flow.dtype),
        indexing="ij",
    )
    return torch.stack(
        [
            2 * (x + flow[..., 0]) / max(width - 1, 1) - 1,
            2 * (y + flow[..., 1]) / max(height - 1, 1) - 1,
        ],
        -1,
    )


def grid_sample(image: Tensor, grid: Tensor) -> Tensor:
    """In float32, as autocast runs it: half-precision coordinates miss by pixels at these widths."""
    out = F.grid_sample(image.float(), grid, "bilinear", "zeros", align_corners=True)
    return out.to(image.dtype)


def recipe(image: Tensor, flow: Tensor) -> Tensor:
    """What people write: build the grid, then sample."""
    return grid_sample(image, make_grid(image, flow))


def warp_definition(image: Tensor, flow: Tensor) -> Tensor:
    out = reference.flow_warp(image, flow)
    assert isinstance(out, Tensor)
    return out


def smooth_flow(height: int, width: int, device: str) -> Tensor:
    """Pixels that move like their neighbours, by about 4 pixels: optical flow between two frames."""
    coarse = 4 * torch.randn(1, 2, max(height // 40, 2), max(width // 40, 2), device=device)
    flow = F.interpolate(coarse, size=(height, width), mode="bicubic")
    return flow.permute(0, 2, 3, 1).contiguous()


def flow_warp_cases(suite: Suite) -> Iterator[Case]:
    implementations = (
        Implementation("mafnet_ops", mafnet_ops.flow_warp),
        Implementation("grid + F.grid_sample", recipe),
        Implementation("F.grid_sample", grid_sample, lambda x, flow: (x, make_grid(x, flow))),
    )
    sizes = ((12, 17),) if suite.small else ((180, 320), (720, 1280))
    distributions = ("smooth", "normal, sigma 3")
    for height, width in sizes:
        for dtype, (layout, memory_format), distribution in itertools.product(
            suite.dtypes, LAYOUTS.items(), distributions
        ):
            torch.manual_seed(0)
            image = torch.randn(1, 64, height, width, device=suite.device)
            image = image.to(DTYPES[dtype], memory_format=memory_format)
            flow = smooth_flow(height, width, suite.device)
            if distribution != "smooth":
                flow = 3 * torch.randn_like(flow)
            yield Case(
                op="flow_warp",
                shape=f"1x64x{height}x{width}",
                dtype=dtype,
                layout=layout,
                distribution=distribution,
                inputs=(image.requires_grad_(), flow.requires_grad_()),
                implementations=implementations,
                definition=warp_definition,
                flops=8 * image.numel(),  # 4 taps, a multiplication and an addition each
                terms=4,
            )


# --------------------------------------------------------------------------- modulated_deform_conv2d


def torchvision_deform_conv2d() -> Implementation | None:
    """In float32, as autocast runs it: its half-precision coordinates lose most of their digits."""
    try:
        from torchvision.ops import deform_conv2d
    except ImportError:
        return None

    def call(image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x, w, b = image.float(), weight.float(), bias.float()
        out: Tensor = deform_conv2d(x, offset, w, b, 1, 1, 1, mask)
        return out.to(image.dtype)

    return Implementation("torchvision", call)


def deform_conv_definition(
    image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    offset, mask = offset.to(image.dtype), mask.to(image.dtype)
    return reference.modulated_deform_conv2d(
        image, offset, mask, weight, bias, (1, 1), (1, 1), (1, 1)
    )


def deform_conv_offsets(shape: tuple[int, ...], distribution: str, device: str) -> Tensor:
    """`smooth`: neighbours move together, as in video; `uniform`: anywhere in the image, no cache helps."""
    if distribution == "smooth":
        coarse = torch.randn(*shape[:2], -(-shape[2] // 16), -(-shape[3] // 16), device=device)
        return F.interpolate(3 * coarse, shape[2:], mode="bilinear")
    if distribution == "uniform":
        return (torch.rand(shape, device=device) - 0.5) * min(shape[2:])
    return 2 * torch.randn(shape, device=device)


def modulated_deform_conv2d_cases(suite: Suite) -> Iterator[Case]:
    def ours(image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return mafnet_ops.modulated_deform_conv2d(image, offset, mask, weight, bias, 1, 1)

    implementations = [Implementation("mafnet_ops", ours), torchvision_deform_conv2d()]
    if suite.device == "cpu":
        implementations.append(Implementation("PyTorch path", deform_conv_definition))
    shapes: tuple[tuple[int, int, int, int], ...] = ((1, 9, 11, 8),)
    if not suite.small:
        shapes = ((1, 64, 64, 8), (8, 64, 64, 8), (1, 180, 320, 8), (1, 180, 320, 16))
    distributions: tuple[str, ...] = ("normal, sigma 2",)
    if suite.device == "cuda" and not suite.small:
        distributions += ("smooth", "uniform")
    for batch, height, width, groups in shapes:
        for dtype, (layout, memory_format), distribution in itertools.product(
            suite.dtypes, LAYOUTS.items(), distributions
        ):
            torch.manual_seed(0)
            device, low = suite.device, DTYPES[dtype]
            offset_shape = (batch, 18 * groups, height, width)
            image = torch.randn(batch, 64, height, width, device=device)
            inputs = (
                image.to(low, memory_format=memory_format),
                deform_conv_offsets(offset_shape, distribution, device),
                torch.rand(batch, 9 * groups, height, width, device=device),
                (torch.randn(64, 64, 3, 3, device=device) / 24).to(low),
                torch.randn(64, device=device).to(low),
            )
            yield Case(
                op="modulated_deform_conv2d",
                shape=f"{batch}x64x{height}x{width} k3 g{groups}",
                dtype=dtype,
                layout=layout,
                distribution=distribution,
                inputs=tuple(t.requires_grad_() for t in inputs),
                implementations=tuple(i for i in implementations if i is not None),
                definition=deform_conv_definition,
                flops=2 * 9 * 64 * 64 * batch * height * width,
                terms=9 * 64,
            )


# -------------------------------------------------------------------------------------- deform_align

REACH = 10.0  # of the residues, in pixels


def align_recipe(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What people write: offsets and masks as tensors, then the convolution."""

    def call(
        image: Tensor, raw: Tensor, weight: Tensor, bias: Tensor, flow_1: Tensor, flow_2: Tensor
    ) -> Tensor:
        first, second, mask = raw.chunk(3, 1)
        halves = (REACH * torch.cat([first, second], 1).tanh()).chunk(2, 1)
        moved = [
            half + flow.permute(0, 3, 1, 2).flip(1).repeat(1, half.shape[1] // 2, 1, 1)
            for half, flow in zip(halves, (flow_1, flow_2))
        ]
        return convolution(image, torch.cat(moved, 1), mask.sigmoid(), weight, bias)

    return call


def deform_align_cases(suite: Suite) -> Iterator[Case]:
    def ours(
        image: Tensor, raw: Tensor, weight: Tensor, bias: Tensor, flow_1: Tensor, flow_2: Tensor
    ) -> Tensor:
        return mafnet_ops.deform_align(image, raw, weight, bias, flow_1, flow_2, REACH)

    def plain(image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return mafnet_ops.modulated_deform_conv2d(image, offset, mask, weight, bias, 1, 1)

    implementations = [
        Implementation("mafnet_ops", ours),
        Implementation("recipe + mafnet_ops' convolution", align_recipe(plain)),
    ]
    torchvision = torchvision_deform_conv2d()
    if torchvision is not None:
        recipe = align_recipe(torchvision.call)
        implementations.append(Implementation("recipe + torchvision", recipe))
    # BasicVSR++: two states of 64 channels, 16 offset groups.
    shapes = ((9, 11, 8, 4),) if suite.small else ((64, 64, 128, 16), (180, 320, 128, 16))
    for height, width, channels, groups in shapes:
        for dtype, (layout, memory_format) in itertools.product(suite.dtypes, LAYOUTS.items()):
            torch.manual_seed(0)
            device, low = suite.device, DTYPES[dtype]
            image = torch.randn(1, channels, height, width, device=device)
            weight = torch.randn(64, channels, 3, 3, device=device) / (9 * channels) ** 0.5
            inputs = (
                image.to(low, memory_format=memory_format),
                0.3 * torch.randn(1, 27 * groups, height, width, device=device),
                weight.to(low),
                torch.randn(64, device=device).to(low),
                smooth_flow(height, width, device),
                smooth_flow(height, width, device),
            )
            yield Case(
                op="deform_align",
                shape=f"1x{channels}x{height}x{width} k3 g{groups}",
                dtype=dtype,
                layout=layout,
                distribution="smooth",
                inputs=tuple(t.requires_grad_() for t in inputs),
                implementations=tuple(implementations),
                definition=align_recipe(deform_conv_definition),
                flops=2 * 9 * channels * 64 * height * width,
                terms=9 * channels,
            )


# ----------------------------------------------------------------------------------- self_attention


def naive_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What non-local blocks do: all scores at once."""
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value


def padded_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SDPA's fast kernels want one width for all three; zeros do not change a score."""
    scale, missing = query.shape[-1] ** -0.5, value.shape[-1] - query.shape[-1]
    query, key = F.pad(query, (0, missing)), F.pad(key, (0, missing))
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def attention_definition(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return reference.self_attention(query, key, value, query.shape[-1] ** -0.5)


def self_attention_cases(suite: Suite) -> Iterator[Case]:
    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mafnet_ops.self_attention(query, key, value, query.shape[-1] ** -0.5)

    shapes: tuple[tuple[int, int, int], ...] = ((150, 8, 32),)
    if not suite.small:
        shapes = ((4096, 64, 64), (4096, 8, 64), (16384, 64, 64))
    for length, d_qk, d_v in shapes:
        for dtype, layout in itertools.product(suite.dtypes, LAYOUTS):
            torch.manual_seed(0)
            inputs = [torch.randn(1, 1, length, d, device=suite.device) for d in (d_qk, d_qk, d_v)]
            inputs = [t.to(DTYPES[dtype]) for t in inputs]
            if layout == "planar":  # as convolutions leave it
                inputs = [t.mT.contiguous().mT for t in inputs]
            implementations = [
                Implementation("mafnet_ops", ours),
                Implementation("SDPA", F.scaled_dot_product_attention),
            ]
            if d_qk != d_v:
                implementations.append(Implementation("SDPA, padded", padded_attention))
            if length <= 4096:
                implementations.append(Implementation("softmax + bmm", naive_attention))
            yield Case(
                op="self_attention",
                shape=f"1x1x{length} d{d_qk}/{d_v}",
                dtype=dtype,
                layout=layout,
                distribution="normal",
                inputs=tuple(t.requires_grad_() for t in inputs),
                implementations=tuple(implementations),
                definition=attention_definition,
                flops=2 * length**2 * (d_qk + d_v),
                terms=length,
            )


# ------------------------------------------------------------------------- pyramid_spatial_attention

SLOPE = 0.1  # of every LeakyReLU


def conv_lrelu(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2), SLOPE)


def pool_recipe(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    pools = [F.max_pool2d(image, 3, 2, 1), F.avg_pool2d(image, 3, 2, 1)]
    return conv_lrelu(torch.cat(pools, 1), weight, bias)


def rounded_pool_recipe(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The pooled values in ``dtype``: where that turns the sign of a sum, the activation's slope is the other one."""

    def recipe(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        pools = [F.max_pool2d(image, 3, 2, 1), F.avg_pool2d(image, 3, 2, 1)]
        return conv_lrelu(torch.cat(pools, 1).to(dtype).to(image.dtype), weight, bias)

    return recipe


def gate_recipe(image: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return image * mask.sigmoid() * 2 + conv_lrelu(mask, weight, bias)


def pyramid_recipe(image: Tensor, *parameters: Tensor) -> Tensor:
    """What people write, with EDVR's names in the order of ``LAYERS``."""
    reduce, pool_1, level_2, pool_2, conv_2, add, mask, feature = zip(
        parameters[:8], parameters[8:]
    )

    def resize(small: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(small, size[2:], mode="bilinear", align_corners=False)

    half = pool_recipe(conv_lrelu(image, *reduce), *pool_1)
    quarter = conv_lrelu(pool_recipe(conv_lrelu(half, *level_2), *pool_2), *conv_2)
    merged = conv_lrelu(resize(quarter, half.shape) + half, *add)
    return gate_recipe(image, F.conv2d(resize(merged, image.shape), *mask, padding=1), *feature)


def pyramid_spatial_attention_cases(suite: Suite) -> Iterator[Case]:
    def block(image: Tensor, *parameters: Tensor) -> Tensor:
        return mafnet_ops.pyramid_spatial_attention(image, parameters[:8], parameters[8:])

    channels, height, width = (8, 9, 11) if suite.small else (64, 180, 320)
    small_sides = {"pool_1": (2, 1), "pool_2": (2, 3), "conv_2": (1, 3), "mask": (1, 3)}

    def layer(name: str) -> tuple[Tensor, Tensor]:
        wide, kernel = small_sides.get(name, (1, 1))
        shape = (channels, wide * channels, kernel, kernel)
        weight = torch.randn(shape, device=suite.device) * (2 / shape[1] / kernel**2) ** 0.5
        return weight, torch.randn(channels, device=suite.device)

    def image() -> Tensor:
        return torch.randn(1, channels, height, width, device=suite.device)

    square = channels**2 * height * width
    # The whole block only in float32: in half precision its maps are rounded ten times over, by us and by the recipe.
    recipes: dict[
        str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[str, ...], int]
    ] = {
        "block": (block, pyramid_recipe, ("float32",), 219 * square // 8),
        "pool_concat_conv": (mafnet_ops.pool_concat_conv, pool_recipe, suite.dtypes, square),
        "spatial_gate": (mafnet_ops.spatial_gate, gate_recipe, suite.dtypes, 2 * square),
    }
    for name, (ours, recipe, dtypes, flops) in recipes.items():
        for dtype, (layout, memory_format) in itertools.product(dtypes, LAYOUTS.items()):
            torch.manual_seed(0)
            maps = [image(), image()] if name == "spatial_gate" else [image()]
            if name == "block":
                weights, biases = zip(*map(layer, LAYERS))
                parameters = [*weights, *biases]
            else:
                parameters = list(layer("pool_1" if name == "pool_concat_conv" else "feature"))
            inputs = [t.to(DTYPES[dtype], memory_format=memory_format) for t in maps]
            inputs += [t.to(DTYPES[dtype]) for t in parameters]
            yield Case(
                op="pyramid_spatial_attention",
                shape=f"{name} 1x{channels}x{height}x{width}",
                dtype=dtype,
                layout=layout,
                distribution="normal",
                inputs=tuple(t.requires_grad_() for t in inputs),
                implementations=(
                    Implementation("mafnet_ops", ours),
                    Implementation("PyTorch's ops", recipe),
                ),
                definition=recipe,
                flops=flops,
                terms=9 * channels,
                rounded=rounded_pool_recipe(DTYPES[dtype]) if recipe is pool_recipe else None,
            )


# --------------------------------------------------------------------------------- channel_attention


def channel_recipe(image: Tensor, *parameters: Tensor) -> Tensor:
    """What people write: two poolings and four convolutions."""
    pools = F.adaptive_avg_pool2d(image, 1), F.adaptive_max_pool2d(image, 1)
    layers = list(zip(parameters[:4], parameters[4:]))
    logits = [
        F.conv2d(F.conv2d(pool, *layers[2 * i]).relu(), *layers[2 * i + 1])
        for i, pool in enumerate(pools)
    ]
    return image * (logits[0] + logits[1]).sigmoid()


def channel_attention_cases(suite: Suite) -> Iterator[Case]:
    def ours(image: Tensor, *parameters: Tensor) -> Tensor:
        return mafnet_ops.channel_attention(image, parameters[:4], parameters[4:])

    channels, height, width = (8, 9, 11) if suite.small else (64, 180, 320)
    shapes = [(channels // 4, channels), (channels, channels // 4)] * 2
    for dtype, (layout, memory_format) in itertools.product(suite.dtypes, LAYOUTS.items()):
        torch.manual_seed(0)
        image = torch.randn(1, channels, height, width, device=suite.device)
        parameters = [torch.randn(*s, 1, 1, device=suite.device) / s[1] ** 0.5 for s in shapes]
        parameters += [torch.randn(s[0], device=suite.device) for s in shapes]
        inputs = [image.to(DTYPES[dtype], memory_format=memory_format)]
        inputs += [t.to(DTYPES[dtype]) for t in parameters]
        yield Case(
            op="channel_attention",
            shape=f"1x{channels}x{height}x{width}",
            dtype=dtype,
            layout=layout,
            distribution="normal",
            inputs=tuple(t.requires_grad_() for t in inputs),
            implementations=(
                Implementation("mafnet_ops", ours),
                Implementation("PyTorch's ops", channel_recipe),
            ),
            definition=channel_recipe,
            flops=3 * image.numel(),  # the two statistics and the scale
            terms=channels,
        )


CASES: dict[str, Callable[[Suite], Iterator[Case]]] = {
    "flow_warp": flow_warp_cases,
    "modulated_deform_conv2d": modulated_deform_conv2d_cases,
    "deform_align": deform_align_cases,
    "self_attention": self_attention_cases,
    "pyramid_spatial_attention": pyramid_spatial_attention_cases,
    "channel_attention": channel_attention_cases,
}
