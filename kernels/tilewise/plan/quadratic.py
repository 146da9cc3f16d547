"""What holds a number for every pair of query and key in memory? What strict=True refuses."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..parts.masks.dense import Dense
from ..parts.masks.documents import Documents
from ..parts.masks.intervals import Intervals
from ..parts.masks.mask import Mask
from ..parts.masks.padding import Padding
from ..parts.masks.prefix import Prefix
from ..parts.plug import Plug
from ..parts.scores.alibi import ALiBi
from ..parts.scores.bias import Bias
from ..parts.scores.relative_position import RelativePosition
from ..parts.scores.score import Score
from ..parts.shape import Shape

COMPUTED_MASKS = (
    "a mask that is computed (Causal, Window, Prefix, Padding, Documents, Intervals, BlockCausal, "
    "Neighborhood or a UserMask)"
)
COMPUTED_SCORES = (
    "a score that is computed (ALiBi, RelativePosition or a UserScore), or one that broadcasts over queries "
    "or keys"
)
# Of their tensors none has more than a number for each row, key or bucket of a head.
LINEAR = (Padding, Prefix, Intervals, Documents, ALiBi, RelativePosition)


def stored_pairs(parts: Iterable[Mask | Score], shape: Shape) -> str | None:
    """Why a call is not linear in memory: the first tensor of its masks and scores that holds every pair,
    and what to give instead; None if there is none."""
    for part in (leaf for each in parts for leaf in each.leaves()):
        for name, tensor in part.tensors().items():
            if holds_every_pair(part, tensor, shape):
                wanted = COMPUTED_MASKS if isinstance(part, Mask) else COMPUTED_SCORES
                return (
                    f"strict=True, and {part.called(name)}.shape={tuple(tensor.shape)} holds a "
                    f"number for every pair of query and key, {mebibytes(stored_bytes(tensor))}: give "
                    f"{wanted}, or leave strict out"
                )
    return None


def holds_every_pair(part: Plug, tensor: torch.Tensor, shape: Shape) -> bool:
    """Whether a tensor of `part` has a dimension along queries and one along keys, both longer than 1 and
    both there in memory: expanded ones, of stride 0, are not."""
    stored = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if isinstance(part, (Dense, Bias)):
        return len(stored) >= 2 and stored[-2] > 1 and stored[-1] > 1
    if isinstance(part, LINEAR) or min(shape.q_len, shape.kv_len) <= 1:
        return False
    # What the dimensions of a user's tensor mean is not known, but their sizes are; it may also be flat. No
    # rule knows how long packed sequences are, so of these it is seen where it has the sizes of all tokens.
    needed = 2 if shape.q_len == shape.kv_len else 1
    in_two = stored.count(shape.q_len) >= needed and stored.count(shape.kv_len) >= needed
    return in_two or any([size % (shape.q_len * shape.kv_len) == 0 for size in stored])


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that are there in memory: an expanded dimension counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod([size for size, stride in sizes if stride or size == 0]) * tensor.element_size()


def score_matrix_words(shape: Shape, dtype: torch.dtype) -> str:
    """A score matrix, as plain PyTorch has several of, and its size; of packed sequences that of all of them,
    at most: as many numbers as if one had all tokens."""
    sequences = shape.batch if shape.packing is None else 1
    size = mebibytes(dtype.itemsize * sequences * math.prod(shape.scores[1:]))
    if shape.packing is None:
        return f"a score matrix {shape.scores} in {dtype}, {size}"
    tokens = f"{shape.q_len} and {shape.kv_len} tokens"
    return f"a score matrix in {dtype} of each of {shape.batch} packed sequences, of {tokens} up to {size}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
