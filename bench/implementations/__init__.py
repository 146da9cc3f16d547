"""Who is compared: tilewise and its rivals, one adapter each, with what every one of them cannot do.

IMPLEMENTATIONS        all of them, by name
select(names)          those of these names, in the order of IMPLEMENTATIONS
for_group(name)        those that a group of `groups` compares
"""

from __future__ import annotations

from collections.abc import Iterable

from tilewise.plan.implementation import IMPLEMENTATIONS as OURS

from .base import Implementation, Prepared, UnsupportedError
from .by_hand import ByHand
from .flash import Flash2, FlashCute
from .flashinfer import FlashInfer
from .flex import Flex
from .fp8 import Flash3, Quantize, TilewiseFp8
from .host import Compiled, Unlaunched
from .jax_cudnn import JaxCudnn
from .ours import Tilewise
from .sdpa import Sdpa
from .varlen import Varlen
from .xformers import XFormers

__all__ = ["IMPLEMENTATIONS", "Implementation", "Prepared", "UnsupportedError", "for_group", "select"]

# Those that hold the matrix of scores come last: what memory they leave is enough for nobody after them.
_KERNELS: tuple[Implementation, ...] = (
    *(Tilewise(impl) for impl in OURS if impl != "torch"),
    Sdpa("flash"),
    Sdpa("cudnn"),
    Sdpa("efficient"),
    Varlen(),
    Flex(),
    Flash2(),
    FlashCute(),
    FlashInfer(),
    XFormers(),
    JaxCudnn(),
    Sdpa("math"),
    ByHand(),
    Compiled(ByHand()),
    Tilewise("torch"),
)
# Their times are the host's: with Triton's launch and without, in eager mode and compiled, beside PyTorch's.
_HOST: tuple[Implementation, ...] = (
    Tilewise("portable"),
    Tilewise("hopper"),
    Unlaunched(Tilewise("portable")),
    Unlaunched(Tilewise("hopper")),
    Compiled(Tilewise("portable")),
    Compiled(Unlaunched(Tilewise("portable"))),
    Sdpa(None),
    Compiled(Sdpa(None)),
)
# In 16 bits, as now, and in 8.
_FP8: tuple[Implementation, ...] = (
    Tilewise("portable"),
    Tilewise("hopper"),
    TilewiseFp8("portable"),
    TilewiseFp8("portable", in_call=True),
    Sdpa("flash"),
    Sdpa("cudnn"),
    Flash3(),
    Sdpa("math"),
)
_QUANTIZE: tuple[Implementation, ...] = (Quantize("portable"), Quantize("portable", rotate=True))
IMPLEMENTATIONS: dict[str, Implementation] = {
    each.name: each for each in (*_KERNELS, *_HOST, *_FP8, *_QUANTIZE)
}


def select(names: Iterable[str]) -> list[Implementation]:
    """The implementations of these names. Raises ValueError for a name that is not there."""
    wanted = list(names)
    for name in wanted:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation={name!r} must be one of {', '.join(IMPLEMENTATIONS)}")
    return [each for name, each in IMPLEMENTATIONS.items() if name in wanted]


def for_group(group: str) -> list[Implementation]:
    """Every implementation that a group compares, available here or not."""
    apart = {"host": _HOST, "fp8": _FP8, "quantize": _QUANTIZE}
    if group in apart:
        return list(apart[group])
    # Plain PyTorch has nothing to compile at a first call, and varlen_attn is for packed sequences alone.
    left_out = ["sdpa math", "tilewise torch"] if group == "cold start" else []
    left_out += [] if group.startswith("packed") else ["varlen_attn"]
    left_out += [] if group == "statistics" else ["pytorch by hand", "pytorch by hand, compiled"]
    # Whose tangents are those of the portable kernels.
    left_out += ["tilewise hopper"] if group == "second derivatives" else []
    return [each for each in _KERNELS if each.name not in left_out]
