"""What the oracle promises at the edges: rows with no key, unseen junk, no length, huge scores, bad input."""

import math

import pytest
import torch

from harness.exact import F64, close, column, random_qkv
from tilewise_reference import attention, masks

LN3 = math.log(3)


class TestRowsWithNoKey:
    keep = torch.ones(5, 7, dtype=torch.bool)
    keep[2] = False

    def test_without_sink(self):
        q, k, v = random_qkv(grad=True)
        out, lse = attention(q, k, v, mask=self.keep, return_lse=True)
        assert out[:, :, 2].eq(0).all() and lse[:, :, 2].eq(-math.inf).all()
        assert lse[:, :, [0, 1, 3, 4]].isfinite().all()
        (out.sum() + lse.sum()).backward()
        assert q.grad[:, :, 2].eq(0).all() and not q.grad[:, :, 1].eq(0).any()
        assert all(t.grad.isfinite().all() for t in (q, k, v))

    def test_with_sink(self):
        q, k, v = random_qkv()
        sink = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=F64, requires_grad=True)
        out, lse = attention(q, k, v, mask=self.keep, sink=sink, return_lse=True)
        assert out[:, :, 2].eq(0).all()
        close(lse[:, :, 2], sink.expand(2, 4))
        lse[:, :, 2].sum().backward()
        close(sink.grad, torch.full((4,), 2.0, dtype=F64))  # d lse / d sink = 1 in each of two batches

    def test_bias_of_minus_infinity_on_a_whole_row(self):
        q, k, v = random_qkv(grad=True)
        bias = torch.zeros(5, 7, dtype=F64).masked_fill(~self.keep, -math.inf)
        out, lse = attention(q, k, v, bias=bias, return_lse=True)
        close(out, attention(q, k, v, mask=self.keep))
        assert lse[:, :, 2].eq(-math.inf).all()
        (out.sum() + lse.sum()).backward()
        assert q.grad[:, :, 2].eq(0).all() and all(t.grad.isfinite().all() for t in (q, k, v))

    def test_no_key_at_all(self):
        q, k, v = random_qkv(grad=True)
        out, lse = attention(q, k, v, mask=torch.tensor(False), return_lse=True)
        assert out.eq(0).all() and lse.eq(-math.inf).all()
        (out.sum() + lse.sum()).backward()
        assert all(t.grad.eq(0).all() for t in (q, k, v))


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
class TestUnseenRowsNeverLeak:
    def same_with_junk(self, plant, similarity, **options):
        """out, lse and gradients are those of finite inputs, and unseen rows have gradient 0."""
        clean, dirty = random_qkv(grad=True), random_qkv(grad=True)
        with torch.no_grad():
            plant(*dirty)
        results = []
        for inputs in (clean, dirty):
            out, lse = attention(*inputs, similarity=similarity, return_lse=True, **options)
            (out.sin().sum() + lse.masked_fill(lse == -math.inf, 0).sum()).backward()
            results.append((out, lse, *(t.grad for t in inputs)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and not b.isnan().any()
        for t in dirty:
            assert t.grad[~t.isfinite()].eq(0).all()

    def test_padding_of_each_batch_element(self, junk, similarity):
        def plant(q, k, v):
            k[0, :, 3:], v[0, :, 3:], k[1, :, 6:], v[1, :, 6:] = junk, junk, junk, junk

        self.same_with_junk(plant, similarity, mask=masks.padding(torch.tensor([3, 6]), 7))

    def test_one_key_head(self, junk, similarity):
        # Heads 2 and 3 read key head 1; neither sees its keys 0 and 1.
        keep = torch.ones(4, 1, 7, dtype=torch.bool)
        keep[2:, :, :2] = False

        def plant(q, k, v):
            k[:, 1, :2], v[:, 1, :2] = junk, junk

        self.same_with_junk(plant, similarity, mask=keep)

    def test_keys_before_every_window(self, junk, similarity):
        # Bottom right with 5 queries and 7 keys: query 0 stands at key 2 and sees keys 1, 2; nobody sees 0.
        def plant(q, k, v):
            k[:, :, 0], v[:, :, 0] = junk, junk

        self.same_with_junk(plant, similarity, mask=masks.window(1, 0, 5, 7), sink=torch.zeros(4))

    def test_queries_that_see_no_key(self, junk, similarity):
        def plant(q, k, v):
            q[:, :, 2] = junk

        self.same_with_junk(plant, similarity, mask=TestRowsWithNoKey.keep)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize(
    "sizes", [{"q_len": 0}, {"kv_len": 0}, {"q_len": 0, "kv_len": 0}, {"batch": 0}, {"value_dim": 0}]
)
def test_zero_sizes(sizes, with_sink):
    q, k, v = random_qkv(grad=True, **sizes)
    sink = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64, requires_grad=True) if with_sink else None
    mask = masks.causal(q.shape[2], k.shape[2])
    out, lse = attention(q, k, v, mask=mask, sink=sink, return_lse=True)
    assert out.shape == (*q.shape[:3], v.shape[3]) and lse.shape == q.shape[:3]
    if k.shape[2] == 0:
        assert out.eq(0).all()
        expected = torch.full((4,), -math.inf, dtype=F64) if sink is None else sink
        assert torch.equal(lse, expected.reshape(4, 1).expand(lse.shape))
    (out.sum() + lse.masked_fill(lse == -math.inf, 0).sum()).backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


class TestNumerics:
    def test_huge_scores(self):
        # exp(10⁶) overflows; the weights are 1/4 and 3/4 all the same.
        q, k, v = column(1.0), column(1e6, 1e6 + LN3), column(8.0, 4.0)
        out, lse = attention(q, k, v, return_lse=True)
        assert out.item() == pytest.approx(5.0, rel=1e-9)
        assert lse.item() == pytest.approx(1e6 + math.log(4), rel=1e-15)
        close(attention(q, column(-1e6, -1e6), v), column(6.0))

    def test_shift_of_scores_changes_lse_only(self):
        q, k, v = random_qkv()
        out, lse = attention(q, k, v, return_lse=True)
        shifted, shifted_lse = attention(q, k, v, bias=torch.tensor(100.0), return_lse=True)
        torch.testing.assert_close(shifted, out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(shifted_lse, lse + 100, rtol=1e-12, atol=0)

    def test_weights_sum_to_one(self):
        q, k, v = random_qkv()
        close(attention(q, k, torch.ones_like(v)), torch.ones(2, 4, 5, 4, dtype=F64))

    def test_weights_are_those_that_lse_says(self):
        # V = identity shows the weights: exp(s - lse), which with a sink sum to 1 - exp(sink - lse).
        q, k, _ = random_qkv(kv_heads=4)
        eye = torch.eye(7, dtype=F64).expand(2, 4, 7, 7)
        sink = torch.tensor([0.0, 1.0, -1.0, 3.0], dtype=F64)
        p, lse = attention(q, k, eye, scale=1.0, sink=sink, return_lse=True)
        close(p, torch.exp(torch.einsum("bhid,bhjd->bhij", q, k) - lse[..., None]))
        close(p.sum(3), 1 - torch.exp(sink[:, None] - lse))

    @pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_computes_and_returns_in_dtype(self, given, dtype):
        q, k, v = (t.to(given) for t in random_qkv())
        bias, sink = torch.ones(5, 7, dtype=given), torch.ones(4, dtype=given)
        out, lse = attention(q, k, v, bias=bias, sink=sink, dtype=dtype, return_lse=True)
        assert out.dtype == lse.dtype == dtype
        exact = attention(q.to(F64), k.to(F64), v.to(F64), bias=bias.to(F64), sink=sink.to(F64))
        tolerance = 1e-12 if dtype == F64 else 1e-6
        torch.testing.assert_close(out.to(F64), exact, rtol=0, atol=tolerance)

    def test_any_strides(self):
        q, k, v = random_qkv(q_len=7)
        expected = attention(q, k, v)
        layout = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
        assert not layout[0].is_contiguous()
        close(attention(*layout), expected)
        close(attention(q, k[:, :, :1].expand_as(k), v), attention(q, k[:, :, :1].repeat(1, 1, 7, 1), v))


class TestErrors:
    q, k, v = random_qkv()

    def fails(self, match, *inputs, **options):
        with pytest.raises(ValueError, match=match):
            attention(*(inputs or (self.q, self.k, self.v)), **options)

    def test_shapes(self):
        self.fails("k.shape", self.q, self.k[..., :2], self.v)
        self.fails("v.shape", self.q, self.k, self.v[:, :, :6])
        self.fails("k.shape", self.q, self.k[:1], self.v[:1])
        self.fails("v.shape", self.q, self.k, self.v[:, :1])

    def test_heads(self):
        self.fails("q_heads=3 must be a multiple of kv_heads=2", self.q[:, :3], self.k, self.v)
        self.fails("multiple of kv_heads=0", self.q, self.k[:, :0], self.v[:, :0])

    def test_options(self):
        self.fails("similarity='l2' must be", similarity="l2")
        self.fails("temperature needs similarity='cosine'", temperature=2.0)
        self.fails(r"kept.dtype=torch.float32.*bias", mask=torch.zeros(5, 7))
        self.fails(r"mask.shape=\(6, 7\) must broadcast", mask=torch.ones(6, 7, dtype=torch.bool))
        self.fails(r"bias.shape=\(3, 5, 7\) must broadcast", bias=torch.zeros(3, 5, 7))
