"""Ops for video restoration: deformable convolution, flow warping and attention.

Each op has a functional form, a module where it owns parameters, and a pure-PyTorch path that runs everywhere;
compiled kernels are used where they are built. ``mafnet_ops.doctor()`` says which backend each op uses and why.
"""

from . import compat, reference
from ._version import __version__
from .alignment import ModulatedDeformConv2dPack, SecondOrderDeformAlign
from .channel_attention import (
    ChannelAttention,
    ChannelStatistics,
    channel_attention,
    channel_statistics,
)
from .deform_align import DeformAlign, deform_align
from .doctor import doctor
from .flow_warp import flow_warp
from .modulated_deform_conv2d import (
    ModulatedDeformConv2d,
    modulated_deform_conv2d,
    watch_offsets,
)
from .non_local import NonLocalBlock
from .offset_health import OffsetHealth
from .pyramid_spatial_attention import PyramidSpatialAttention, pyramid_spatial_attention
from .pyramid_spatial_attention_parts import (
    pool_concat,
    pool_concat_conv,
    resize_add,
    spatial_gate,
)
from .self_attention import SelfAttention, self_attention
from .temporal_spatial_attention import TemporalSpatialAttention

__all__ = [
    "ChannelAttention",
    "ChannelStatistics",
    "DeformAlign",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "NonLocalBlock",
    "OffsetHealth",
    "PyramidSpatialAttention",
    "SecondOrderDeformAlign",
    "SelfAttention",
    "TemporalSpatialAttention",
    "__version__",
    "channel_attention",
    "channel_statistics",
    "compat",
    "deform_align",
    "doctor",
    "flow_warp",
    "modulated_deform_conv2d",
    "pool_concat",
    "pool_concat_conv",
    "pyramid_spatial_attention",
    "reference",
    "resize_add",
    "self_attention",
    "spatial_gate",
    "watch_offsets",
]
