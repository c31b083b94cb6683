"""Make sure that the kernels are built and load: a library carried along is used, else one is built in place."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from machine import ROOT

CHECK = """
import sys, mafnet_ops
from mafnet_ops import _library
from mafnet_ops.doctor import doctor
print(doctor())
sys.exit(0 if _library.LOAD_ERRORS[sys.argv[1]] is None else 3)
"""


def loads(device: str) -> bool:
    """Asked in a new process, since a failed import is remembered."""
    return subprocess.run([sys.executable, "-c", CHECK, device], cwd=ROOT).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = parser.parse_args().device
    if loads(device):
        print("the library that is here loads")
        return 0
    cuda = {"MAFNET_CUDA": "1" if device == "cuda" else "0", "MAFNET_CUDA_ARCHS": "native"}
    environment = {**cuda, **os.environ, "MAFNET_REQUIRE_EXT": "1"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if subprocess.run(build, cwd=ROOT, env=environment).returncode != 0:
        return 1
    return 0 if loads(device) else 1


if __name__ == "__main__":
    sys.exit(main())
