"""Compiles kernels for the emulator: g++ alone, cached by content under build/cuda_on_cpu.

An object is known by its command line and by the text of its source and of all that it includes, so
that a copy of csrc/ with one line changed compiles one file again.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_on_cpu"
SOURCES = HERE / "src"

COMMON_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
KERNEL_FLAGS = (*COMMON_FLAGS, "-Wno-unknown-pragmas", "-x", "c++")  # "#pragma unroll" is nvcc's
FAST_FLAGS = ("-O2", "-march=native")
# Instrumented as for ThreadSanitizer and UBSan; their functions are those of sanitizer.cpp.
CHECKED_FLAGS = (
    "-O1",
    "-g1",
    "-march=native",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=undefined,float-cast-overflow",
    "-fno-sanitize=vptr,null,returns-nonnull-attribute",
    "-Wno-maybe-uninitialized",  # the instrumentation hides from g++ what is assigned
)
RUNTIME_FLAGS = (*COMMON_FLAGS, "-O2", "-march=native")
UNUSED_FOR = 14 * 86400  # seconds after which a cached file is removed
JOBS = 2


class CompileError(Exception):
    """The compiler refused; its words."""


Part = tuple[Path, tuple[str, ...], tuple[Path, ...]]  # source, flags, include folders


@dataclass(frozen=True)
class Library:
    """What one Python module is made of."""

    kernels: tuple[Path, ...]  # .cu files, instrumented in a checked build
    checked: bool
    bindings: tuple[Path, ...] = ()
    defines: tuple[str, ...] = ()
    csrc: Path = CSRC  # or a changed copy of it


def why_not() -> str | None:
    """The reason nothing can be built here, or None."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not shutil.which(compiler()[0]):
        return f"no C++ compiler: {compiler()[0]}"
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        return f"{shlex.join(compiler())} is not g++"
    return None


def compiler() -> list[str]:
    """CXX or g++, as a command line."""
    return shlex.split(os.environ.get("CXX") or "g++")


@functools.cache
def _compiler_identity() -> str:
    """The compiler's version and what -march=native means on this CPU."""
    macros = [*compiler(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(macros, capture_output=True, text=True, check=True).stdout


@functools.cache
def _python_flags() -> tuple[str, ...]:
    import pybind11

    return (f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}")


def _included(source: Path, folders: Sequence[Path], found: dict[str, Path]) -> None:
    """Adds the files that source includes with quotes, and those that they include, to found."""
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', source.read_text(), re.MULTILINE):
        candidates = (folder / name for folder in (source.parent, *folders))
        path = next((c for c in candidates if c.exists()), None)
        if path is not None and name not in found:
            found[name] = path
            _included(path, folders, found)


def _key(source: Path, flags: Sequence[str], folders: Sequence[Path]) -> str:
    found: dict[str, Path] = {}
    _included(source, folders, found)
    digest = hashlib.sha256(_compiler_identity().encode())
    digest.update(repr((source.name, tuple(flags))).encode())
    digest.update(source.read_bytes())
    for name in sorted(found):
        digest.update(name.encode() + b"\0" + found[name].read_bytes())
    return digest.hexdigest()[:20]


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A path to write to that becomes target once it is complete: other processes build here too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        part = Path(scratch) / target.name
        yield part
        part.replace(target)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{done.stderr[-4000:]}")


def _object(source: Path, flags: Sequence[str], folders: Sequence[Path]) -> Path:
    """The compiled source, from the cache if it is there."""
    target = BUILD / f"{source.stem}-{_key(source, flags, folders)}.o"
    if target.exists():
        os.utime(target)
    else:
        with _made_whole(target) as part:
            includes = [f"-I{folder}" for folder in folders]
            _run([*compiler(), *includes, *flags, "-c", str(source), "-o", str(part)])
    return target


def _parts(library: Library) -> list[Part]:
    """What every object of the library is made of."""
    own: tuple[Path, ...] = (SOURCES,)
    project: tuple[Path, ...] = (SOURCES, library.csrc)
    kernel_flags = (*KERNEL_FLAGS, *(CHECKED_FLAGS if library.checked else FAST_FLAGS))
    left_out = {"checker_off.cpp"} if library.checked else {"checker.cpp", "sanitizer.cpp"}
    runtime = sorted(p for p in SOURCES.glob("*.cpp") if p.name not in left_out)
    harness = SOURCES / "harness.cpp"
    parts: list[Part] = [(harness, (*COMMON_FLAGS, "-O1", *_python_flags()), own)]  # longest first
    parts += [(path, kernel_flags, project) for path in library.kernels]
    parts += [(path, RUNTIME_FLAGS, project) for path in library.bindings]
    parts += [(path, RUNTIME_FLAGS, own) for path in runtime if path != harness]
    return [_defined(library, *part) for part in parts]


def _defined(
    library: Library, source: Path, flags: tuple[str, ...], folders: tuple[Path, ...]
) -> Part:
    """With the macros that the source names: the others cannot change its object."""
    text = source.read_text() if library.defines else ""
    return source, (*flags, *(f"-D{name}" for name in library.defines if name in text)), folders


def build(libraries: Sequence[Library]) -> list[Path]:
    """The shared objects of the libraries, compiled with JOBS processes where not cached."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(JOBS) as pool:
            parts = {part: None for library in libraries for part in _parts(library)}
            objects = dict(zip(parts, pool.map(lambda part: _object(*part), parts)))
            return list(pool.map(lambda library: _link(library, objects), libraries))


def _link(library: Library, objects: dict[Part, Path]) -> Path:
    inputs = [str(objects[part]) for part in _parts(library)]
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:20]
    target = BUILD / f"{library.kernels[0].stem}-{key}" / "kernels.so"
    if target.exists():
        os.utime(target)
    else:
        with _made_whole(target) as part:
            _run([*compiler(), "-shared", "-o", str(part), *inputs])
    return target


def remove_unused() -> None:
    """Clears the cache of what no run has used for a while."""
    now = time.time()
    for path in [*BUILD.glob("*.o"), *BUILD.glob("*/kernels.so")]:
        if now - path.stat().st_mtime > UNUSED_FOR:
            path.unlink()
