"""Which calls does the Hopper kernel take? One predicate a rule; the portable kernel takes the rest.

The copy engine wants rows without gaps and 16-byte steps; it puts V where matmuls read it, so that a value
which no row may see can be hidden only where unseen keys stand together, before or after those that are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...kernels.copies import is_without_memory, start_of, why_not_copied
from ...kernels.hopper.limits import ALIGNMENT, BACKWARD_COLUMNS, WIDEST
from ...parts.masks.mask import Mask
from ...parts.numerics import INTERPRETED
from ...parts.scores.user import UserScore
from ...parts.similarity import Cosine
from .. import tiles
from ..request import Request


def reasons(r: Request) -> Iterator[str]:
    """Why the Hopper kernel cannot answer a request that has passed the rules of all calls."""
    for rule in RULES:
        reason = rule(r)
        if reason is not None:
            yield reason


def is_default(r: Request) -> bool:
    """Whether it answers without being asked for: on its chip, where a GPU's result in the table shows that
    it is right and faster than the portable kernel. No such result is there yet."""
    if not tiles.PROVEN or INTERPRETED or r.q.device.type != "cuda":
        return False
    if is_without_memory(r.q) or torch.compiler.is_compiling():  # a graph is asked when it runs
        return False
    arch = tiles.architecture(r.q.device)
    return tiles.is_hopper_proven(arch, r.q.element_size(), r.shape) and not any(reasons(r))


def chip_is_hopper(r: Request) -> str | None:
    if r.q.device.type != "cuda" or torch.compiler.is_compiling():
        return (
            None  # another device's rule is `implementations.kernel_can_run`; a graph is asked when it runs
        )
    if is_without_memory(r.q) and not torch.cuda.is_available():  # a fake tensor, on a chip that is not here
        return None
    if tiles.architecture(r.q.device) == "sm_90":
        return None
    name = torch.cuda.get_device_name(r.q.device)
    return f"it needs a Hopper GPU (sm_90), and {r.q.device} is {name} ({tiles.architecture(r.q.device)})"


def dtype_is_16_bits(r: Request) -> str | None:
    if r.q.dtype in (torch.float16, torch.bfloat16):
        return None
    return f"q.dtype={r.q.dtype} must be torch.float16 or torch.bfloat16"


def dims_are_narrow(r: Request) -> str | None:
    head_dim, value_dim = r.q.shape[3], r.v.shape[3]
    if max(head_dim, value_dim) <= WIDEST:
        return None
    return f"{head_dim=} and {value_dim=} must be at most {WIDEST}: wider rows have no room in shared memory"


def some_key_is_there(r: Request) -> str | None:
    return None if r.k.shape[2] else "kv_len=0: there is nothing to copy"


def rows_are_not_packed(r: Request) -> str | None:
    if r.cache is not None:
        return "a cache ends inside the tensor, where the copy engine, which moves whole tiles, does not stop"
    if r.packing is None:
        return None
    return (
        "q_offsets pack sequences into one tensor, and the copy engine, which moves whole tiles of rows, "
        "would read and write across their ends"
    )


def call_is_whole(r: Request) -> str | None:
    return None if r.place is None else "the call is a part of a larger one, whose positions it does not know"


def nothing_is_dropped(r: Request) -> str | None:
    return None if r.dropout is None else f"dropout_p={r.dropout.p} must be 0: it has no dropout"


def masks_leave_no_gaps(r: Request) -> str | None:
    return first(_gap(mask) for mask in r.masks)


def _gap(mask: Mask) -> str | None:
    if not mask.has_gaps:
        return None
    return (
        f"mask {type(mask).__name__} may leave out a key between two that it keeps; it takes Causal, Window, "
        "Prefix, Padding, and what `&` makes of them"
    )


def scores_are_known(r: Request) -> str | None:
    for score in r.scores:
        if isinstance(score, UserScore):
            return f"score {score.score.__name__} is a function of the caller's own"
    return None


def out_is_aligned(r: Request) -> str | None:
    value_dim, size = r.v.shape[3], r.v.element_size()
    if value_dim * size % ALIGNMENT == 0:
        return None
    return f"{value_dim=} must be a multiple of {ALIGNMENT // size}, so that rows of out are aligned"


def tensors_can_be_copied(r: Request) -> str | None:
    return first(why_not_copied(tensor, name) for name, tensor in r.qkv().items())


def first(found: Iterator[str | None]) -> str | None:
    return next((reason for reason in found if reason is not None), None)


RULES: tuple[Callable[[Request], str | None], ...] = (
    chip_is_hopper,
    dtype_is_16_bits,
    dims_are_narrow,
    some_key_is_there,
    rows_are_not_packed,
    call_is_whole,
    nothing_is_dropped,
    masks_leave_no_gaps,
    scores_are_known,
    out_is_aligned,
    tensors_can_be_copied,
)


# ---- The backward. Where it breaks a rule, the portable backward follows Hopper's forward.


def backward_reasons(r: Request) -> Iterator[str]:
    """Why Hopper's backward cannot follow a forward that Hopper's kernel has answered, or could."""
    for rule in (*RULES, *BACKWARD_RULES):
        reason = rule(r)
        if reason is not None:
            yield reason


def similarity_is_the_dot_product(r: Request) -> str | None:
    if r.similarity != "cosine" and not isinstance(r.similarity, Cosine):
        return None
    return "the gradients of cosine similarity multiply unit rows, not those that the copy engine brings"


def sums_fit_registers(r: Request) -> str | None:
    dims = r.q.shape[3], r.v.shape[3]
    if max(dims) <= BACKWARD_COLUMNS:
        return None
    return (
        f"head_dim={dims[0]}, value_dim={dims[1]}: a warpgroup's registers hold dK and dV of 64 keys up to a "
        f"dimension of {BACKWARD_COLUMNS}"
    )


def rows_of_dk_are_aligned(r: Request) -> str | None:
    head_dim, size = r.q.shape[3], r.q.element_size()
    if head_dim * size % ALIGNMENT == 0:
        return None
    return f"{head_dim=} must be a multiple of {ALIGNMENT // size}, so that rows of dK are aligned"


BACKWARD_RULES: tuple[Callable[[Request], str | None], ...] = (
    similarity_is_the_dot_product,
    sums_fit_registers,
    rows_of_dk_are_aligned,
)


def looks(r: Request) -> tuple[object, ...]:
    """What these rules look at besides what the rules of all calls do; hashable."""
    return tuple((x.stride(), start_of(x) % ALIGNMENT) for x in r.qkv().values())
