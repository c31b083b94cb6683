"""MAFnet: x4 video super-resolution with multi-attention and optical flow, built on ``mafnet_ops``."""

from mafnet_ops import ChannelStatistics, __version__

from .checkpoint import CheckpointError, weights_available
from .config import PRESETS, ConfigError, ModelConfig
from .model import MAFnet

__all__ = [
    "PRESETS",
    "ChannelStatistics",
    "CheckpointError",
    "ConfigError",
    "MAFnet",
    "ModelConfig",
    "__version__",
    "weights_available",
]
