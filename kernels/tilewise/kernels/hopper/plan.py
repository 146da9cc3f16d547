"""What all roles of the kernel know: what was decided when it was compiled, and what they share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import limits
from .channels import Ring
from .instructions import aggregate

ROWS = gl.constexpr(limits.WARPGROUP_ROWS)
WARPGROUP_THREADS = gl.constexpr(limits.WARPGROUP_THREADS)
NAMED_BARRIERS = gl.constexpr(limits.NAMED_BARRIERS)


@aggregate
class Plan:
    """What is known when the kernel is compiled."""

    INTERVALS: gl.constexpr
    SCORES: gl.constexpr
    WARPGROUPS: gl.constexpr
    TILE_Q: gl.constexpr
    TILE_KV: gl.constexpr
    TURN: gl.constexpr  # the named barrier of the first warpgroup's turn
    HAS_TURNS: gl.constexpr
    HAS_OUT_BUFFER: gl.constexpr
    IS_Q_IN_REGISTERS: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, INTERVALS, SCORES, WARPGROUPS, TILE_KV, TURN, HAS_TURNS, HAS_OUT_BUFFER, IS_Q_IN_REGISTERS
    ):
        self.INTERVALS = gl.constexpr(INTERVALS)
        self.SCORES = gl.constexpr(SCORES)
        self.WARPGROUPS = gl.constexpr(WARPGROUPS)
        self.TILE_Q = gl.constexpr(WARPGROUPS * limits.WARPGROUP_ROWS)
        self.TILE_KV = gl.constexpr(TILE_KV)
        self.TURN = gl.constexpr(TURN)
        self.HAS_TURNS = gl.constexpr(HAS_TURNS)
        self.HAS_OUT_BUFFER = gl.constexpr(HAS_OUT_BUFFER)
        self.IS_Q_IN_REGISTERS = gl.constexpr(IS_Q_IN_REGISTERS)


@aggregate
class Channels:
    """What the roles share."""

    q: Ring  # a buffer a warpgroup
    k: Ring
    v: Ring
    out: gl.tuple  # for each piece of O's columns, [WARPGROUPS, 1, 1, ROWS, columns]

    @gluon.constexpr_function
    def __init__(self, q, k, v, out):
        self.q = q
        self.k = k
        self.v = v
        self.out = out
