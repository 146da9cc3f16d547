"""tilewise: fused attention kernels in Triton for PyTorch."""

from . import nn, tiles
from .api import attention, scaled_dot_product_attention, why_not
from .documents import Documents
from .masks import Causal, Dense, Intervals, Mask, Padding, Prefix, UserMask, Window
from .scores import ALiBi, Bias, RelativePosition, Score, Softcap, UserScore, alibi_slopes
from .similarity import Cosine

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "Bias",
    "Causal",
    "Cosine",
    "Dense",
    "Documents",
    "Intervals",
    "Mask",
    "Padding",
    "Prefix",
    "RelativePosition",
    "Score",
    "Softcap",
    "UserMask",
    "UserScore",
    "Window",
    "alibi_slopes",
    "attention",
    "nn",
    "scaled_dot_product_attention",
    "tiles",
    "why_not",
]
