"""What must notice the loss of any barrier or condition of the kernels of modulated_deform_conv2d."""

from __future__ import annotations

from cuda_on_cpu import (
    deform_align_cases,
    modulated_deform_conv2d_cases,
    modulated_deform_conv2d_tensor_core_cases,
)
from cuda_on_cpu.emulator import Kernels


def probe(kernels: Kernels) -> None:
    modulated_deform_conv2d_cases.probe(kernels)
    modulated_deform_conv2d_tensor_core_cases.probe(kernels)
    deform_align_cases.probe(kernels)
