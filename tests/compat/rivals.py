"""docs/rivals.md: what others do of what docs/support.md holds; ``python tests/compat/rivals.py`` writes it.

torchvision and PyTorch are called, feature by feature, on the CPU. mmcv and BasicSR are read: their compiled parts
do not build beside this torch, and BasicSR's have no CPU path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

ROOT = Path(__file__).resolve().parents[2]
DOCS_PAGE = ROOT / "docs" / "rivals.md"
HALF = (torch.float16, torch.bfloat16)
# Beyond 1024 a column in fp16 has no fractions; above 32,767 pixels grid_sample of the CPU leaves its memory in half
# precision.
HEIGHT, WIDTH = 16, 1500


@dataclass(frozen=True)
class Rival:
    """A function that others offer for one of our ops."""

    name: str
    call: Callable[..., Tensor]
    make: Callable[[int, int, int], list[Tensor]]
    """(batch, H, W) -> fp64 arguments."""


def _uniform(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def _convolution(batch: int, height: int, width: int) -> list[Tensor]:
    size = (height, width)
    offset, mask = _uniform(batch, 18, *size, seed=1), _uniform(batch, 9, *size, seed=2)
    return [_uniform(batch, 4, *size, seed=0), offset, mask, _uniform(4, 4, 3, 3, seed=3)]


def _warp(batch: int, height: int, width: int) -> list[Tensor]:
    return [_uniform(batch, 4, height, width, seed=0), _uniform(batch, height, width, 2, seed=1)]


def _grid_sample(image: Tensor, flow: Tensor) -> Tensor:
    """The recipe of BasicSR and mmagic."""
    height, width = image.shape[2:]
    x = torch.arange(width, dtype=flow.dtype) + flow[..., 0]
    y = torch.arange(height, dtype=flow.dtype)[:, None] + flow[..., 1]
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], 3)
    return F.grid_sample(image, grid, align_corners=True)


def _attention(batch: int, height: int, width: int) -> list[Tensor]:
    tokens = min(height * width, 512)
    return [_uniform(batch, 2, tokens, d, seed=s) for s, d in enumerate((3, 3, 5))]


def rivals() -> list[Rival]:
    import torchvision

    def convolution(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torchvision.ops.deform_conv2d(input, offset, weight, padding=1, mask=mask)
        return out

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)

    return [
        Rival("torchvision `deform_conv2d`", convolution, _convolution),
        Rival("`grid_sample` of pixels", _grid_sample, _warp),
        Rival("`scaled_dot_product_attention`", attention, _attention),
    ]


# --------------------------------------------------------------------------------------------- features


def in_dtype(rival: Rival, dtype: torch.dtype) -> str:
    """Forward and backward; the mean error may be 8 roundings, and what an fp32 column of 1500 loses."""
    tensors = [t.to(dtype).requires_grad_() for t in rival.make(1, HEIGHT, WIDTH)]
    output = rival.call(*tensors)
    output.sum().backward()
    exact = rival.call(*(t.detach().double() for t in tensors))
    error = (output.detach().double() - exact).norm() / exact.norm()
    allowed = 8 * torch.finfo(dtype).eps
    if dtype != torch.float64:
        allowed += 4 * WIDTH * torch.finfo(torch.float32).eps
    return "yes" if error <= allowed else f"wrong: {100 * error:.0f} % off"


def under_autocast(rival: Rival) -> str:
    """bfloat16: features low, coordinates not."""
    tensors = [t.float() for t in rival.make(1, 5, 6)]
    with torch.autocast("cpu", torch.bfloat16):
        dtype = rival.call(*tensors).dtype
    return "yes" if dtype == torch.bfloat16 else "stays float32"


def channels_last(rival: Rival) -> str:
    tensors = rival.make(2, 5, 6)
    expected = rival.call(*tensors)
    actual = rival.call(tensors[0].to(memory_format=torch.channels_last), *tensors[1:])
    torch.testing.assert_close(actual, expected)
    kept = actual.is_contiguous(memory_format=torch.channels_last)
    return "yes" if kept else "right, not kept"


def no_images(rival: Rival) -> str:
    tensors = [t.requires_grad_() for t in rival.make(0, 5, 6)]
    rival.call(*tensors).sum().backward()
    return "yes"


def first_derivatives(rival: Rival) -> str:
    return _checked(gradcheck(rival.call, _leaves(rival), fast_mode=True))


def second_derivatives(rival: Rival) -> str:
    return _checked(gradgradcheck(rival.call, _leaves(rival), fast_mode=True))


def forward_mode(rival: Rival) -> str:
    """Against differences of the function."""
    tensors = rival.make(1, 2, 3)
    tangents = [_uniform(*t.shape, seed=9) for t in tensors]
    _, actual = torch.func.jvp(rival.call, tuple(tensors), tuple(tangents))  # type: ignore[misc]
    step = 1e-6
    ahead, behind = (
        rival.call(*(t + sign * step * d for t, d in zip(tensors, tangents))) for sign in (1, -1)
    )
    expected = (ahead - behind) / (2 * step)
    if torch.allclose(actual, expected, rtol=1e-4, atol=1e-6):
        return "yes"
    return "wrong: 0" if not actual.any() else "wrong"


def vmapped(rival: Rival) -> str:
    tensors = [torch.stack([t, t + 0.01]) for t in rival.make(1, 2, 3)]
    together = torch.vmap(rival.call)(*tensors)
    for one, *arguments in zip(together, *tensors):
        torch.testing.assert_close(one, rival.call(*arguments))
    return "yes"


def compiled(rival: Rival) -> str:
    torch._dynamo.reset()
    function = torch.compile(rival.call, backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for height, width in ((10, 7), (9, 11)):
            function(*rival.make(1, height, width))
    return "yes"


def _leaves(rival: Rival) -> list[Tensor]:
    return [t.requires_grad_() for t in rival.make(1, 2, 3)]


def _checked(right: bool) -> str:
    return "yes" if right else "wrong"


FEATURES: dict[str, Callable[[Rival], str]] = {
    **{
        f"{str(dtype).removeprefix('torch.')}, {HEIGHT}x{WIDTH}": (
            lambda rival, dtype=dtype: in_dtype(rival, dtype)
        )
        for dtype in (torch.float64, torch.float32, *HALF)
    },
    "autocast to bfloat16": under_autocast,
    "channels_last": channels_last,
    "batch of 0": no_images,
    "gradcheck": first_derivatives,
    "gradgradcheck": second_derivatives,
    "torch.func.jvp": forward_mode,
    "torch.vmap": vmapped,
    "torch.compile: one graph, dynamic shapes": compiled,
}

READ = """
| | mmcv 2.1.0 `modulated_deform_conv2d` | BasicSR 1.4.2 `modulated_deform_conv` |
|---|---|---|
| dtypes | float64, float32, float16; coordinates in that dtype [1] | the same [3] |
| on the CPU | yes [1] | raises NotImplementedError [4] |
| second derivatives | raise: `once_differentiable` [2] | raise: `once_differentiable` [4] |
| torch.func, vmap | refused: an autograd.Function without `setup_context` [2] | the same [4] |
| ONNX | a node of its own domain, `mmcv::MMCVModulatedDeformConv2d` [2] | none [4] |
| autocast | everything takes the dtype of the offsets [2] | none [4] |

