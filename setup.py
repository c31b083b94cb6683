"""Builds mafnet_ops._C (CPU) and, where it is of use, mafnet_ops._C_cuda. Never imports torch.

Both libraries use the LibTorch stable ABI and the Python limited API, so one cp310-abi3 wheel serves
every torch >= 2.11 and every Python >= 3.10. This file is also the PEP 517 backend (see pyproject.toml).

Environment:
  MAFNET_CUDA         auto (default): build _C_cuda if nvcc is found, unless the torch beside it is a
                      build without CUDA, which could not load it | 1: build it, or fail | 0
  MAFNET_CUDA_ARCHS   e.g. "80;90a+PTX", or "native" for the local GPU alone. Default: native where there
                      is a GPU and MAFNET_CUDA is not 1 (a build to use here, in a fraction of the time),
                      else "75;80;86;89;90a;100+PTX;120", with nvcc before 12.8 "75;80;86;89;90a;90+PTX"
  MAFNET_REQUIRE_EXT  1: fail where no C++ compiler is found, instead of installing without kernels
  MAX_JOBS, CXX, CUDA_HOME as usual
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, build_meta, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "75;80;86;89;90a;100+PTX;120"
NEW_NVCC = (12, 8)  # the first that knows sm_100 and sm_120, and how to compress for size
OLD_NVCC_ARCHS = "75;80;86;89;90a;90+PTX"
# Assembled from the PTX of the second, where that is listed too, in less time: the sources ask for
# sm_80 and sm_90 at most (common/prims.cuh), so that its own PTX would be the same.
SHARED_PTX = {"86": "80", "89": "80", "120": "100"}
LAUNCHERS = ("ccache", "distcc", "sccache")  # which CXX may put before the compiler that nvcc wants
TORCH_TARGET = "0x020b000000000000"  # torch 2.11, the oldest whose stable ABI has all we use
PYTHON_TARGET = "0x030a0000"  # CPython 3.10
NVCC_REQUIREMENT = "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"  # NVIDIA's nvcc as a wheel


def site_directories() -> list[Path]:
    """Where packages of the target interpreter lie, then what an isolated build adds to sys.path."""
    paths = sysconfig.get_paths()
    found = [paths["purelib"], paths["platlib"], *site.getsitepackages(), *sys.path]
    return [Path(p) for p in dict.fromkeys(found) if p]


def find_torch_include() -> Path | None:
    """Headers of the torch installed beside the target, found without importing it."""
    candidates = (d / "torch" / "include" for d in site_directories())
    return next((c for c in candidates if (c / "torch/csrc/stable/library.h").exists()), None)


def torch_has_cuda() -> bool:
    """Whether the torch beside the target is a build with CUDA; True where there is none to ask."""
    include = find_torch_include()
    if include is None:
        return True
    text = (include.parent / "version.py").read_text()
    return re.search(r"^cuda\b.*=\s*None", text, re.MULTILINE) is None


def find_compiler() -> list[str] | None:
    """CXX, or the first of g++, c++, clang++ on the PATH, as a command line."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    commands = (shlex.split(name) for name in names)
    return next((c for c in commands if shutil.which(c[0])), None)


