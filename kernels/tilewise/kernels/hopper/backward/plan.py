"""What all roles of the backward know: what was decided when it was compiled, and what they share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import limits
from ..channels import Ring
from ..instructions import aggregate

WARPGROUPS = gl.constexpr(2)
KEYS = gl.constexpr(limits.WARPGROUP_ROWS)  # of a warpgroup: what one WGMMA multiplies
TILE_KV = gl.constexpr(2 * limits.WARPGROUP_ROWS)
PIECE = gl.constexpr(limits.WARPGROUP_ROWS)  # rows of dQ that a warpgroup computes in a step
WARPGROUP_THREADS = gl.constexpr(limits.WARPGROUP_THREADS)
NAMED_BARRIERS = gl.constexpr(limits.NAMED_BARRIERS)


@aggregate
class Plan:
    """What is known when the kernel is compiled."""

    INTERVALS: gl.constexpr
    SCORES: gl.constexpr
    DERIVATIVES: gl.constexpr
    TILE_Q: gl.constexpr
    COLUMNS: gl.constexpr  # of a tile of q, k, v and dO
    DQ_COLUMNS: gl.constexpr  # of a warpgroup's piece of dQ
    IS_ORDERED: gl.constexpr  # programs add to dQ one after another
    TOGETHER: gl.constexpr  # the named barrier of both warpgroups
    DQ_FREE: gl.constexpr  # the named barrier of the first warpgroup's piece of dQ; the second's follows
    DQ_FULL: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        INTERVALS,
        SCORES,
        DERIVATIVES,
        TILE_Q,
        COLUMNS,
        DQ_COLUMNS,
        IS_ORDERED,
        TOGETHER,
        DQ_FREE,
        DQ_FULL,
    ):
        self.INTERVALS = gl.constexpr(INTERVALS)
        self.SCORES = gl.constexpr(SCORES)
        self.DERIVATIVES = gl.constexpr(DERIVATIVES)
        self.TILE_Q = gl.constexpr(TILE_Q)
        self.COLUMNS = gl.constexpr(COLUMNS)
        self.DQ_COLUMNS = gl.constexpr(DQ_COLUMNS)
        self.IS_ORDERED = gl.constexpr(IS_ORDERED)
        self.TOGETHER = gl.constexpr(TOGETHER)
        self.DQ_FREE = gl.constexpr(DQ_FREE)
        self.DQ_FULL = gl.constexpr(DQ_FULL)


@aggregate
class Channels:
    """What the roles share."""

    q: Ring
    do: Ring  # at the places of q, and free when that is
    k: gl.shared_memory_descriptor  # [2 WARPGROUPS, 1, 1, KEYS, COLUMNS]: as it is, and cleaned
    v: gl.shared_memory_descriptor  # [WARPGROUPS, 1, 1, KEYS, COLUMNS]
    landed: gl.shared_memory_descriptor  # [2, 1]: the mbarriers of K and of V
    ds: gl.shared_memory_descriptor  # [STAGES WARPGROUPS, KEYS, TILE_Q]: dSᵀ, at the places of q
    dq: gl.shared_memory_descriptor  # [WARPGROUPS, 1, 1, PIECE, DQ_COLUMNS]
    row_max: gl.shared_memory_descriptor  # [WARPGROUPS, TILE_Q] of a step's rows, as the next two
    sum_log2: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, do, k, v, landed, ds, dq, row_max, sum_log2, delta):
        self.q = q
        self.do = do
        self.k = k
        self.v = v
        self.landed = landed
        self.ds = ds
        self.dq = dq
        self.row_max = row_max
        self.sum_log2 = sum_log2
        self.delta = delta
