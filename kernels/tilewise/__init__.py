"""tilewise: fused attention kernels in Triton for PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import compat, integrations, nn
from .api import attention, dropout_mask, why_not
from .cached import cached_attention
from .drop_in import flash_impl as _flash_impl  # makes its name known to PyTorch
from .joining import merge
from .packed import check_offsets, packed_attention
from .parts.fp8 import Scales
from .parts.masks.algebra import AnyOf, Not
from .parts.masks.block_causal import BlockCausal
from .parts.masks.blocks import Blocks
from .parts.masks.causal import Causal
from .parts.masks.dense import Dense
from .parts.masks.documents import Documents
from .parts.masks.intervals import Intervals
from .parts.masks.mask import Mask
from .parts.masks.neighborhood import Neighborhood
from .parts.masks.padding import Padding
from .parts.masks.prefix import Prefix
from .parts.masks.user import UserMask
from .parts.masks.window import Window
from .parts.rotary import RotaryTable
from .parts.scores.alibi import ALiBi, alibi_slopes
from .parts.scores.bias import Bias
from .parts.scores.relative_position import RelativePosition
from .parts.scores.score import Score
from .parts.scores.softcap import Softcap
from .parts.scores.user import UserScore
from .parts.similarity import Cosine
from .parts.stats import Statistics, Stats
from .plan import tiles
from .quantized import Quantized, quantize
from .scaled_dot_product import scaled_dot_product_attention
from .tools.explain.explain import explain
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .drop_in.switch import sdpa
    from .tools.explain.ranks.explain import explain_ranks

__all__ = [
    "ALiBi",
    "AnyOf",
    "Bias",
    "BlockCausal",
    "Blocks",
    "Causal",
    "Cosine",
    "Dense",
    "Documents",
    "Intervals",
    "Mask",
    "Neighborhood",
    "Not",
    "Padding",
    "Prefix",
    "Quantized",
    "RelativePosition",
    "RotaryTable",
    "Scales",
    "Score",
    "Softcap",
    "Statistics",
    "Stats",
    "UserMask",
    "UserScore",
    "Window",
    "alibi_slopes",
    "attention",
    "cached_attention",
    "check_offsets",
    "compat",
    "dropout_mask",
    "explain",
    "explain_ranks",
    "integrations",
    "merge",
    "nn",
    "packed_attention",
    "quantize",
    "scaled_dot_product_attention",
    "sdpa",
    "tiles",
    "why_not",
]


del _flash_impl


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


# What is imported when it is first asked for: `sdpa` imports Dynamo, for as long as PyTorch takes itself, and
# `explain_ranks` what is distributed.
LATE = {"sdpa": ".drop_in.switch", "explain_ranks": ".tools.explain.ranks.explain"}


def __getattr__(name: str) -> Any:
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(LATE[name], __name__), name)
    return found
