"""The libraries that the drop-ins stand in for, imported where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="session")
def mmagic(mmcv_ops: ModuleType) -> Iterator[ModuleType]:
    """mmagic 1.2.0 without what only its other models need.

    The lists of its packages import everything, diffusers among it: here they are empty, but for what EDVR and
    BasicVSR++ take from them; and it names two types that NumPy 2 has dropped.
    """
    if importlib.util.find_spec("mmagic") is None:
        pytest.skip(f"mmagic: {HOW}")
    import numpy as np

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "bool8", np.bool_, raising=False)
        patch.setattr(np, "float_", np.float64, raising=False)
        import mmagic

        folder = mmagic.__path__[0]
        editors = ("basicvsr", "basicvsr_plusplus_net", "edvr")
        for name in (
            "models",
            "models.archs",
            "models.editors",
            *_under("models.editors", editors),
        ):
            package = ModuleType(f"mmagic.{name}")
            package.__path__ = [f"{folder}/{name.replace('.', '/')}"]
            patch.setitem(sys.modules, package.__name__, package)
        archs = sys.modules["mmagic.models.archs"]
        for module, name in (
            ("upsample", "PixelShufflePack"),
            ("sr_backbone", "ResidualBlockNoBN"),
        ):
            found = importlib.import_module(f"mmagic.models.archs.{module}")
            setattr(archs, name, getattr(found, name))
        yield mmagic


def _under(package: str, names: tuple[str, ...]) -> list[str]:
    return [f"{package}.{name}" for name in names]
