"""What the hardware under Hopper's forward prescribes."""

WARPGROUP_ROWS = 64  # query rows of a warpgroup: what one WGMMA multiplies
WARPGROUP_THREADS = 128
NAMED_BARRIERS = 16  # of a multiprocessor
WIDEST = 256  # head_dim and value_dim
HOPPER_COLUMNS = 64  # of a tile at least: 128 bytes, over which rows are swizzled
ALIGNMENT = 16  # bytes (CUDA driver API, cuTensorMapEncodeTiled)
FARTHEST = 1 << 40  # bytes between neighbours of a dimension, exclusive


def named_barriers(warpgroups: int, stages: int) -> int:
    """How many the kernel needs: forward.py lists them."""
    return 2 + 3 * warpgroups + 2 * stages
