"""tilewise: fused attention kernels in Triton for PyTorch."""

from . import nn, tiles
from .api import attention, dropout_mask, scaled_dot_product_attention, why_not
from .documents import Documents
from .masks import Causal, Dense, Intervals, Mask, Padding, Prefix, UserMask, Window
from .positions import ALiBi, RelativePosition, alibi_slopes
from .scores import Bias, Score, Softcap, UserScore
from .similarity import Cosine
from .tools.explain import explain

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
    "dropout_mask",
    "explain",
    "nn",
    "scaled_dot_product_attention",
    "tiles",
    "why_not",
]
