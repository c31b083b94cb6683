"""Errors of the data layer and the checks that raise them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class DataError(ValueError):
    """A data set, file or cache cannot be used; the message is one line that names it."""


def check_image(caller: str, image: npt.NDArray[np.uint8]) -> None:
    """Raise ValueError unless ``image`` is a non-empty (H, W, C) uint8 array."""
    if image.ndim != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(
            f"{caller}: image: expected non-empty (H, W, C) uint8, "
            f"got shape {image.shape}, {image.dtype}"
        )
