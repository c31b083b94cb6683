"""No barrier and no condition of a kernel is idle: without it, a test of the op must fail.

What can be lost is found in the sources (mutants.py), so a new barrier or bound check is tried as well. An op brings
its probe, a short run of its checks; what to leave out of the copies to compile fast; and the few conditions that
change no result, with the reason.

``make mutations`` tries all of them, a quarter of an hour; ``make test`` some that are spread over all files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cuda_on_cpu import (
    flow_warp_cases,
    modulated_deform_conv2d_probe,
    pyramid_spatial_attention_probe,
)
from cuda_on_cpu.build import CSRC, build
from cuda_on_cpu.emulator import Kernels, needs_emulator, op_library
from cuda_on_cpu.mutants import Mutant, find, kernel_files
from cuda_on_cpu.trial import which_are_noticed

pytestmark = [needs_emulator, pytest.mark.slow]


def case_of(name: str) -> str:
    """A case of dispatch_dtype or dispatch_interpolation, to be left out."""
    if name in ("kFloat64", "kBFloat16"):
        body = {"kFloat64": "double", "kBFloat16": "BFloat16"}[name]
        return f"    case Dtype::{name}:\n      return body(Type<{body}>{{}});\n"
    constant = f"InterpolationConstant<Interpolation::{name}>{{}}"
    return f"    case Interpolation::{name}:\n      return body({constant});\n"


# file -> cases that the probes do without: a mutant then compiles in a third of the time
LEFT_OUT = {
    "common/dtype.h": ("kFloat64", "kBFloat16"),
    "common/sampler.h": ("kNearest", "kBicubic"),
}


MOST_MUTANTS = 24  # of an op in a run of all tests


@dataclass(frozen=True)
class Op:
    """How a folder of csrc is tried."""

    probe: Callable[[Kernels], None]
    # (file, what is removed) -> why no result changes
    idle: dict[tuple[str, str], str] = field(default_factory=dict)


_NO_FAILURE = "no launch fails here"
_LARGE = "images of this size are too large for a test"
DENSE = "output is allocated densely: channels last and aligned wherever input is"
_POSITION = "saves a position that is there already"
DEFORM_IDLE = {
    **{
        (f"{file}.cu", "status != 0"): _NO_FAILURE
        for file in (
            "backward",
            "backward_weight",
            "backward_fixed_point",
            "forward_tensor_core",
            "backward_tensor_core",
            "backward_weight_tensor_core",
        )
    },
    **{
        (f"{file}.cu", "offset_group != sampled_group"): _POSITION
        for file in ("forward", "backward_weight")
    },
    (
        "backward.cu",
        "p.grad_input != nullptr || p.grad_offset != nullptr || p.grad_mask != nullptr || "
        "p.flow_partials != nullptr",
    ): "saves gradients that nobody wants",
    ("backward_fixed_point.cu", "threadIdx.x == 0"): "saves maxima of the same number",
    ("backward_fixed_point.cu", "channels_last"): "the order in which a maximum is taken",
    ("forward_tensor_core.cu", "has_bfloat16_tensor_cores()"): "the emulator has them",
    ("forward_tensor_core.cu", "p.output_stride[1] == 1"): DENSE,
    ("tensor_core.cuh", "has_bfloat16_tensor_cores()"): "the emulator has them",
    **{
        ("tensor_core.cuh", limit): _LARGE
        for limit in (
            "coordinates_fit",
            "fits(2 * planes, pixels, offset[1], offset[2], p.offset_dtype)",
            "fits(planes, pixels, mask[1], mask[2], p.mask_dtype)",
            *(
                f"fits(2, pixels, p.raw.flow_stride[{i}][2], p.raw.flow_stride[{i}][1], p.raw.flow_dtype)"
                for i in (0, 1)
            ),
            "fits(p.height, columns, p.input_stride[2], 1, p.dtype)",
            "pixels <= kMostPixels",
            "p.height <= kMostPositions",
            "p.width <= kMostPositions",
        )
    },
    **{
        ("tensor_core.cuh", some): "the strides of an empty array are 0 here"
        for some in ("p.height > 0", "p.width > 0", "p.batch * p.pixels() > 0")
    },
    (
        "tensor_core.cuh",
        "p.out_channels % kLaneChannels == 0",
    ): "else neither a dense output nor grad_output is aligned",
    ("backward_tensor_core.cu", "is_grad_small"): _LARGE,
    ("backward_tensor_core.cu", "status == 0"): _NO_FAILURE,
    ("backward_weight_tensor_core.cu", "sums_bias"): "saves sums that nobody stores",
    (
        "forward_tensor_core.cu",
        "is_aligned(p.output, p.output_stride[0], p.output_stride[2])",
    ): DENSE,
}

OPS = {
    "flow_warp": Op(
        flow_warp_cases.probe,
        idle={
            ("backward.cu", "p.grad_flow != nullptr"): "saves the dot products that nobody wants",
            (
                "backward.cu",
                "I != Interpolation::kNearest",
            ): "saves dot products with slopes of zero",
            (
                "backward_deterministic.cu",
                "row >= 0",
            ): "row -1 gives a number below those of all pixels",
            **{
                (file, "p.channels_last"): "planes have a pixel stride of 1, never aligned"
                for file in ("forward.cu", "backward.cu", "backward_deterministic.cu")
            },
            (
                "footprint.cuh",
                "p.channels % kVector<T> == 0",
            ): "output and grad_input are dense: other channels give them strides that are not aligned",
            **{
                (file, f"is_aligned<T>(p, p.{name}, p.{name}_stride)"): DENSE
                for file, name in (
                    ("forward.cu", "output"),
                    ("backward.cu", "grad_input"),
                    ("backward_deterministic.cu", "grad_input"),
                )
            },
        },
    ),
    "modulated_deform_conv2d": Op(
        modulated_deform_conv2d_probe.probe,
        idle=DEFORM_IDLE,
    ),
    "pyramid_spatial_attention": Op(
        pyramid_spatial_attention_probe.probe,
        idle={
            **{
                (file, "status != 0"): _NO_FAILURE
                for file in ("convolution_backward.cu", "gate_backward.cu", "weight_gradient.cuh")
            },
            ("convolution_backward.cu", "p.grad_input.data != nullptr"): "workspace for nobody",
            ("image.cuh", "channels_last"): "which thread does what",
            (
                "tensor_core.cuh",
                "units > kMostUnits || tile == blockIdx.x",
            ): "saves reading the same weights again",
            ("tensor_core.cuh", "has_bfloat16_tensor_cores()"): "the emulator has them",
            (
                "weight_gradient.cuh",
                "!p.wanted() || p.outputs == 0",
            ): "saves sums that nobody stores",
        },
    ),
}


def folders() -> list[str]:
    return sorted({path.parent.name for path in CSRC.glob("*/*.cu")})


def mutants_of(op: str) -> list[Mutant]:
    return [mutant for file in kernel_files(CSRC, op) for mutant in find(CSRC, file)]


def tried(mutants: list[Mutant]) -> list[Mutant]:
    """All of them, or every n-th."""
    if os.environ.get("MAFNET_MUTANTS") == "all":
        return mutants
    return mutants[:: -(-len(mutants) // MOST_MUTANTS)]


def key(mutant: Mutant) -> tuple[str, str]:
    return Path(mutant.file).name, mutant.removed


def changed_copy(target: Path, op: str, mutant: Mutant | None) -> Path:
    """csrc/common and csrc/<op>, without what LEFT_OUT says, and with the mutation."""
    for folder in ("common", op):
        shutil.copytree(CSRC / folder, target / folder)
    for file, names in LEFT_OUT.items():
        text = (target / file).read_text()
        for name in names:
            assert case_of(name) in text, f"{file} has no case {name} of this form any more"
            text = text.replace(case_of(name), "")
        (target / file).write_text(text)
    if mutant is not None:
        mutant.apply(target)
    return target


def test_every_op_with_kernels_is_tried() -> None:
    assert sorted(OPS) == folders()


@pytest.mark.parametrize("op", OPS)
def test_each_barrier_and_condition_is_needed(op: str, tmp_path: Path) -> None:
    mutants = mutants_of(op)
    assert mutants
    idle = OPS[op].idle
    gone = set(idle) - {key(mutant) for mutant in mutants}
    assert not gone, f"listed as idle, but no longer there: {gone}"
    mutants = tried(mutants)
    copies = [changed_copy(tmp_path / str(i), op, m) for i, m in enumerate([None, *mutants])]
    libraries = build([op_library(op, True, csrc) for csrc in copies])
    original, *noticed = which_are_noticed(OPS[op].probe, libraries)
    assert not original, "the probe fails on the sources as they stand"
    wrong = []
    for mutant, seen in zip(mutants, noticed):
        if seen == (key(mutant) in idle):
            what = "is listed as idle, but missed" if key(mutant) in idle else "is not missed"
            wrong.append(f"{mutant} {what}")
    assert not wrong, "\n".join(wrong)


def test_finding_mutants(tmp_path: Path) -> None:
    """Barriers, waits, conditions, conjuncts and guarded values are found; comments are not."""
    (tmp_path / "k.cu").write_text(
        "if (i >= n) return;  // if (x) __syncthreads();\n"
        "__syncthreads();\n"
        "cp_async_wait<1>();\n"
        "const bool used = a >= 0 && f(b, c) < 3;\n"
        "for (int c = 0; active && c < n; ++c) {}\n"
        "x = used ? y[i] : 0;\n"
        "if constexpr (kFlag) return;\n"
        "constexpr int n = kFlag ? 1 : mode == Mode::kSlow ? 2 : 3;\n"
        "__syncwarp(mask);\n"
        "x = i < p.size ? y[i] : 0;\n"
        "if (p != nullptr) *p = 1;\n"
    )
    found = [(m.line, m.removed, m.replacement) for m in find(tmp_path, "k.cu")]
    assert found == [
        (1, "i >= n", "false"),
        (2, "__syncthreads();", ";"),
        (3, "cp_async_wait<1>();", ";"),
        (4, "a >= 0", "true"),
        (4, "f(b, c) < 3", "true"),
        (5, "active", "true"),
        (5, "c < n", "true"),
        (6, "used", "true"),
        (9, "__syncwarp(mask);", ";"),
        (10, "i < p.size", "true"),
        (11, "p != nullptr", "true"),
    ]
    first = find(tmp_path, "k.cu")[0]
    first.apply(tmp_path)
    assert (tmp_path / "k.cu").read_text().startswith("if (false) return;  // if (x)")
