"""What the hardware under Hopper's kernels prescribes."""

import functools

from ...parts.pieces import pieces_of

WARPGROUP_ROWS = 64  # query rows of a warpgroup: what one WGMMA multiplies
WARPGROUP_THREADS = 128
NAMED_BARRIERS = 16  # of a multiprocessor
WIDEST = 256  # head_dim and value_dim
SWIZZLED_BYTES = 128  # over which the rows of a tile are swizzled, if they are not narrower
HOPPER_COLUMNS = 64  # of a tile at least: as many bytes
BACKWARD_COLUMNS = 128  # of the backward's tiles at most: dK and dV of a warpgroup stay in registers
FIRST_COUNTER = 4  # of the backward, behind its tickets and a counter of no tile: on a multiple of 16 bytes
ALIGNMENT = 16  # bytes (CUDA driver API, cuTensorMapEncodeTiled)
FARTHEST = 1 << 40  # bytes between neighbours of a dimension, exclusive


@functools.cache
def hopper_pieces(dim: int) -> tuple[int, ...]:
    """The columns of the pieces that hold rows of `dim` in the forward: those of the portable kernels, but no
    fewer than HOPPER_COLUMNS together."""
    return pieces_of(max(dim, HOPPER_COLUMNS))


def named_barriers(warpgroups: int, stages: int) -> int:
    """How many the forward needs: forward.py lists them."""
    return 2 + 3 * warpgroups + 2 * stages


def backward_barriers(stages: int) -> int:
    """How many the backward needs: backward/kernel.py lists them."""
    return 5 + stages + 1 + 4
