"""Runs the tests of the twins on a GPU: the primitives themselves, held to the same tables and sums.

python tests/cuda_on_cpu/twins_on_device.py     # needs nvcc and a CUDA build of torch; exits 0 where they agree
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from cuda_on_cpu import test_twins as twins  # noqa: E402
from cuda_on_cpu.build import CSRC, HERE  # noqa: E402

ORDER = {
    "mma": ("a", "b", "d"),
    "load": ("rows", "loaded"),
    "copy": ("source", "target", "valid"),
    "round": ("values", "rounded"),
    "split": ("values", "wholes", "parts"),
}
KIND = {
    "cp_async": "copy",
    "to_tf32": "round",
    "split_floor": "split",
}  # of the entries that are neither mma nor ldmatrix


class Clean:
    """A launch that went well."""

    def raise_if_any(self) -> None:
        pass


class DeviceKernels:
    """The entries of kernels/twins.cu as ``Kernels`` of the emulator has them, on the current GPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def run(self, entry: str, /, **arguments: np.ndarray | bool) -> Clean:
        """Copies the arrays to the device, launches, and copies them back in place."""
        kind = KIND.get(entry, "load" if entry.startswith("ldmatrix") else "mma")
        held: list[tuple[np.ndarray, torch.Tensor]] = []
        values: list[ctypes.c_void_p | ctypes.c_int] = []
        for name in ORDER[kind]:
            value = arguments[name]
            if isinstance(value, np.ndarray):
                copy = torch.from_numpy(value.reshape(-1).view(np.uint8).copy()).cuda()
                held.append((value, copy))
                values.append(ctypes.c_void_p(copy.data_ptr()))
            else:
                values.append(ctypes.c_int(value))
        status = self._library[f"run_{entry}"](*values)
        assert status == 0, f"{entry}: CUDA error {status}"
        torch.cuda.synchronize()
        for array, copy in held:
            array[...] = copy.cpu().numpy().view(array.dtype).reshape(array.shape)
        return Clean()


def compile_twins(folder: Path, architecture: str) -> Path:
    """kernels/twins.cu as a shared library."""
    nvcc = twins.nvcc()
    if nvcc is None:
        raise SystemExit("twins_on_device: no nvcc found (set CUDA_HOME)")
    library = folder / "twins.so"
    command = [nvcc, "-std=c++17", f"-arch={architecture}", "-shared", "-Xcompiler=-fPIC"]
    command += [f"-I{CSRC}", str(HERE / "kernels" / "twins.cu"), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def main() -> int:
    if not torch.cuda.is_available():
        raise SystemExit("twins_on_device: no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        kernels = DeviceKernels(compile_twins(Path(folder), f"sm_{major}{minor}"))
    names = list(twins.MMA) if major >= 8 else ["f16_k16", "f16_k8"]  # sm_75 has no bf16 and tf32
    for name in names:
        twins.test_mma_multiplies_and_adds(kernels, name)  # type: ignore[arg-type]
        twins.test_each_fragment_element_alone(kernels, name)  # type: ignore[arg-type]
    if major >= 8:
        twins.test_rounding_to_tf32(kernels)  # type: ignore[arg-type]
    for name in twins.LAYOUTS:
        if name.startswith("ldmatrix"):
            twins.test_ldmatrix(kernels, name)  # type: ignore[arg-type]
    twins.test_splitting_off_the_floor(kernels)  # type: ignore[arg-type]
    for valid in (False, True):
        twins.test_cp_async_copies_and_fills_with_zeros(kernels, valid)  # type: ignore[arg-type]
    print(f"{torch.cuda.get_device_name()}: the primitives agree with their twins")
    return 0


if __name__ == "__main__":
    sys.exit(main())
