"""The tiled algorithm against the dense one, and the algebra of its state."""

import itertools
import math

import pytest
import torch

from tilewise_reference import attention, masks, online

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def random_state(seed, rows=4, value_dim=3, keys=5):
    """The state after one tile of random scores; a masked pair here and there, row 0 with no key at all."""
    s = 4 * random(rows, keys, seed=seed)
    s[torch.rand(rows, keys, generator=torch.Generator().manual_seed(seed)) < 0.3] = -math.inf
    s[0] = -math.inf
    return online.step(online.start(rows, value_dim, s), s, random(keys, value_dim, seed=seed + 100))


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


def check(q_len, kv_len, lo, hi, *, scale=None, sink=None, head_dim=3, value_dim=4, **tiles):
    q, k, v = random(q_len, head_dim), random(kv_len, head_dim, seed=1), random(kv_len, value_dim, seed=2)
    got = online.attention_one_head(q, k, v, lo, hi, scale=scale, sink=sink, **tiles)
    dense_sink = None if sink is None else torch.tensor([float(sink)], dtype=F64)
    out, lse = attention(
        q[None, None], k[None, None], v[None, None], mask=masks.intervals(lo, hi), scale=scale,
        sink=dense_sink, return_lse=True,
    )  # fmt: skip
    assert_same(got, (out[0, 0], lse[0, 0]))


@pytest.mark.parametrize("sink", [None, 0.7, torch.tensor(-3.0, dtype=F64)])
@pytest.mark.parametrize("tiles", [{"tile_q": 4, "tile_kv": 3}, {"tile_q": 1, "tile_kv": 1}, {"tile_q": 64}])
@pytest.mark.parametrize("seed", range(4))
def test_random_intervals_equal_the_dense_result(seed, tiles, sink):
    """Odd sizes, empty rows, bounds beyond the keys on both sides."""
    generator = torch.Generator().manual_seed(seed)
    q_len, kv_len = (int(torch.randint(1, 20, (), generator=generator)) for _ in range(2))
    lo = torch.randint(-3, kv_len + 2, (q_len,), generator=generator)
    hi = lo + torch.randint(-3, kv_len + 3, (q_len,), generator=generator)
    check(q_len, kv_len, lo, hi, sink=sink, **tiles)


@pytest.mark.parametrize(("q_len", "kv_len"), [(13, 13), (5, 17), (17, 5), (1, 9), (0, 5), (5, 0), (0, 0)])
def test_full_and_causal(q_len, kv_len):
    everything = torch.zeros(q_len, dtype=torch.int64), torch.full((q_len,), kv_len)
    causal = everything[0], torch.arange(q_len) + kv_len - q_len + 1
    for lo, hi in (everything, causal):
        check(q_len, kv_len, lo, hi, tile_q=4, tile_kv=4)
        check(q_len, kv_len, lo, hi, tile_q=4, tile_kv=4, scale=2.5, sink=1.0)


@pytest.mark.parametrize(
    ("kv_len", "lo", "hi", "full", "cut"),
    [
        (12, [0, 0], [12, 12], [0, 4, 8], []),  # every pair of every tile counts
        (10, [0, 0], [10, 10], [0, 4], [8]),  # the last tile is short: its columns beyond the keys are out
        (12, [0, 0], [5, 6], [0], [4]),  # causal: the diagonal cuts one tile, the next is skipped
        (12, [1, 2], [10, 9], [4], [0, 8]),  # a window: cut, full, cut
        (12, [4, 4], [8, 8], [4], []),  # skips on both sides
        (12, [0, 9], [2, 11], [], [0, 4, 8]),  # rows apart: the tile between is visited, for no row
        (12, [5, 6], [6, 7], [], [4]),  # within one tile
        (12, [0, 8], [12, 8], [], [0, 4, 8]),  # a row with no key leaves no tile in which every pair counts
        (12, [3, 7], [3, 2], [], []),  # no row sees a key
        (12, [-5, -1], [99, 12], [0, 4, 8], []),  # bounds beyond the keys are cut to them
    ],
)
def test_key_tiles_by_hand(kv_len, lo, hi, full, cut):
    got_full, got_cut = online.key_tiles(torch.tensor(lo), torch.tensor(hi), kv_len, tile_kv=4)
    assert (list(got_full), got_cut) == (full, cut)


