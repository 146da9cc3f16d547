"""Score modifiers against numbers worked by hand, T5's buckets against the published implementation."""

import math

import pytest
import torch

from tilewise_reference import scores

F64 = torch.float64


def apply(score, s):
    """The score on s [B, H, q_len, kv_len] with the index tensors that attention passes."""
    index = [
        torch.arange(n).reshape([n if axis == other else 1 for other in range(4)])
        for axis, n in enumerate(s.shape)
    ]
    return score(s, *index)


def zeros(q_len, kv_len, heads=1, batch=1):
    return torch.zeros(batch, heads, q_len, kv_len, dtype=F64)


class TestSoftcap:
    def test_by_hand(self):
        # tanh(ln 2) = (2 - 1/2) / (2 + 1/2) = 0.6, tanh(ln 3) = (3 - 1/3) / (3 + 1/3) = 0.8
        s = torch.tensor([0.0, math.log(2), -math.log(3)], dtype=F64).reshape(1, 1, 1, 3) * 50
        expected = torch.tensor([0.0, 30.0, -40.0], dtype=F64).reshape(1, 1, 1, 3)
        torch.testing.assert_close(apply(scores.softcap(50.0), s), expected, rtol=1e-14, atol=0)

    def test_far_scores_reach_the_cap_and_do_not_overflow(self):
        s = torch.tensor([1e30, -1e30, math.inf], dtype=F64).reshape(1, 1, 1, 3)
        assert apply(scores.softcap(2.0), s).flatten().tolist() == [2.0, -2.0, 2.0]

    @pytest.mark.parametrize("cap", [0.0, -1.0, math.nan])
    def test_cap_must_be_positive(self, cap):
        with pytest.raises(ValueError, match="cap="):
            scores.softcap(cap)


class TestAlibi:
    def test_by_hand(self):
        # 2 queries at the end of 3 keys stand at 1 and 2; slopes 1 and 1/2.
        got = apply(scores.alibi(torch.tensor([1.0, 0.5]), 2, 3), zeros(2, 3, heads=2))
        distances = torch.tensor([[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]], dtype=F64)
        assert torch.equal(got, torch.stack([-distances, -distances / 2])[None])

    def test_top_left(self):
        got = apply(scores.alibi(torch.tensor([2.0]), 2, 3, "top_left"), zeros(2, 3))
        assert got[0, 0].tolist() == [[0.0, -2.0, -4.0], [-2.0, 0.0, -2.0]]

    def test_slopes_per_batch_element_add_to_the_scores(self):
        s = torch.full((2, 2, 1, 2), 10.0, dtype=F64)
        got = apply(scores.alibi(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1, 2), s)  # the query stands at 1
        assert got[:, :, 0].tolist() == [[[9.0, 10.0], [8.0, 10.0]], [[7.0, 10.0], [6.0, 10.0]]]


# Key position minus query position, and the buckets that T5Attention._relative_position_bucket of
# Hugging Face transformers 5.23.0 gives for them: (num_buckets, max_distance, bidirectional) -> buckets.
RELATIVE = [-1000, -128, -127, -91, -90, -64, -63, -32, -16, -15, -11, -8, -7, -1,
            0, 1, 7, 8, 11, 12, 16, 45, 46, 64, 127, 128, 1000]  # fmt: skip
