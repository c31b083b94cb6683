"""The build: the stable ABI, what setup.py decides, and that every CUDA file compiles."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import mafnet_ops
from mafnet_ops import _library

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(mafnet_ops.__file__).parent / "_C.abi3.so"
DEVICE_FILES = sorted(ROOT.glob("csrc/**/*.cu"))
KERNEL_SOURCES = [*DEVICE_FILES, *sorted(ROOT.glob("csrc/**/*.cuh"))]


def load_setup() -> types.ModuleType:
    """setup.py as a module: its functions, without running setup()."""
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = load_setup()
CUDA = SETUP.find_cuda()
needs_nvcc = pytest.mark.skipif(CUDA is None, reason="no nvcc on this machine")
needs_library = pytest.mark.skipif(
    not LIBRARY.exists() or shutil.which("nm") is None, reason="_C is not built, or there is no nm"
)


# ------------------------------------------------------------------------------------------ the library


def tool_lines(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def unstable_symbols(symbols: list[str]) -> list[str]:
    """Those of ``symbols`` that would tie a library to one torch or one Python."""
    mangled = re.compile(r"_Z\w*?(3c10|2at|5torch|8pybind11)\d")
    private = re.compile(r"^_Py(?!_Dealloc$|_NoneStruct$)|THP|^_ZN\d+\w*THP")
    return [s for s in symbols if mangled.search(s) or private.search(s)]


@needs_library
def test_only_stable_symbols_are_wanted() -> None:
    symbols = [line.split()[-1] for line in tool_lines("nm", "-D", "-u", str(LIBRARY))]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert unstable_symbols([symbol.split("@")[0] for symbol in symbols]) == []


def test_the_symbol_check_sees_unstable_ones() -> None:
    planted = [
        "_ZN3c105ErrorC1E",
        "_ZNK2at6Tensor4sizeEl",
        "_ZN5torch8autograd4NodeD2Ev",
        "_PyLong_New",
    ]
    assert unstable_symbols(planted) == planted
    assert unstable_symbols(["aoti_torch_get_size", "PyModule_Create2", "_ZSt9terminatev"]) == []


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_libtorch_stays_linked() -> None:
    """Without it in the list the loader leaves torch's symbols null."""
    needed = [line for line in tool_lines("readelf", "-d", str(LIBRARY)) if "NEEDED" in line]
    assert any("[libtorch.so]" in line for line in needed)
    assert not any("libtorch_python" in line or "libpython" in line for line in needed)


@pytest.mark.skipif(_library.LOAD_ERRORS["cpu"] is not None, reason="the extension is not built")
def test_importing_the_library_before_torch_says_so() -> None:
    code = f"import sys; sys.path.insert(0, {str(LIBRARY.parent)!r}); import _C"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "libtorch.so" in done.stderr and "ImportError" in done.stderr


# -------------------------------------------------------------------------------------------- setup.py