def test_key_tiles_lose_no_pair_and_mask_no_full_tile():
    generator = torch.Generator().manual_seed(5)
    for _ in range(200):
        kv_len, tile_kv = (int(torch.randint(1, n, (), generator=generator)) for n in (20, 6))
        lo = torch.randint(-2, kv_len + 2, (3,), generator=generator)
        hi = lo + torch.randint(-2, kv_len + 2, (3,), generator=generator)
        full, cut = online.key_tiles(lo, hi, kv_len, tile_kv)
        for i in range(3):
            seen = {j for j in range(kv_len) if lo[i] <= j < hi[i]}
            visited = {j for t in (*full, *cut) for j in range(t, t + tile_kv)}
            assert seen <= visited
            assert {j for t in full for j in range(t, t + tile_kv)} <= seen
        assert not set(full) & set(cut)


def test_junk_in_keys_outside_the_intervals_never_shows():
    q, k, v = random(5, 3), random(14, 3), random(14, 4)
    lo, hi = torch.tensor([3, 4, 5, 6, 6]), torch.tensor([8, 9, 9, 6, 10])
    clean = online.attention_one_head(q, k, v, lo, hi, tile_q=2, tile_kv=4)
    k[:3], v[:3], k[10:], v[10:] = math.nan, math.nan, math.inf, math.nan
    dirty = online.attention_one_head(q, k, v, lo, hi, tile_q=2, tile_kv=4)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


class TestMonoid:
    def test_start_is_neutral(self):
        state = random_state(1)
        neutral = online.start(4, 3, state.o)
        assert_same(online.merge(state, neutral), state)
        assert_same(online.merge(neutral, state), state)

    def test_merging_empty_states_gives_an_empty_state(self):
        empty = online.start(4, 3, torch.zeros((), dtype=F64))
        merged = online.merge(empty, empty)
        assert_same(merged, empty)
        out, lse = online.finish(merged)
        assert out.eq(0).all() and lse.eq(-math.inf).all()

    def test_commutative(self):
        a, b = random_state(1), random_state(2)
        assert_same(online.merge(a, b), online.merge(b, a))

    def test_associative(self):
        a, b, c = (random_state(seed) for seed in range(3))
        assert_same(online.merge(online.merge(a, b), c), online.merge(a, online.merge(b, c)))

    def test_step_is_a_merge_with_the_state_of_one_tile(self):
        state = random_state(1)
        s, v = 3 * random(4, 6, seed=7), random(6, 3, seed=8)
        s[1] = -math.inf
        tile = online.step(online.start(4, 3, state.o), s, v)
        assert_same(online.step(state, s, v), online.merge(state, tile))

    def test_any_order_of_tiles_gives_the_same_result(self):
        s, v = 5 * random(4, 9, seed=3), random(9, 3, seed=4)
        results = []
        for order in itertools.permutations([slice(0, 4), slice(4, 5), slice(5, 9)]):
            state = online.start(4, 3, v)
            for keys in order:
                state = online.step(state, s[:, keys], v[keys])
            results.append(online.finish(state))
        for result in results[1:]:
            assert_same(result, results[0])

    def test_finish_by_hand(self):
        # One row, scores ln 2 and ln 8 (weights 2 and 8), values 10 and 5: (20 + 40) / 10, lse = ln 10.
        s, v = torch.tensor([[2.0, 8.0]], dtype=F64).log(), torch.tensor([[10.0], [5.0]], dtype=F64)
        state = online.step(online.start(1, 1, v), s, v)
        # With the maximum ln 8 taken out: row_sum = 2/8 + 1, o = 10 · 2/8 + 5.
        assert [t.item() for t in state] == pytest.approx([math.log(8), 1.25, 7.5], rel=1e-15)
        out, lse = online.finish(state)
        assert out.item() == pytest.approx(6.0, rel=1e-15) and lse.item() == pytest.approx(
            math.log(10), rel=1e-15
        )
        # A sink of ln 2 adds 2 to the sum: 60 / 12, lse = ln 12.
        out, lse = online.finish(online.merge(state, online.sink_state(math.log(2), 1, 1, v)))
        assert out.item() == pytest.approx(5.0, rel=1e-15)
        assert lse.item() == pytest.approx(math.log(12), rel=1e-15)


def test_huge_scores_do_not_overflow():
    q, k, v = 1e4 * random(5, 3), random(9, 3, seed=1), random(9, 4, seed=2)
    lo, hi = torch.zeros(5, dtype=torch.int64), torch.full((5,), 9)
    out, lse = online.attention_one_head(q, k, v, lo, hi, tile_q=2, tile_kv=4)
    expected = attention(q[None, None], k[None, None], v[None, None])[0, 0]
    assert out.isfinite().all() and lse.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_tile_sizes_below_one_are_refused():
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="tile_kv=0"):
        online.attention_one_head(random(1, 1), random(1, 1), random(1, 1), one, one + 1, tile_kv=0)
