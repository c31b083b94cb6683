"""The video tool: decode, upscale in windows and tiles, encode. Start reading at `run.py`."""

from __future__ import annotations

from .errors import VideoError
from .run import UpscaleOptions, UpscaleReport, upscale
from .write import EncodeSettings

__all__ = ["EncodeSettings", "UpscaleOptions", "UpscaleReport", "VideoError", "upscale"]
