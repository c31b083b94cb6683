"""Put the drop-ins in the place of a library's own functions, and back."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

from .._exchange import exchange, stand_in
from . import basicsr, mmagic, mmcv, torchvision

Function = Callable[..., Any]


@dataclass(frozen=True)
class _Library:
    functions: dict[str, Function]
    """module:name -> what takes its place, in that module and in all that imported the name."""
    forwards: dict[str, Function] = field(default_factory=dict)
    """module:class -> its new ``forward``; instances, subclasses and state dicts stay what they are."""


_MMCV: dict[str, Function] = {
    "mmcv.ops.deform_conv:deform_conv2d": mmcv.deform_conv2d,
    "mmcv.ops.modulated_deform_conv:modulated_deform_conv2d": mmcv.modulated_deform_conv2d,
}
_BASICVSRPP = "mmagic.models.editors.basicvsr_plusplus_net.basicvsr_plusplus_net"
_LIBRARIES: dict[str, _Library] = {
    "torchvision": _Library(
        {"torchvision.ops.deform_conv:deform_conv2d": torchvision.deform_conv2d}
    ),
    "mmcv": _Library(_MMCV),
    "basicsr": _Library(
        {
            "basicsr.ops.dcn.deform_conv:deform_conv": basicsr.deform_conv,
            "basicsr.ops.dcn.deform_conv:modulated_deform_conv": basicsr.modulated_deform_conv,
            "basicsr.archs.arch_util:flow_warp": basicsr.flow_warp,
        },
        {
            "basicsr.ops.dcn.deform_conv:ModulatedDeformConvPack": basicsr.ModulatedDeformConvPack.forward,
            "basicsr.archs.arch_util:DCNv2Pack": basicsr.DCNv2Pack.forward,
            "basicsr.archs.basicvsrpp_arch:SecondOrderDeformableAlignment": (
                basicsr.SecondOrderDeformableAlignment.forward
            ),
            "basicsr.archs.edvr_arch:TSAFusion": basicsr.TSAFusion.forward,
        },
    ),
    "mmagic": _Library(
        {**_MMCV, "mmagic.models.utils.flow_warp:flow_warp": mmagic.flow_warp},
        {
            f"{_BASICVSRPP}:SecondOrderDeformableAlignment": (
                mmagic.SecondOrderDeformableAlignment.forward
            ),
            "mmagic.models.editors.edvr.edvr_net:ModulatedDCNPack": mmagic.ModulatedDCNPack.forward,
            "mmagic.models.editors.edvr.edvr_net:TSAFusion": mmagic.TSAFusion.forward,
        },
    ),
}
LIBRARIES = tuple(_LIBRARIES)
"""What :func:`patch` knows."""


@dataclass
class _Replacement:
    """One function of a library; several patches may hold it, the first puts it in, the last takes it out."""

    place: str
    new: Function
    owner: Any
    old: Function
    holders: int = 0

    def put_in(self) -> None:
        if isinstance(self.owner, ModuleType):
            exchange(self.old, self.new)
        else:
            self.owner.forward = self.new

    def take_out(self) -> None:
        if isinstance(self.owner, ModuleType):
            exchange(self.new, self.old)
        else:
            self.owner.forward = self.old


_ACTIVE: dict[str, _Replacement] = {}
_LOCK = threading.RLock()


class patch:
    """Let ``torchvision``, ``mmcv``, ``basicsr`` or ``mmagic`` compute with mafnet_ops, from the call on.

    ::

        mafnet_ops.compat.patch("basicsr")  # for good

        with mafnet_ops.compat.patch("basicsr", "torchvision"):  # until the block ends
            net(frames)

    Functions are replaced in every module that imported them, also where that happens while the patch is in place.
    Of classes only ``forward`` is replaced: networks that exist already are patched too, keep their weights, pickle
    and load as before. Patches nest, and may be undone in any order. What cannot be reached is a function that is kept
    elsewhere than in a module, as a default argument for instance.

    Args:
        libraries: names out of ``LIBRARIES``. They are imported.

    Raises:
        ValueError: no or an unknown name. ImportError: the library is not installed, or does not import.
    """

    def __init__(self, *libraries: str) -> None:
        if not libraries or set(libraries) - set(_LIBRARIES):
            raise ValueError(
                f"patch: libraries: expected some of {', '.join(_LIBRARIES)}, got {', '.join(libraries) or 'none'}"
            )
        self._places: list[str] = []
        wanted: dict[str, tuple[Function, bool]] = {}
        for name in libraries:
            library = _LIBRARIES[name]
            wanted |= {place: (new, False) for place, new in library.functions.items()}
            wanted |= {place: (new, True) for place, new in library.forwards.items()}
        with _LOCK:
            # All of it is found before any of it is replaced: an import that fails leaves nothing behind.
            found = {place: _find(place, *what) for place, what in wanted.items()}
            for place, replacement in found.items():
                replacement = _ACTIVE.setdefault(place, replacement)
                if replacement.holders == 0:
                    replacement.put_in()
                replacement.holders += 1
                self._places.append(place)

    def undo(self) -> None:
        """Put back what was there. Doing it again has no effect."""
        with _LOCK:
            for place in self._places:
                replacement = _ACTIVE[place]
                replacement.holders -= 1
                if replacement.holders == 0:
                    replacement.take_out()
                    del _ACTIVE[place]
            self._places = []

    def __enter__(self) -> patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def _find(place: str, new: Function, is_forward: bool) -> _Replacement:
    module_name, name = place.split(":")
    module = importlib.import_module(module_name)
    if is_forward:
        owner = getattr(module, name)
        return _Replacement(place, new, owner, owner.forward)
    return _Replacement(place, stand_in(new), module, getattr(module, name))
