"""Picture quality as the literature measures it."""

from __future__ import annotations

from mafnet.metrics.quality import (
    clip_average,
    psnr_rgb,
    psnr_y,
    rgb_to_y,
    set_average,
    ssim_rgb,
    ssim_y,
)

__all__ = [
    "clip_average",
    "psnr_rgb",
    "psnr_y",
    "rgb_to_y",
    "set_average",
    "ssim_rgb",
    "ssim_y",
]