def fake_nvcc(folder: Path, says: str, warns: str = "") -> Path:
    """A toolkit whose nvcc answers every question in these words."""
    path = folder / "bin/nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\necho '{warns}' >&2\n")
    path.chmod(0o755)
    return folder


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SETUP, "find_cuda", lambda: None)
    monkeypatch.delenv("MAFNET_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("MAFNET_CUDA", "1")
    monkeypatch.setattr(SETUP, "has_nvidia_gpu", lambda: True)
    flags = SETUP.gencode_flags()
    assert flags == [
        "-gencode=arch=compute_75,code=[sm_75]",
        "-gencode=arch=compute_80,code=[sm_80,sm_86,sm_89]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
        "-gencode=arch=compute_100,code=[sm_100,compute_100,sm_120]",
    ]
    monkeypatch.setenv("MAFNET_CUDA_ARCHS", "9.0a 8.6+PTX;12.0")
    assert SETUP.gencode_flags() == [
        "-gencode=arch=compute_90a,code=[sm_90a]",
        "-gencode=arch=compute_86,code=[sm_86,compute_86]",
        "-gencode=arch=compute_120,code=[sm_120]",
    ]
    monkeypatch.setenv("MAFNET_CUDA_ARCHS", "80;89+PTX")
    assert SETUP.gencode_flags() == [
        "-gencode=arch=compute_80,code=[sm_80,sm_89]",
        "-gencode=arch=compute_89,code=[compute_89]",
    ]
    monkeypatch.delenv("MAFNET_CUDA_ARCHS")
    monkeypatch.setenv("MAFNET_CUDA", "auto")
    assert SETUP.gencode_flags() == ["-arch=native"]
    monkeypatch.setattr(SETUP, "has_nvidia_gpu", lambda: False)
    assert SETUP.gencode_flags() == flags


@pytest.mark.parametrize(
    ("version", "archs", "compresses"),
    [
        ("12.6, V12.6.85", SETUP.OLD_NVCC_ARCHS, False),
        ("12.8, V12.8.61", SETUP.DEFAULT_ARCHS, True),
        ("13.0, V13.0.88", SETUP.DEFAULT_ARCHS, True),
    ],
)
def test_an_older_nvcc_gets_what_it_knows(
    version: str, archs: str, compresses: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from setuptools import Distribution

    cuda = fake_nvcc(tmp_path, f"Cuda compilation tools, release {version}")
    monkeypatch.setattr(SETUP, "find_cuda", lambda: cuda)
    monkeypatch.delenv("MAFNET_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("MAFNET_CUDA", "1")
    monkeypatch.setattr(SETUP, "find_compiler", lambda: ["/usr/bin/ccache", "g++-14", "-m64"])
    assert SETUP.cuda_archs() == archs
    command = SETUP.BuildExt(Distribution())._nvcc_command()
    assert command[1:3] == ["-ccbin", "g++-14"]
    assert ("--compress-mode=size" in command) == compresses
    assert any("compute_90,code=[sm_90,compute_90]" in word for word in command) != compresses


def test_the_gpu_is_one_that_nvcc_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a container that is being built the driver lists GPUs that nobody can use."""
    monkeypatch.delenv("MAFNET_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("MAFNET_CUDA", "auto")
    warning = "nvcc warning : Cannot find valid GPU for -arch=native, default arch is used"
    for name, warns, archs in (("some", "", "native"), ("none", warning, SETUP.DEFAULT_ARCHS)):
        cuda = fake_nvcc(tmp_path / name, "release 13.0", warns)
        monkeypatch.setattr(SETUP, "find_cuda", lambda cuda=cuda: cuda)
        assert SETUP.cuda_archs() == archs


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nvcc_finds_no_gpu_here() -> None:
    assert not SETUP.has_nvidia_gpu()


@pytest.mark.parametrize("top", ["", "targets/x86_64-linux/"])
def test_toolkits_of_either_layout(top: str, tmp_path: Path) -> None:
    for name, file in (("include", "cuda_runtime_api.h"), ("lib", "libcudart_static.a")):
        (tmp_path / top / name).mkdir(parents=True)
        (tmp_path / "include").mkdir(exist_ok=True)  # there, and not the one
        (tmp_path / top / name / file).touch()
        assert SETUP.toolkit_folder(tmp_path, f"{name}*", file) == tmp_path / top / name
    with pytest.raises(SystemExit, match=r"no libcublas.a under .*MAFNET_CUDA=0"):
        SETUP.toolkit_folder(tmp_path, "lib*", "libcublas.a")


def test_an_op_folder_joins_the_library_of_its_files() -> None:
    cpu, cuda = SETUP.extension("_C", "cpu*.cpp"), SETUP.extension("_C_cuda", "*.cu")
    assert {"csrc/module.cpp", "csrc/flow_warp/binding.cpp", "csrc/flow_warp/cpu_avx2.cpp"} <= set(
        cpu.sources
    )
    assert {"csrc/flow_warp/forward.cu", "csrc/flow_warp/backward.cu"} <= set(cuda.sources)
    assert not any(source.endswith(".cu") for source in cpu.sources)
    assert not any("/cpu" in source for source in cuda.sources)


def test_no_compiler_installs_without_kernels_but_not_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("MAFNET_REQUIRE_EXT", raising=False)
    assert SETUP.extensions() == []
    assert "NATIVE KERNELS NOT BUILT: no C++ compiler found" in capsys.readouterr().out
    assert "no C++ compiler found" in SETUP.build_report()["extension_missing_because"]
    monkeypatch.setenv("MAFNET_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match="MAFNET_REQUIRE_EXT=1, but no C\\+\\+ compiler found"):
        SETUP.extensions()


def test_cuda_is_built_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SETUP, "find_cuda", lambda: Path("toolkit"))
    monkeypatch.delenv("MAFNET_CUDA", raising=False)
    monkeypatch.setattr(SETUP, "torch_has_cuda", lambda: False)
    assert "torch was a build without CUDA" in SETUP.why_no_cuda()
    monkeypatch.setattr(SETUP, "torch_has_cuda", lambda: True)
    assert SETUP.why_no_cuda() is None
    monkeypatch.setenv("MAFNET_CUDA", "1")
    monkeypatch.setattr(SETUP, "torch_has_cuda", lambda: False)
    assert SETUP.why_no_cuda() is None
    monkeypatch.setenv("MAFNET_CUDA", "0")
    assert "MAFNET_CUDA=0" in SETUP.why_no_cuda()
    monkeypatch.setenv("MAFNET_CUDA", "auto")
    monkeypatch.setattr(SETUP, "find_cuda", lambda: None)
    assert "no nvcc" in SETUP.why_no_cuda()


def test_required_cuda_without_nvcc_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from setuptools import Distribution

    monkeypatch.setenv("MAFNET_CUDA", "1")
    monkeypatch.setattr(SETUP, "find_cuda", lambda: None)
    assert SETUP.NVCC_REQUIREMENT in SETUP.missing_build_requirements()
    with pytest.raises(SystemExit, match="MAFNET_CUDA=1, but no nvcc was found"):
        SETUP.BuildExt(Distribution()).run()


@pytest.mark.parametrize(
    ("line", "expected"),
    [("cuda: Optional[str] = None", False), ("cuda: Final = '13.0'", True), ("cuda = None", False)],
)
def test_cuda_of_the_torch_beside(
    line: str, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip = None\n")
    monkeypatch.setattr(SETUP, "find_torch_include", lambda: tmp_path / "include")
    assert SETUP.torch_has_cuda() is expected


# ---------------------------------------------------------------------------------------- kernel files


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_are_free_of_torch_and_can_be_emulated(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text)
    if path.name != "prims.cuh":
        for word in ("__shared__", "<<<", "asm", "__CUDA_ARCH__"):
            assert not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text), word


@needs_nvcc
@pytest.mark.slow
def test_all_cuda_files_compile_for_all_architectures(tmp_path: Path) -> None:
    """Incremental: objects are kept under build/, as by any build."""
    environment = {**os.environ, "MAFNET_CUDA": "1", "MAFNET_CUDA_ARCHS": SETUP.DEFAULT_ARCHS}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    library = tmp_path / "mafnet_ops/_C_cuda.abi3.so"
    assert library.stat().st_size > 0
    if shutil.which("nm"):
        symbols = [
            line.split()[-1].split("@")[0] for line in tool_lines("nm", "-D", "-u", str(library))
        ]
        assert unstable_symbols(symbols) == []
        assert "aoti_torch_get_current_cuda_stream" in symbols