def nvcc_home(nvcc: str) -> str:
    """Toolkit directory of an nvcc that may be a wrapper script: nvcc itself is asked."""
    dry = [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"]
    lines = subprocess.run(dry, capture_output=True, text=True).stderr.splitlines()
    tops = [line.split("=", 1)[1].strip() for line in lines if line.startswith("#$ TOP=")]
    return tops[0] if tops else str(Path(nvcc).resolve().parent.parent)


def find_cuda() -> Path | None:
    """The CUDA toolkit to compile kernels with, or None."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(nvcc_home(on_path))
    candidates.append("/usr/local/cuda")
    for directory in site_directories():  # nvcc installed by pip
        candidates += [str(p) for p in sorted(directory.glob("nvidia/cu1[0-9]"), reverse=True)]
    usable = (Path(c) for c in candidates if c and (Path(c) / "bin" / "nvcc").exists())
    return next((c.resolve() for c in usable), None)


def toolkit_folder(cuda: Path, name: str, file: str) -> Path:
    """The folder of a toolkit that has a file; conda's keeps them by target."""
    folders = [path for top in ("", "targets/*/") for path in sorted(cuda.glob(f"{top}{name}"))]
    found = next((path for path in folders if (path / file).exists()), None)
    if found is None:
        raise SystemExit(f"mafnet: no {file} under {cuda} (MAFNET_CUDA=0 builds without CUDA)")
    return found


def why_no_cuda() -> str | None:
    """The reason _C_cuda is not built, or None."""
    mode = os.environ.get("MAFNET_CUDA", "auto")
    if mode == "0":
        return "MAFNET_CUDA=0 when it was built"
    if find_cuda() is None:
        return "no nvcc found when it was built"
    if mode != "1" and not torch_has_cuda():
        return "torch was a build without CUDA when it was built (MAFNET_CUDA=1 builds it all the same)"
    return None


def nvcc_version(cuda: Path) -> tuple[int, int]:
    """Of a toolkit's nvcc, or NEW_NVCC where it does not say."""
    done = subprocess.run([str(cuda / "bin/nvcc"), "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else NEW_NVCC


def has_nvidia_gpu() -> bool:
    """Whether nvcc finds a GPU. The driver may list one that a container does not have; for none at all nvcc compiles
    for the oldest architecture that it knows, with a mere warning."""
    cuda = find_cuda()
    if cuda is None:
        return False
    dry = [str(cuda / "bin/nvcc"), "-arch=native", "--dryrun", "-x", "cu", "-c", "/dev/null"]
    done = subprocess.run(dry, capture_output=True, text=True)
    return done.returncode == 0 and "Cannot find valid GPU" not in done.stderr


def cuda_archs() -> str:
    """MAFNET_CUDA_ARCHS or its default."""
    chosen = os.environ.get("MAFNET_CUDA_ARCHS")
    if chosen:
        return chosen
    if os.environ.get("MAFNET_CUDA", "auto") != "1" and has_nvidia_gpu():
        return "native"
    cuda = find_cuda()
    is_old = cuda is not None and nvcc_version(cuda) < NEW_NVCC
    return OLD_NVCC_ARCHS if is_old else DEFAULT_ARCHS


def gencode_flags() -> list[str]:
    """nvcc's -gencode flags for the architectures, e.g. "80;90a;100+PTX"."""
    archs = cuda_archs().replace(" ", ";")
    if archs == "native":
        return ["-arch=native"]
    names = [arch.replace(".", "") for arch in archs.split(";") if arch]
    numbers = [name.removesuffix("+PTX") for name in names]
    codes: dict[str, list[str]] = {}  # what is made of each PTX
    for name, number in zip(names, numbers):
        base = SHARED_PTX.get(number, number)
        made = codes.setdefault(base if base in numbers else number, [])
        made.append(f"sm_{number}")
        if name != number:
            codes.setdefault(number, []).append(f"compute_{number}")
    return [f"-gencode=arch=compute_{n},code=[{','.join(made)}]" for n, made in codes.items()]


def missing_build_requirements() -> list[str]:
    """What an isolated build must fetch because this machine has none of it."""
    missing = []
    if find_compiler() is not None:
        missing += [] if find_torch_include() else ["torch>=2.11"]
        missing += [] if shutil.which("ninja") else ["ninja"]
    if os.environ.get("MAFNET_CUDA") == "1" and find_cuda() is None:
        missing.append(NVCC_REQUIREMENT)
    return missing


def why_no_extension() -> str | None:
    """The reason the native kernels cannot be built here, or None."""
    if find_compiler() is None:
        return f"no C++ compiler found (looked for {os.environ.get('CXX') or 'g++, c++, clang++'})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python.h found (install the development package of this Python)"
    return None


def extension(name: str, device_glob: str) -> Extension:
    """A library of every folder under csrc that has a file matching device_glob."""
    sources = ["csrc/module.cpp"]
    for folder in sorted({path.parent for path in ROOT.glob(f"csrc/*/{device_glob}")}):
        files = [*sorted(folder.glob("binding*.cpp")), *sorted(folder.glob(device_glob))]
        sources += [str(path.relative_to(ROOT)) for path in files]
    return Extension(f"mafnet_ops.{name}", sources, py_limited_api=True)


def extensions() -> list[Extension]:
    """What can be built here; where nothing can, that is said loudly or is an error."""
    reason = why_no_extension()
    if reason is None:
        libraries = [extension("_C", "cpu*.cpp")]
        return libraries if why_no_cuda() else [*libraries, extension("_C_cuda", "*.cu")]
    if os.environ.get("MAFNET_REQUIRE_EXT") == "1":
        raise SystemExit(f"mafnet: MAFNET_REQUIRE_EXT=1, but {reason}")
    print(f"\n*** mafnet: NATIVE KERNELS NOT BUILT: {reason}; PyTorch code is used ***\n")
    return []


def quote(command: Iterable[str]) -> str:
    """A shell command line with ninja's own escape for the dollar sign."""
    return shlex.join(command).replace("$", "$$")


class NinjaFile:
    """Collects (inputs -> output) commands, writes them as a ninja file and runs it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.statements: list[str] = []
        self.commands: list[tuple[str, str]] = []

    def add(self, kind: str, command: list[str], inputs: list[Path], output: Path) -> None:
        """One step; kind is compile (has a depfile beside the output) or link."""
        name = output.name.replace(".", "_")
        rule = [f"rule {name}", f"  command = {quote(command)}", f"  description = {kind} $out"]
        if kind == "compile":
            rule += [f"  depfile = {output}.d", "  deps = gcc"]
        build = f"build {output}: {name} " + " ".join(str(path) for path in inputs)
        self.statements += [*rule, build, ""]
        self.commands.append((kind, shlex.join(command)))

    def run(self) -> None:
        """Builds incrementally with ninja, or everything where there is no ninja."""
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        path = self.directory / "build.ninja"
        where = f"builddir = {self.directory}"  # of ninja's own log
        path.write_text("\n".join([where, *self.statements]))
        ninja = shutil.which("ninja")
        if ninja:
            subprocess.check_call([ninja, "-f", str(path), f"-j{jobs}"], cwd=ROOT)
            return
        for kind in ("compile", "link"):
            commands = [command for k, command in self.commands if k == kind]
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(self._run_one, commands))

    @staticmethod
    def _run_one(command: str) -> None:
        print(command, flush=True)
        subprocess.check_call(command, shell=True, cwd=ROOT)


class BuildExt(build_ext):
    """Compiles with g++ and nvcc by ninja; torch's own build helpers refuse CUDA on a CPU torch."""

    def run(self) -> None:
        """Checks here, not at import: pip runs this file once before build requirements are there."""
        if os.environ.get("MAFNET_CUDA") == "1" and find_cuda() is None:
            raise SystemExit("mafnet: MAFNET_CUDA=1, but no nvcc was found (set CUDA_HOME)")
        if self.extensions and find_torch_include() is None:
            raise SystemExit(
                "mafnet: no torch headers beside this Python: pip install 'torch>=2.11'"
            )
        super().run()

    def build_extensions(self) -> None:
        """Builds all libraries in build/ext-<key> and copies them to where setuptools wants them."""
        directory = self._build_directory()
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two installs of one tree share the directory
            ninja = NinjaFile(directory)
            stub = self._add_stub(ninja, directory)
            built = {
                ext.name: self._add_library(ninja, directory, ext, stub) for ext in self.extensions
            }
            ninja.run()
        for name, library in built.items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(library), str(target))

    def _build_directory(self) -> Path:
        key = json.dumps(
            [str(find_torch_include()), self._compiler(), sysconfig.get_paths()["include"]]
        )
        return ROOT / "build" / f"ext-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    def _compiler(self) -> list[str]:
        compiler = find_compiler()
        assert compiler is not None, "extensions() lists none without a compiler"
        return compiler

    def _add_stub(self, ninja: NinjaFile, directory: Path) -> Path:
        """An empty libtorch.so: only its soname matters, `import torch` has mapped the real one."""
        stub, source = directory / "libtorch.so", directory / "empty.cpp"
        source.touch()
        flags = ["-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libtorch.so", "-o", str(stub)]
        ninja.add("link", [*self._compiler(), *flags, str(source)], [source], stub)
        return stub

    def _add_library(self, ninja: NinjaFile, directory: Path, ext: Extension, stub: Path) -> Path:
        name = ext.name.rpartition(".")[2]
        bindings = [source for source in ext.sources if "/binding" in source]
        together = self._include_all(directory / f"{name}-bindings.cpp", bindings)
        others = [source for source in ext.sources if source not in bindings]
        others.sort(key=lambda source: -(ROOT / source).stat().st_size)  # no long one at the end
        nvcc = self._nvcc_command() if name == "_C_cuda" else []  # asks nvcc, so once
        objects = []
        for source in [str(together), *others]:
            output = (
                directory / f"{name}-{source.removeprefix(f'{directory}/').replace('/', '-')}.o"
            )
            command = nvcc if source.endswith(".cu") else self._cxx_command(name)
            command = [*command, "-MD", "-MF", f"{output}.d", "-c", source, "-o", str(output)]
            ninja.add("compile", command, [ROOT / source], output)
            objects.append(output)
        library = directory / f"{name}.abi3.so"
        command = [*self._compiler(), "-shared", "-s", "-Wl,-O1", "-Wl,--exclude-libs,ALL"]
        command += ["-o", str(library), *map(str, objects)]
        # --no-as-needed: without it the linker drops libtorch.so and its symbols stay null.
        command += ["-Wl,--no-as-needed", str(stub), "-Wl,--as-needed"]
        command += self._cudart_flags() if name == "_C_cuda" else []
        ninja.add("link", command, [*objects, stub], library)
        return library

    @staticmethod
    def _include_all(path: Path, sources: list[str]) -> Path:
        """One file of several: most of the time for a binding goes to torch's headers."""
        text = "".join(f'#include "{source.removeprefix("csrc/")}"\n' for source in sources)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return path

    def _cxx_command(self, name: str) -> list[str]:
        command = [*self._compiler(), "-O3", "-std=c++17", "-DNDEBUG", "-fPIC", "-Wall", "-Wextra"]
        command += ["-fno-unswitch-loops"]  # a tenth of the compiler's time, and no faster code
        command += ["-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
        command += [f"-ffile-prefix-map={ROOT}=.", "-Icsrc"]
        command += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DPy_LIMITED_API={PYTHON_TARGET}"]
        command += [f"-DMAFNET_MODULE={name}"]
        command += ["-isystem", str(find_torch_include())]
        command += ["-isystem", sysconfig.get_paths()["include"]]
        cuda = find_cuda()
        if name == "_C_cuda" and cuda is not None:
            include = toolkit_folder(cuda, "include", "cuda_runtime_api.h")
            command += ["-DMAFNET_CUDA_LIBRARY", "-isystem", str(include)]
        return command

    def _nvcc_command(self) -> list[str]:
        cuda = find_cuda()
        assert cuda is not None, "extensions() lists no .cu without nvcc"
        host = next(word for word in self._compiler() if Path(word).name not in LAUNCHERS)
        command = [str(cuda / "bin" / "nvcc"), "-ccbin", host, "-O3", "-std=c++17"]
        command += ["-DNDEBUG", "-Icsrc", *gencode_flags()]
        command += ["--compress-mode=size"] if nvcc_version(cuda) >= NEW_NVCC else []
        return [*command, "-Xcompiler=-fPIC,-fvisibility=hidden"]

    @staticmethod
    def _cudart_flags() -> list[str]:
        """The static runtime: a shared one would tie the wheel to one CUDA major version."""
        cuda = find_cuda()
        assert cuda is not None, "extensions() lists no _C_cuda without nvcc"
        directory = toolkit_folder(cuda, "lib*", "libcudart_static.a")
        return [f"-L{directory}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]


class BuildPy(build_py):
    """Adds mafnet_ops/_build.json: what was built and why not, read by mafnet_ops.doctor."""

    def run(self) -> None:
        super().run()
        folder = ROOT / "mafnet_ops" if self.editable_mode else Path(self.build_lib) / "mafnet_ops"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(build_report(), indent=1) + "\n")


def build_report() -> dict[str, Any]:
    """Facts of this build, free of machine paths."""
    reason = why_no_extension()
    return {
        "extension_missing_because": reason,
        "cuda_missing_because": reason or why_no_cuda(),
        "cuda_archs": cuda_archs(),
    }


# The PEP 517 hooks: setuptools' own, plus the requirements this machine lacks.
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """PEP 517 hook."""
    return [
        *build_meta.get_requires_for_build_wheel(config_settings),
        *missing_build_requirements(),
    ]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """PEP 660 hook."""
    own = missing_build_requirements()
    return [*build_meta.get_requires_for_build_editable(config_settings), *own]


if __name__ == "__main__":
    modules = extensions()
    setup(
        ext_modules=modules,
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
    )
