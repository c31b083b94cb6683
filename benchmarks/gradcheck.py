"""Every op's gradients against finite differences, in float64, on the device that is asked for."""

from __future__ import annotations

import argparse
import sys

import torch
from cases import CASES, Suite
from torch.autograd.gradcheck import GradcheckError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = parser.parse_args().device
    failed = 0
    for op, cases in CASES.items():
        case = next(cases(Suite(device, small=True)))
        inputs = tuple(t.detach().double().requires_grad_() for t in case.inputs)
        try:
            # Fast mode: random projections instead of every element. The scatter of grad_input adds in any
            # order on CUDA, which float64 rounds to nothing beside the default tolerances.
            torch.autograd.gradcheck(
                case.implementations[0].call, inputs, fast_mode=True, nondet_tol=1e-10
            )
            print(f"{op}: gradients agree with finite differences")
        except GradcheckError as error:
            failed += 1
            print(f"{op}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
