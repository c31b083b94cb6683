"""The kernels for tile registers (AMX) on a CPU without: see README.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from amx_on_cpu import build

HERE = Path(__file__).resolve().parent
EMULATED = os.pathsep.join([str(HERE / "emulated"), str(HERE.parent)])
REASON = build.why_not()

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulated AMX: {REASON}")


def run(*command: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], int]:
    """A Python program with the emulator, and how many products of tiles it computed."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": EMULATED, **environment},
        capture_output=True,
        text=True,
        cwd=build.ROOT,
    )
    count = re.findall(r"^amx_on_cpu: (\d+) products", done.stderr, re.MULTILINE)
    return done, int(count[-1]) if count else 0


@pytest.mark.slow(minutes=0.3)
def test_every_tile_instruction_is_needed() -> None:
    """Sums are exact, and are not with any instruction left out or misplaced: none is idle or never reached."""
    program = str(HERE / "products.py")
    done, _ = run(program, str(build.products()), PYTHONPATH="", OPENBLAS_NUM_THREADS="1")
    assert re.fullmatch(r"\d{2,} instructions, not noticed: 0\n", done.stdout), done


MISUSE = {
    "unconfigured": "a tile is used while none are configured",
    "after_release": "a tile is used while none are configured",
    "tile_not_configured": "a tile is used that is not configured",
    "palette": "the palette is not 1",
    "rows": "a tile has more than 16 rows",
    "bytes": "a tile has more than 16 rows of 64 bytes",
    "rows_of_no_bytes": "or rows of no bytes",
    "open_twice": "tiles are configured that have not been released",
    "close_twice": "tiles are released that were not configured",
    "not_closed": "tiles are still configured at the end",
    "stride": "rows of a tile overlap in memory",
    "not_zeroed": "a tile is read that was neither zeroed nor loaded",
    "stored_before": "a tile is read that was neither zeroed nor loaded",
    "shapes": "the tiles of a product do not fit",
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_reported(name: str) -> None:
    library = f"ctypes.CDLL({str(build.products())!r})"
    code = f"import ctypes; lib = {library}; lib.probe_level(); lib.misuse_{name}()"
    done, _ = run("-c", code, PYTHONPATH="")
    assert done.returncode != 0
    assert MISUSE[name] in done.stderr


def test_all_misuse_is_tried() -> None:
    source = (HERE / "probe.cpp").read_text()
    assert sorted(re.findall(r"misuse_(\w+)\(\)", source)) == sorted(MISUSE)


ATTENTION = """
import torch
from mafnet_ops import self_attention
torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, 40, 16).bfloat16() for _ in range(3))
exact = torch.softmax(q.double() @ k.double().mT, -1) @ v.double()
# Weights and output are rounded to bfloat16.
assert (self_attention(q, k, v) - exact).abs().max() < 2 * 2**-8 * v.abs().max()
"""


@pytest.mark.parametrize(
    "environment, served",
    [({}, True), ({"MAFNET_SIMD": "avx512bf16"}, False), ({"MAFNET_AMX_REFUSED": "1"}, False)],
    ids=["granted", "a lower level", "refused"],
)
def test_tiles_are_used_where_they_are_granted(environment: dict[str, str], served: bool) -> None:
    done, products = run("-c", ATTENTION, **environment)
    assert done.returncode == 0, done.stderr
    assert (products > 0) == served


# Files of tests, what is run of them, and how many products of tiles come of it at least.
OPS = {
    "self_attention": (
        ["ops/test_self_attention.py"],
        "(several_blocks and 0.5 and not dtype0) or special_values or small",
        100_000,
    ),
    "threads": (["ops/test_self_attention.py"], "number_of_threads and dtype1", 100_000),
    "modulated_deform_conv2d": (
        ["ops/test_modulated_deform_conv2d.py"],
        "(vector_level and amx) or bfloat16 or (low_precision and dtype2)",
        500,
    ),
    "others": (
        [
            "ops/test_deform_align.py",
            "ops/test_pyramid_spatial_attention.py",
            "model/test_model.py",
        ],
        "(low_precision_values and dtype2) or test_other_dtypes",
        3000,
    ),
}


@pytest.mark.slow(minutes=0.5)
@pytest.mark.parametrize("name", OPS)
def test_ops(name: str) -> None:
    """Their own tests, at the level of AMX."""
    files, chosen, least = OPS[name]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    done, products = run(*command, *(str(HERE.parent / file) for file in files))
    assert done.returncode == 0, done.stdout + done.stderr
    assert products >= least, done.stdout
