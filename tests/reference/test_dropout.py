"""Philox against published answers and Python's whole numbers, the mask against its rule pair by pair."""

import math

import pytest
import torch

from harness.exact import F64, close, column, random_qkv
from tilewise_reference import attention, dropout_keep, scores
from tilewise_reference.dropout import philox

LN3 = math.log(3)
BIG = 2**32 - 1
# Key, counter and words: the known answers of Random123, the paper's own implementation.
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((BIG, BIG), (BIG, BIG, BIG, BIG), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(seed, *counter, rounds=10):
    return tuple(w.item() for w in philox(seed, *map(torch.tensor, counter), rounds=rounds))


def in_python(seed, *counter, rounds=10):
    """Philox as the paper's figure has it, on whole numbers without a limit."""
    k0, k1 = seed % 2**32, seed // 2**32 % 2**32
    c = counter
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = (b // 2**32 ^ c[1] ^ k0, b % 2**32, a // 2**32 ^ c[3] ^ k1, a % 2**32)
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


class TestPhilox:
    @pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
    def test_known_answers(self, key, counter, expected):
        assert words(key[0] + 2**32 * key[1], *counter) == expected
        assert in_python(key[0] + 2**32 * key[1], *counter) == expected

    @pytest.mark.parametrize("rounds", [0, 1, 7, 10])
    def test_any_counter_and_seed(self, rounds):
        generator = torch.Generator().manual_seed(3)
        counters = torch.randint(0, 2**32, (4, 50), generator=generator)
        counters[:, 0], counters[0, 1], counters[2, 2] = 2**31, BIG, BIG
        for seed in (0, 1, 2**31, 2**32, 2**63 - 1, -1, -(2**63), -5_000_000_000):
            got = torch.stack(philox(seed, *counters, rounds=rounds))
            assert got.dtype == torch.int64
            expected = [in_python(seed, *c, rounds=rounds) for c in counters.T.tolist()]
            assert got.T.tolist() == [list(c) for c in expected]

    def test_counters_broadcast(self):
        sizes = (5, 4, 3, 2)
        c = [torch.arange(n).reshape(-1, *[1] * axis) for axis, n in enumerate(sizes)]
        got = philox(9, *c)
        assert all(w.shape == (2, 3, 4, 5) for w in got)
        assert tuple(w[1, 2, 3, 4].item() for w in got) == in_python(9, 4, 3, 2, 1)

    def test_seed_is_64_bits_in_a_number_or_a_tensor(self):
        for seed in (0, 12345, -1, -(2**40) - 3, 2**63 - 1, -(2**63)):
            expected = words(seed, 1, 2, 3, 4)
            assert words(torch.tensor(seed), 1, 2, 3, 4) == expected
            assert words(torch.tensor([seed]), 1, 2, 3, 4) == expected
            assert words(seed % 2**64, 1, 2, 3, 4) == expected
        assert len({words(seed, 1, 2, 3, 4) for seed in (0, 1, -1, 2**32, 2**63, 2**31)}) == 6

    def test_other_seeds_are_refused(self):
        zero = torch.tensor(0)
        for seed in (torch.tensor([1, 2]), torch.tensor(1, dtype=torch.int32), 2**64, -(2**63) - 1):
            with pytest.raises(ValueError, match="seed"):
                philox(seed, zero, zero, zero, zero)


class TestMask:
    @pytest.mark.parametrize("seed", [0, 77, -77, 2**40 + 1])
    @pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
    def test_every_pair(self, p, seed):
        keep = dropout_keep(seed, p, (2, 3, 4, 9))
        assert keep.dtype == torch.bool
        for b in range(2):
            for h in range(3):
                for i in range(4):
                    for j in range(9):
                        word = in_python(seed, j // 4, i, h, b)[j % 4]
                        assert keep[b, h, i, j] == (word // 2 >= round(p * 2**31))

    def test_threshold_is_the_word_without_its_last_bit(self):
        word = in_python(5, 0, 0, 0, 0)[0] // 2
        for p, kept in ((word / 2**31, True), ((word + 1) / 2**31, False)):
            assert dropout_keep(5, p, (1, 1, 1, 1)).item() is kept
        # p counts in steps of 2⁻³¹, to the nearest.
        assert dropout_keep(5, (word + 0.4) / 2**31, (1, 1, 1, 1)).item() is True
        assert dropout_keep(5, (word + 0.6) / 2**31, (1, 1, 1, 1)).item() is False

    def test_lengths_do_not_matter(self):
        whole = dropout_keep(3, 0.4, (3, 5, 20, 33))
        for shape in ((1, 1, 1, 1), (2, 4, 7, 5), (3, 5, 19, 32), (1, 5, 20, 31), (3, 1, 1, 33)):
            cut = tuple(slice(size) for size in shape)
            assert torch.equal(dropout_keep(3, 0.4, shape), whole[cut])

    def test_no_pairs(self):
        for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
            assert dropout_keep(3, 0.4, shape).shape == shape

    def test_seed_in_a_tensor(self):
        keep = dropout_keep(-9, 0.4, (2, 3, 4, 9))
        for seed in (torch.tensor(-9), torch.tensor([-9]), 2**64 - 9):
            assert torch.equal(dropout_keep(seed, 0.4, (2, 3, 4, 9)), keep)
        assert not torch.equal(dropout_keep(9, 0.4, (2, 3, 4, 9)), keep)
        assert dropout_keep(-9, 0.4, (2, 3, 4, 9), device="meta").is_meta

    @pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
    def test_p_out_of_range(self, p):
        with pytest.raises(ValueError, match="p="):
            dropout_keep(0, p, (1, 1, 1, 1))


class TestStatistics:
    """Within five standard deviations; the seeds are fixed, so a test that passes always passes."""

    shape = (3, 4, 64, 64)
    n = math.prod(shape)

    @pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9])
    @pytest.mark.parametrize("seed", [0, 1, -1])
    def test_share(self, seed, p):
        dropped = self.n - int(dropout_keep(seed, p, self.shape).sum())
        assert abs(dropped - self.n * p) <= 5 * math.sqrt(self.n * p * (1 - p))

    def uncorrelated(self, a, b):
        """The share of pairs that agree is that of independent coins."""
        agree, n = int((a == b).sum()), a.numel()
        assert abs(agree - n / 2) <= 5 * math.sqrt(n / 4)

    def test_neighbours(self):
        keep = dropout_keep(11, 0.5, self.shape)
        for axis in range(4):
            for step in (1, 2, 4) if axis > 1 else (1,):
                size = self.shape[axis] - step
                self.uncorrelated(keep.narrow(axis, 0, size), keep.narrow(axis, step, size))

    def test_seeds(self):
        keep = dropout_keep(11, 0.5, self.shape)
        for seed in (10, 12, -11, 11 + 2**32, 11 - 2**63):
            self.uncorrelated(keep, dropout_keep(seed, 0.5, self.shape))

    def test_every_bit_of_every_word(self):
        for word in philox(2, *(torch.arange(n).reshape(-1, *[1] * a) for a, n in enumerate((20, 10, 5, 4)))):
            ones = torch.stack([(word >> bit & 1).sum() for bit in range(32)])
            assert (ones - 2000).abs().max() <= 5 * math.sqrt(1000)


class TestAttention:
    q, k, v = column(1.0), column(0.0, LN3), column(8.0, 4.0)  # weights 1/4 and 3/4

    @pytest.mark.parametrize(
        ("keep", "p", "out"),
        [
            ([True, False], 0.5, 4.0),
            ([False, True], 0.25, 4.0),
            ([True, True], 0.5, 10.0),
            ([False, False], 0.5, 0.0),
        ],
    )
    def test_by_hand(self, keep, p, out):
        # [True, False], p = 1/2: 8 · 1/4 / (1/2) = 4, and lse = ln(1 + 3) whatever is dropped.
        got, lse = attention(
            self.q, self.k, self.v, dropout_p=p, dropout_keep=torch.tensor(keep), return_lse=True
        )
        assert got.item() == pytest.approx(out, rel=1e-14) and lse.item() == pytest.approx(
            math.log(4), rel=1e-15
        )

    def test_weights_are_dropped_after_everything_else(self):
        # V = identity shows the weights.
        q, k, _ = random_qkv(kv_heads=4)
        eye = torch.eye(7, dtype=F64).expand(2, 4, 7, 7)
        keep = dropout_keep(4, 0.3, (2, 4, 5, 7))
        options = {
            "score": scores.softcap(2.0),
            "sink": torch.ones(4, dtype=F64),
            "mask": torch.arange(7) > 1,
        }
        p, lse = attention(q, k, eye, return_lse=True, **options)
        dropped, dropped_lse = attention(
            q, k, eye, return_lse=True, dropout_p=0.3, dropout_keep=keep, **options
        )
        close(dropped, torch.where(keep, p / 0.7, 0))
        assert torch.equal(lse, dropped_lse)

    @pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 4, 1, 7), (5, 1), (7,)])
    def test_keep_broadcasts(self, shape):
        q, k, v = random_qkv()
        keep = torch.rand(shape) < 0.5
        expected = attention(q, k, v, dropout_p=0.5, dropout_keep=keep.expand(2, 4, 5, 7))
        assert torch.equal(attention(q, k, v, dropout_p=0.5, dropout_keep=keep), expected)

    def test_mean_over_masks_is_attention_without_dropout(self):
        q, k, v = random_qkv(batch=1)
        many = [t.expand(1000, -1, -1, -1) for t in (q, k, v)]
        out = attention(*many, dropout_p=0.25, dropout_keep=dropout_keep(8, 0.25, (1000, 4, 5, 7)))
        apart = (out.mean(0) - attention(q, k, v)[0]).abs()
        assert (apart <= 5 * out.std(0) / math.sqrt(1000)).all()

    def test_errors(self):
        keep = torch.tensor([True, False])

        def fails(match, **options):
            with pytest.raises(ValueError, match=match):
                attention(self.q, self.k, self.v, **options)

        fails("dropout_p=0.5 and dropout_keep .*None.* together", dropout_p=0.5)
        fails(r"dropout_p=0.0 and dropout_keep .*\(2,\).* together", dropout_keep=keep)
        fails("dropout_p=1.5 must be", dropout_p=1.5, dropout_keep=keep)
        fails("dropout_p=-0.5 must be", dropout_p=-0.5, dropout_keep=keep)
        fails("dropout_p=nan must be", dropout_p=math.nan, dropout_keep=keep)
        fails("dropout_keep.dtype=torch.int64 must be", dropout_p=0.5, dropout_keep=keep.long())
        fails(r"dropout_keep.shape=\(3,\) must broadcast", dropout_p=0.5, dropout_keep=torch.ones(3).bool())
