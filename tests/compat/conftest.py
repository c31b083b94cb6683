"""The libraries that the drop-ins stand in for, imported where they are installed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

HOW = "not installed (`make test-compat` does it)"


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    library: ModuleType = pytest.importorskip("torchvision", reason=f"torchvision: {HOW}")
    return library


@pytest.fixture(scope="session")
def basicsr(torchvision: ModuleType) -> ModuleType:
    """BasicSR 1.4.2 imports a module that torchvision has since moved; one function of it is used."""
    from torchvision.transforms import functional

    moved = ModuleType("torchvision.transforms.functional_tensor")
    moved.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]
    sys.modules.setdefault(moved.__name__, moved)
    library: ModuleType = pytest.importorskip("basicsr", reason=f"basicsr: {HOW}")
    return library


@pytest.fixture(scope="session")
def mmcv_ops() -> ModuleType:
    """mmcv-lite has the Python of mmcv's ops without the compiled part, which here says so when it is called."""
    mmcv: ModuleType = pytest.importorskip("mmcv", reason=f"mmcv: {HOW}")
    try:
        import mmcv._ext
    except ImportError:
        sys.modules["mmcv._ext"] = mmcv._ext = _NotBuilt("mmcv._ext")
    import mmcv.ops

    ops: ModuleType = mmcv.ops
    return ops


class _NotBuilt(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"mmcv-lite has no {name}")

        return call
