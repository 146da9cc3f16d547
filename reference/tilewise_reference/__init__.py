"""The oracle of tilewise: attention in plain PyTorch, slow and clear. It imports nothing of tilewise."""

from . import cases, masks, online, scores
from .attention import attention
from .cases import CASES, Case, paper_grid

__all__ = ["CASES", "Case", "attention", "cases", "masks", "online", "paper_grid", "scores"]
