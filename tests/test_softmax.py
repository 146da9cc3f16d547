"""The softmax state is a monoid: start is neutral, merge is associative and commutative, step is merge."""

import math

import pytest
import torch
import triton
import triton.language as tl

from tilewise.parts.numerics import matmul
from tilewise.parts.softmax import softmax_finish, softmax_merge, softmax_start, softmax_step

ROWS, KEYS, DIM, TILES = 16, 16, 16, 4
U = 2.0**-24  # half a unit in the last place of fp32
EXP2 = 4 * U  # relative error of exp2: 2 units in the last place (PTX ISA, ex2.approx.f32)


@triton.jit
def advance(s_ptr, v_ptr, tile, unit, row_max, row_sum, o, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The state after one more tile of scores; row_max in the unit of the scores."""
    rows, keys, columns = tl.arange(0, ROWS), tile * KEYS + tl.arange(0, KEYS), tl.arange(0, 16)
    s = tl.load(s_ptr + rows[:, None] * (4 * KEYS) + keys[None, :])  # [ROWS, KEYS]
    v = tl.load(v_ptr + keys[:, None] * 16 + columns[None, :])  # [KEYS, 16]
    row_max, row_sum, p, rescale = softmax_step(s, row_max, row_sum, unit)
    return row_max, row_sum, matmul(p, v, o * rescale[:, None], "ieee")


@triton.jit
def tile_state(s_ptr, v_ptr, tile, unit, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The state of rows that have seen one tile, in natural units, as merge takes it."""
    row_max, row_sum = softmax_start(ROWS)
    o = tl.zeros([ROWS, 16], tl.float32)
    row_max, row_sum, o = advance(s_ptr, v_ptr, tile, unit, row_max, row_sum, o, ROWS, KEYS)
    if unit is not None:
        row_max *= unit
    return row_max, row_sum, o


@triton.jit
def softmax_kernel(
    s_ptr, v_ptr, state_ptr, out_ptr, lse_ptr, unit,
    ORDER: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The state of all four tiles, reached in the order that ORDER names."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, 16)
    none_max, none_sum = softmax_start(ROWS)
    none_o = tl.zeros([ROWS, 16], tl.float32)
    if ORDER == "none":
        row_max, row_sum, o = softmax_merge(none_max, none_sum, none_o, none_max, none_sum, none_o)
    elif ORDER == "loop" or ORDER == "none first" or ORDER == "none last":
        row_max, row_sum, o = none_max, none_sum, none_o
        for tile in range(4):
            row_max, row_sum, o = advance(s_ptr, v_ptr, tile, unit, row_max, row_sum, o, ROWS, KEYS)
        if unit is not None:
            row_max *= unit
        if ORDER == "none first":
            row_max, row_sum, o = softmax_merge(none_max, none_sum, none_o, row_max, row_sum, o)
        elif ORDER == "none last":
            row_max, row_sum, o = softmax_merge(row_max, row_sum, o, none_max, none_sum, none_o)
    else:
        a_max, a_sum, a_o = tile_state(s_ptr, v_ptr, 0, unit, ROWS, KEYS)
        b_max, b_sum, b_o = tile_state(s_ptr, v_ptr, 1, unit, ROWS, KEYS)
        c_max, c_sum, c_o = tile_state(s_ptr, v_ptr, 2, unit, ROWS, KEYS)
        d_max, d_sum, d_o = tile_state(s_ptr, v_ptr, 3, unit, ROWS, KEYS)
        if ORDER == "((ab)c)d":
            row_max, row_sum, o = softmax_merge(a_max, a_sum, a_o, b_max, b_sum, b_o)
            row_max, row_sum, o = softmax_merge(row_max, row_sum, o, c_max, c_sum, c_o)
            row_max, row_sum, o = softmax_merge(row_max, row_sum, o, d_max, d_sum, d_o)
        elif ORDER == "a(b(cd))":
            row_max, row_sum, o = softmax_merge(c_max, c_sum, c_o, d_max, d_sum, d_o)
            row_max, row_sum, o = softmax_merge(b_max, b_sum, b_o, row_max, row_sum, o)
            row_max, row_sum, o = softmax_merge(a_max, a_sum, a_o, row_max, row_sum, o)
        elif ORDER == "((dc)b)a":
            row_max, row_sum, o = softmax_merge(d_max, d_sum, d_o, c_max, c_sum, c_o)
            row_max, row_sum, o = softmax_merge(row_max, row_sum, o, b_max, b_sum, b_o)
            row_max, row_sum, o = softmax_merge(row_max, row_sum, o, a_max, a_sum, a_o)
        else:
            tl.static_assert(ORDER == "(bd)(ca)", "an order that this kernel knows")
            row_max, row_sum, o = softmax_merge(b_max, b_sum, b_o, d_max, d_sum, d_o)
            c_max, c_sum, c_o = softmax_merge(c_max, c_sum, c_o, a_max, a_sum, a_o)
            row_max, row_sum, o = softmax_merge(row_max, row_sum, o, c_max, c_sum, c_o)
    tl.store(state_ptr + rows, row_max)
    tl.store(state_ptr + ROWS + rows, row_sum)
    out, lse, _ = softmax_finish(row_max, row_sum, o)
    tl.store(out_ptr + rows[:, None] * 16 + columns[None, :], out)
    tl.store(lse_ptr + rows, lse)


def run(s: torch.Tensor, v: torch.Tensor, order: str, unit: float | None = None):
    """row_max and row_sum [2, ROWS], out [ROWS, DIM] and lse [ROWS]."""
    state, out, lse = s.new_empty(2, ROWS), s.new_empty(ROWS, DIM), s.new_empty(ROWS)
    softmax_kernel[(1,)](s, v, state, out, lse, unit, ORDER=order, ROWS=ROWS, KEYS=KEYS)
    return state, out, lse


def scores(device: torch.device, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [ROWS, 64] and values [64, DIM]. Row 0 sees nothing, row 1 only tile 2, row 2 not tile 0."""
    s = torch.randn(ROWS, TILES * KEYS, device=device) * spread
    s[0] = -math.inf
    s[1, : 2 * KEYS] = s[1, 3 * KEYS :] = -math.inf
    s[2, :KEYS] = -math.inf
    return s, torch.randn(TILES * KEYS, DIM, device=device)


def allowed(s: torch.Tensor) -> torch.Tensor:
    """The relative error of a sum of weights, a row: an exponential a key and at most TILES rescalings, each
    with the rounding of its argument, and a sum of 64 terms."""
    largest = s.masked_fill(s == -math.inf, 0).abs().amax(1).double()
    one_exponential = EXP2 + 2 * largest * U  # an error of x in the exponent of e is a relative error of x
    return (1 + TILES) * one_exponential + (TILES * KEYS + 3 * TILES) * U


ORDERS = ["loop", "((ab)c)d", "a(b(cd))", "((dc)b)a", "(bd)(ca)"]


@pytest.mark.oldest
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spread", [3.0, 300.0])
def test_every_grouping_and_order_gives_the_softmax(order, spread, device):
    s, v = scores(device, spread)
    (row_max, row_sum), out, lse = run(s, v, order)
    exact_lse = torch.logsumexp(s.double(), 1)
    weights = torch.softmax(s.double(), 1).nan_to_num(0.0)
    bound = allowed(s)

    assert row_max.tolist() == s.amax(1).tolist()
    exact_sum = (s.double() - s.double().amax(1, keepdim=True)).exp().sum(1).nan_to_num(0.0)
    assert ((row_sum - exact_sum).abs() <= bound * exact_sum).all()
    # Numerator and denominator err by `bound` each; the division by 4 U (PTX ISA, div.full.f32).
    out_bound = (2 * bound + 4 * U)[:, None] * (weights @ v.abs().double())
    assert ((out - weights @ v.double()).abs() <= out_bound).all()
    # The logarithm turns row_sum's relative error into an absolute one; each step before and after rounds.
    seen = exact_lse > -math.inf
    rounding = 4 * U * (exact_lse.abs() + exact_sum.clamp_min(1).log())
    assert ((lse - exact_lse).abs() <= bound + rounding)[seen].all()
    assert (lse[~seen] == -math.inf).all() and (out[~seen] == 0).all() and (~seen).sum() == 1


@pytest.mark.parametrize("order", ["none first", "none last"])
def test_start_is_neutral(order, device):
    """Bit for bit: the empty state adds nothing on either side, not even a rounding."""
    s, v = scores(device)
    for got, want in zip(run(s, v, order), run(s, v, "loop"), strict=True):
        assert torch.equal(got, want)


def test_two_empty_states_merge_to_an_empty_state(device):
    (row_max, row_sum), out, lse = run(*scores(device), "none")
    assert (row_max == -math.inf).all() and (row_sum == 0).all()
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("scale", [1.0, 0.125, 5.0])
def test_the_unit_of_the_scores_is_folded_into_the_exponentials(scale, device):
    """exp(score) = exp(s · unit): the unit is a scale of the scores."""
    s, v = scores(device)
    _, out, lse = run(s, v, "loop", scale)
    exact = torch.logsumexp(s.double() * scale, 1)
    bound = allowed(s * scale) + 4 * U * exact.abs().clamp_max(1e30)
    assert ((lse - exact).abs() <= bound)[1:].all()
    weights = torch.softmax(s.double() * scale, 1).nan_to_num(0.0)
    allowance = (2 * allowed(s * scale) + 4 * U)[:, None] * (weights @ v.abs().double())
    assert ((out - weights @ v.double()).abs() <= allowance).all()


def test_lse_is_the_natural_logarithm(device):
    """64 equal scores of 0 sum to 64: ln 64, not log2 64."""
    s, v = torch.zeros(ROWS, TILES * KEYS, device=device), torch.ones(TILES * KEYS, DIM, device=device)
    _, out, lse = run(s, v, "loop")
    assert (lse.double() - math.log(64)).abs().max() <= 2 * U * math.log(64)
    assert (out == 1).all()


def test_huge_scores_do_not_overflow(device):
    s, v = scores(device)
    s[3], s[4], s[5], s[6] = 1e4, -1e4, 1e30, torch.finfo(torch.float32).min
    for order in ORDERS:
        _, out, lse = run(s, v, order)
        assert out.isfinite().all() and lse[1:].isfinite().all()
        # Equal scores weigh the same, whatever they are; a sum of 64 values and one division round.
        mean = v.double().mean(0)
        assert ((out[3:7] - mean).abs() <= (TILES * KEYS + 4) * U * v.abs().double().mean(0)).all()
