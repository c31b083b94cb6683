"""Drop-ins for torchvision, mmcv, BasicSR and mmagic: their names, signatures and state dicts, computed by mafnet_ops.

``from mafnet_ops.compat.torchvision import DeformConv2d`` in new code; :func:`patch` for code that cannot be changed.
None of these libraries is needed to import this package.
"""

from . import basicsr, mmagic, mmcv, torchvision
from ._patch import LIBRARIES, patch

__all__ = ["LIBRARIES", "basicsr", "mmagic", "mmcv", "patch", "torchvision"]
