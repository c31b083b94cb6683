"""Training data, degradations and readers of evaluation sets."""

from __future__ import annotations

from mafnet.data.errors import DataError
from mafnet.data.packing import pack
from mafnet.data.sampler import ClipBatch, ImageBatch, PackedData, ShiftPairs
from mafnet.data.sources import DataConfig, VideoSource

__all__ = [
    "ClipBatch",
    "DataConfig",
    "DataError",
    "ImageBatch",
    "PackedData",
    "ShiftPairs",
    "VideoSource",
    "pack",
]