Read in: [1] `mmcv/ops/csrc/pytorch/cpu/modulated_deform_conv.cpp`, [2] `mmcv/ops/modulated_deform_conv.py`,
[3] `basicsr/ops/dcn/src/deform_conv_cuda_kernel.cu`, [4] `basicsr/ops/dcn/deform_conv.py`.
"""


def outcome(feature: Callable[[Rival], str], rival: Rival) -> str:
    try:
        return feature(rival)
    except Exception as error:  # whatever a library raises is the answer
        return f"raises {type(error).__name__}"


def table() -> str:
    """A row per feature, a column per function."""
    columns = rivals()
    lines = [
        "| | " + " | ".join(rival.name for rival in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for title, feature in FEATURES.items():
        cells = [outcome(feature, rival) for rival in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def versions() -> str:
    import torchvision

    both = (("torch", torch.__version__), ("torchvision", torchvision.__version__))
    return ", ".join(f"{name} {version.split('+')[0]}" for name, version in both)


def render() -> str:
    return f"""# What others offer

[`support.md`](support.md) has what `mafnet_ops` does. The first table here is made by calling, on the CPU, with
{versions()}: `python tests/compat/rivals.py` in the environment of `make test-compat`, whose tests
compare the two. The second is read in the libraries' sources.

A dtype runs forward and backward on an image of {HEIGHT}x{WIDTH}, everything in that dtype: `wrong` is a mean
error beyond 8 roundings of it and what fp32 columns lose; beyond 1024 a column in fp16 has no fractions. `raises` names
the error. Above 32,767 pixels `grid_sample` of the CPU leaves its memory in half precision: the image is smaller.

{table()}{READ}"""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    DOCS_PAGE.write_text(render())
