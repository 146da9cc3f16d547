"""What the hardware under Hopper's kernels prescribes."""

WARPGROUP_ROWS = 64  # query rows of a warpgroup: what one WGMMA multiplies
WARPGROUP_THREADS = 128
NAMED_BARRIERS = 16  # of a multiprocessor
WIDEST = 256  # head_dim and value_dim
HOPPER_COLUMNS = 64  # of a tile at least: 128 bytes, over which rows are swizzled
BACKWARD_COLUMNS = 128  # of the backward's tiles at most: dK and dV of a warpgroup stay in registers
FIRST_COUNTER = 4  # of the backward, behind its tickets and a counter of no tile: on a multiple of 16 bytes
ALIGNMENT = 16  # bytes (CUDA driver API, cuTensorMapEncodeTiled)
FARTHEST = 1 << 40  # bytes between neighbours of a dimension, exclusive


def named_barriers(warpgroups: int, stages: int) -> int:
    """How many the forward needs: forward.py lists them."""
    return 2 + 3 * warpgroups + 2 * stages


def backward_barriers(stages: int) -> int:
    """How many the backward needs: backward/kernel.py lists them."""
    return 5 + stages + 1 + 4
