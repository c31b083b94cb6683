"""Libraries with the emulator, linked of the objects that `make build` made and cached by content.

Only common/cpu_simd.cpp is compiled again, to find a processor with AMX (pretend.h): the kernels are
the machine code that is shipped.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "amx_on_cpu"
SIMD = "csrc/common/cpu_simd.cpp"
PRODUCTS = ("csrc/common/cpu_gemm_bf16.cpp", "csrc/self_attention/cpu_tile_products.cpp")


def why_not() -> str | None:
    """The reason nothing can be emulated here, or None."""
    flags = Path("/proc/cpuinfo").read_text().split() if sys.platform == "linux" else []
    if "avx512_bf16" not in flags:
        return "this CPU has no AVX512-BF16, which the kernels for AMX need too"
    if "amx_tile" in flags:
        return "this CPU has AMX itself, which other tests use"
    if _built() is None:
        return "no build folder of the installed mafnet_ops/_C.abi3.so"
    return None


def _built() -> Path | None:
    """The folder in which the library was built that is in use."""
    used = ROOT / "mafnet_ops" / "_C.abi3.so"
    for library in ROOT.glob("build/ext-*/_C.abi3.so"):
        if used.exists() and library.read_bytes() == used.read_bytes():
            return library.parent
    return None


def _command(output: Path) -> list[str]:
    """How ninja makes an output, without it and without stripping."""
    text = (output.parent / "build.ninja").read_text()
    found = re.search(rf"^  command = (.* -o {re.escape(str(output))}\b.*)$", text, re.MULTILINE)
    assert found is not None, output
    words = shlex.split(found[1].replace("$$", "$"))
    at = words.index("-o")
    return [word for word in words[:at] + words[at + 2 :] if word not in ("-s", "-MD")]


def _object(source: str) -> Path:
    folder = _built()
    assert folder is not None
    return folder / f"_C-{source.replace('/', '-')}.o"


def _link(name: str, command: list[str], own: list[str]) -> Path:
    """The library of a command with `own` files of this folder and SIMD, compiled anew."""
    compiler = _command(_object(SIMD))
    at = compiler.index("-MF")
    flags = [word for word in compiler[:at] + compiler[at + 2 :] if word not in ("-c", SIMD)]
    files = [ROOT / SIMD, *(Path(word) for word in command if word.endswith(".o"))]
    files += [*sorted(HERE.glob("*.cpp")), HERE / "pretend.h", *sorted(ROOT.glob("csrc/*/*.h"))]
    digest = hashlib.sha256(repr((command, flags)).encode())
    for path in files:
        digest.update(path.read_bytes())
    target = BUILD / f"{digest.hexdigest()[:16]}-{name}" / name
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        for old in BUILD.glob(f"*-{name}"):
            shutil.rmtree(old)
        with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
            made = [Path(scratch) / f"{i}.o" for i in range(1 + len(own))]
            _run([*flags, "-include", str(HERE / "pretend.h"), "-c", SIMD, "-o", str(made[0])])
            for source, output in zip(own, made[1:]):
                _run([*flags, "-c", str(HERE / source), "-o", str(output)])
            part = Path(scratch) / name
            _run([*command, *map(str, made), "-o", str(part)])
            target.parent.mkdir()
            part.replace(target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-4000:]}"


def extension() -> Path:
    """mafnet_ops._C on a processor with AMX."""
    folder = _built()
    assert folder is not None
    command = [word for word in _command(folder / "_C.abi3.so") if word != str(_object(SIMD))]
    return _link("_C.abi3.so", command, ["emulator.cpp"])


def products() -> Path:
    """The products alone, with probe.cpp."""
    compiler = _command(_object(SIMD))
    first_flag = next(i for i, word in enumerate(compiler) if word.startswith("-"))
    objects = [str(_object(source)) for source in PRODUCTS]
    return _link(
        "products.so", [*compiler[:first_flag], "-shared", *objects], ["emulator.cpp", "probe.cpp"]
    )
