"""The oracle of tilewise: attention in plain PyTorch, slow and clear. It imports nothing of tilewise."""

from . import cases, dropout, masks, online, scores, statistics, yardstick
from .attention import attention
from .cases import CACHED_CASES, CASES, FEATURE_CASES, LONG_CASES, PACKED_CASES, SHORT_CASES, Case, paper_grid
from .dropout import dropout_keep
from .gradients import Gradients, gradients
from .second import second
from .tangent import tangent

__all__ = [
    "CACHED_CASES",
    "CASES",
    "FEATURE_CASES",
    "LONG_CASES",
    "PACKED_CASES",
    "SHORT_CASES",
    "Case",
    "Gradients",
    "attention",
    "cases",
    "dropout",
    "dropout_keep",
    "gradients",
    "masks",
    "online",
    "paper_grid",
    "scores",
    "second",
    "statistics",
    "tangent",
    "yardstick",
]