BUCKETS = {
    (32, 128, True): [15, 15, 15, 15, 14, 14, 13, 12, 10, 9, 8, 8, 7, 1,
                      0, 17, 23, 24, 24, 25, 26, 28, 29, 30, 31, 31, 31],
    (32, 128, False): [31, 31, 31, 29, 29, 26, 26, 21, 16, 15, 11, 8, 7, 1,
                       0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    (20, 50, True): [9, 9, 9, 9, 9, 9, 9, 9, 7, 7, 6, 6, 5, 1,
                     0, 11, 15, 16, 16, 16, 17, 19, 19, 19, 19, 19, 19],
}  # fmt: skip


class TestRelativePosition:
    @pytest.mark.parametrize("setting", BUCKETS)
    def test_buckets_of_transformers(self, setting):
        assert scores.t5_bucket(torch.tensor(RELATIVE), *setting).tolist() == BUCKETS[setting]

    @pytest.mark.parametrize(
        ("num_buckets", "max_distance"), [(32, 128), (8, 20), (12, 50), (4, 2), (64, 128)]
    )
    @pytest.mark.parametrize("bidirectional", [True, False])
    def test_buckets_of_the_formula(self, num_buckets, max_distance, bidirectional):
        """The floor of the logarithm, away from the whole numbers where its rounding could tip it."""
        max_distance = max(max_distance, num_buckets)
        n = num_buckets // 2 if bidirectional else num_buckets
        e = n // 2
        got = scores.t5_bucket(torch.arange(-300, 301), num_buckets, max_distance, bidirectional).tolist()
        checked = 0
        for relative, bucket in zip(range(-300, 301), got, strict=True):
            far = abs(relative) if bidirectional else max(-relative, 0)
            side = n if bidirectional and relative > 0 else 0
            if far < e:
                assert bucket == side + far
                continue
            x = (n - e) * math.log(far / e) / math.log(max_distance / e)
            if abs(x - round(x)) > 1e-9:
                assert bucket == side + min(e + math.floor(x), n - 1)
                checked += 1
        assert checked > 200

    @pytest.mark.parametrize("bidirectional", [True, False])
    def test_exact_powers_fall_on_the_upper_bucket(self, bidirectional):
        # 16 buckets a side, 8 of them exact, up to 128 = 8 · 16: bucket 8 + b starts at 8 · 16^(b/8), a
        # whole number for b = 2, 4, 6.
        buckets = 32 if bidirectional else 16
        got = scores.t5_bucket(torch.tensor([-15, -16, -31, -32, -63, -64]), buckets, 128, bidirectional)
        assert got.tolist() == [9, 10, 11, 12, 13, 14]

    def test_shape_is_kept(self):
        assert scores.t5_bucket(torch.zeros(2, 3, 4, dtype=torch.int32)).shape == (2, 3, 4)
        assert scores.t5_bucket(torch.zeros(0, dtype=torch.int64)).shape == (0,)

    def test_score_by_hand(self):
        # 4 buckets, both ways: side 0 has distances 0 | 1 and more, side 1 (keys after the query) the same,
        # so keys before, at and after the query read columns 1, 0 and 3.
        table = torch.tensor([[10.0, 20.0, 30.0, 40.0], [1.0, 2.0, 3.0, 4.0]], dtype=F64)
        got = apply(scores.relative_position(table, 2, 3, 8), zeros(2, 3, heads=2) + 0.5)
        assert got[0, 0].tolist() == [[20.5, 10.5, 40.5], [20.5, 20.5, 10.5]]
        assert got[0, 1].tolist() == [[2.5, 1.5, 4.5], [2.5, 2.5, 1.5]]
        got = apply(scores.relative_position(table, 2, 3, 8, align="top_left"), zeros(2, 3, heads=2))
        assert got[0, 0].tolist() == [[10.0, 40.0, 40.0], [20.0, 10.0, 40.0]]
        at = torch.tensor([1, 0])  # as at the bottom right, and as at the top left
        got = apply(scores.relative_position(table, 2, 3, 8, align=at), zeros(2, 3, heads=2, batch=2))
        assert got[0, 0].tolist() == [[20.0, 10.0, 40.0], [20.0, 20.0, 10.0]]
        assert got[1, 0].tolist() == [[10.0, 40.0, 40.0], [20.0, 10.0, 40.0]]

    def test_one_way_score_by_hand(self):
        # 4 buckets, one way: 0, 1 exact; 2 from distance 2, 3 from 2 · √4 = 4 (max_distance 8); after: 0.
        table = torch.tensor([[10.0, 20.0, 30.0, 40.0]], dtype=F64)
        score = scores.relative_position(table, 6, 6, 8, bidirectional=False)
        assert apply(score, zeros(6, 6))[0, 0, 5].tolist() == [40.0, 40.0, 30.0, 30.0, 20.0, 10.0]
        assert apply(score, zeros(6, 6))[0, 0, 0].tolist() == [10.0] * 6

    def test_settings_without_meaning_are_refused(self):
        with pytest.raises(ValueError, match="num_buckets=3 must be at least 4"):
            scores.t5_bucket(torch.tensor([1]), 3, 128, True)
        with pytest.raises(ValueError, match="num_buckets=1 must be at least 2"):
            scores.t5_bucket(torch.tensor([1]), 1, 128, False)
        with pytest.raises(ValueError, match="max_distance=8 must be greater than 8"):
            scores.t5_bucket(torch.tensor([1]), 32, 8, True)


def test_align_is_checked():
    with pytest.raises(ValueError, match="align='middle' must be"):
        scores.alibi(torch.ones(1), 3, 3, "middle")
