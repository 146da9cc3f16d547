"""The oracle against numbers worked by hand, PyTorch's math backend and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.exact import F64, close, column, random_qkv
from tilewise_reference import attention, masks, scores

LN2, LN3 = math.log(2), math.log(3)


class TestByHand:
    """q = 1 against keys 0 and ln 3: exp(scores) are 1 and 3, so the weights of the values 8 and 4 are
    1/4 and 3/4."""

    q, k, v = column(1.0), column(0.0, LN3), column(8.0, 4.0)

    def run(self, q=q, k=k, v=v, **options):
        out, lse = attention(q, k, v, return_lse=True, **options)
        return out.flatten().tolist(), lse.flatten().tolist()

    def expect(self, got, out, lse):
        assert got[0] == pytest.approx(out, rel=1e-14)
        assert got[1] == pytest.approx(lse, rel=1e-14)

    def test_plain(self):
        # 8 · 1/4 + 4 · 3/4 = 5;  lse = ln(1 + 3)
        self.expect(self.run(), [5.0], [math.log(4)])

    def test_sink_takes_weight_and_adds_no_value(self):
        # A sink of ln 4 makes the sum 1 + 3 + 4 = 8: 8 · 1/8 + 4 · 3/8 = 2.5
        self.expect(self.run(sink=torch.tensor([math.log(4)], dtype=F64)), [2.5], [math.log(8)])

    def test_bias(self):
        # + ln 3 on the first key: weights 3/6 and 3/6
        self.expect(self.run(bias=torch.tensor([LN3, 0.0], dtype=F64)), [6.0], [math.log(6)])

    def test_mask(self):
        # Only the second key counts.
        self.expect(self.run(mask=torch.tensor([False, True])), [4.0], [LN3])

    @pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0, dtype=F64)])
    def test_scale(self, scale):
        # exp(scores) are 1 and 3² = 9: (8 + 36) / 10
        self.expect(self.run(scale=scale), [4.4], [math.log(10)])

    def test_scale_acts_before_score_and_score_before_bias(self):
        # s = 0, 2 ln 3;  s² = 0, 4 ln² 3;  the bias brings the second back to ln 3: 1/4 and 3/4 again.
        bias = torch.tensor([0.0, LN3 - 4 * LN3**2], dtype=F64)
        got = self.run(scale=2.0, score=lambda s, *index: s**2, bias=bias)
        self.expect(got, [5.0], [math.log(4)])

    def test_scores_apply_in_the_order_given(self):
        # (s + ln 3) · 0.5 = ½ ln 3, ln 3: exp gives √3 and 3;  s · 0.5 + ln 3 would give 3 and 3√3.
        def add(s, *index):
            return s + LN3

        def halve(s, *index):
            return s * 0.5

        self.expect(self.run(score=[add, halve]), [(8 * 3**0.5 + 12) / (3**0.5 + 3)], [math.log(3**0.5 + 3)])

    def test_default_scale_is_one_over_sqrt_head_dim(self):
        # head_dim 4: q·k = 2 ln 3 for the second key, times 1/√4 is ln 3; "dot" leaves 2 ln 3, exp = 9.
        q = torch.ones(1, 1, 1, 4, dtype=F64)
        k = torch.stack([torch.zeros(4, dtype=F64), torch.full((4,), LN3 / 2, dtype=F64)])[None, None]
        self.expect(self.run(q, k), [5.0], [math.log(4)])
        self.expect(self.run(q, k, similarity="dot"), [4.4], [math.log(10)])

    def test_cosine(self):
        # q = (3, 4) of length 5; k = (4, 3)·2 of length 10: cos = 24/25, and k = (-3, -4): cos = -1.
        # Times the temperature 25·ln 2 / 49: the scores differ by (24/25 + 1)·25/49·ln 2 = ln 2: 2/3, 1/3.
        q = torch.tensor([3.0, 4.0], dtype=F64).reshape(1, 1, 1, 2)
        k = torch.tensor([[8.0, 6.0], [-3.0, -4.0]], dtype=F64).reshape(1, 1, 2, 2)
        lse = 25 / 49 * LN2 * 24 / 25 + math.log(1.5)
        for temperature in (25 / 49 * LN2, torch.tensor([25 / 49 * LN2], dtype=F64)):
            got = self.run(q, k, similarity="cosine", temperature=temperature)
            self.expect(got, [8 * 2 / 3 + 4 / 3], [lse])

    def test_temperature_of_each_head(self):
        # k = (1, 0) and (0, 1), q = (1, 0): the cosines are 1 and 0, times ln 3 and ln 7 in the two heads.
        q = torch.tensor([5.0, 0.0], dtype=F64).expand(1, 2, 1, 2)
        k, v = torch.eye(2, dtype=F64)[None, None], column(8.0, 4.0)
        temperature = torch.tensor([LN3, math.log(7)], dtype=F64)
        got = self.run(q, k, v, similarity="cosine", temperature=temperature)
        self.expect(got, [(3 * 8 + 4) / 4, (7 * 8 + 4) / 8], [math.log(4), math.log(8)])

    def test_cosine_divides_by_at_least_1e_12(self):
        # A row of length 10⁻¹³ is divided by 10⁻¹² and keeps a length of 0.1; one of 10⁻¹¹ becomes 1.
        for q_size, k_size in ((2.0, 1e-13), (1e-13, 1e-11)):
            q = torch.tensor([q_size, 0.0], dtype=F64).reshape(1, 1, 1, 2)
            k = torch.tensor([[k_size, 0.0], [0.0, 1e-11]], dtype=F64).reshape(1, 1, 2, 2)
            got = self.run(q, k, similarity="cosine", temperature=10 * LN3)
            self.expect(got, [(3 * 8 + 4) / 4], [math.log(4)])

    def test_cosine_of_zero_row_is_zero(self):
        q = torch.zeros(1, 1, 1, 2, dtype=F64)
        k = torch.tensor([[8.0, 6.0], [-3.0, -4.0]], dtype=F64).reshape(1, 1, 2, 2)
        self.expect(self.run(q, k, similarity="cosine"), [6.0], [LN2])

    def test_causal_by_hand(self):
        # Two queries of 1, keys 0, ln 3, ln 4, values 8, 4, 2.
        q, k, v = column(1.0, 1.0), column(0.0, LN3, math.log(4)), column(8.0, 4.0, 2.0)
        # Bottom right: row 0 sees keys 0, 1: 5. Row 1 sees all: (8 + 12 + 8) / 8 = 3.5.
        self.expect(self.run(q, k, v, mask=masks.causal(2, 3)), [5.0, 3.5], [math.log(4), math.log(8)])
        # Top left: row 0 sees key 0: 8. Row 1 sees keys 0, 1: 5.
        self.expect(self.run(q, k, v, mask=masks.causal(2, 3, "top_left")), [8.0, 5.0], [0.0, math.log(4)])


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(6, 2), (8, 1), (9, 3), (3, 3)])
def test_query_head_reads_key_head_h_over_group(q_heads, kv_heads):
    q, k, v = random_qkv(q_heads=q_heads, kv_heads=kv_heads)
    out = attention(q, k, v)
    for h in range(q_heads):
        one = slice(h // (q_heads // kv_heads), h // (q_heads // kv_heads) + 1)
        close(out[:, h : h + 1], attention(q[:, h : h + 1], k[:, one], v[:, one]))


def test_a_key_that_one_head_of_a_group_sees_counts_for_that_head():
    q, k, v = random_qkv(q_heads=6, kv_heads=2, q_len=3, kv_len=7)
    keep = (torch.arange(7) == torch.arange(6)[:, None]).reshape(6, 1, 7)  # head h sees key h alone
    out = attention(q, k, v, mask=keep)
    for h in range(6):
        close(out[:, h], v[:, h // 3, h, None].expand(2, 3, 4))


class TestAgainstPyTorch:
    def torch(self, q, k, v, **options):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, **options)

    def test_plain(self):
        q, k, v = random_qkv(kv_heads=4)
        close(attention(q, k, v), self.torch(q, k, v))
        close(attention(q, k, v, scale=0.3), self.torch(q, k, v, scale=0.3))

    @pytest.mark.parametrize(("q_heads", "kv_heads"), [(6, 2), (8, 1), (9, 3)])
    def test_grouped_heads(self, q_heads, kv_heads):
        q, k, v = random_qkv(q_heads=q_heads, kv_heads=kv_heads)
        close(attention(q, k, v), self.torch(q, k, v, enable_gqa=True))

    @pytest.mark.parametrize(("q_len", "kv_len"), [(6, 6), (4, 7), (7, 4)])
    def test_both_causal_corners(self, q_len, kv_len):
        q, k, v = random_qkv(kv_heads=4, q_len=q_len, kv_len=kv_len)
        top_left = attention(q, k, v, mask=masks.causal(q_len, kv_len, "top_left"))
        close(top_left, self.torch(q, k, v, is_causal=True))
        lower_right = torch.ones(q_len, kv_len, dtype=torch.bool).tril(diagonal=kv_len - q_len)
        bottom_right = attention(q, k, v, mask=masks.causal(q_len, kv_len, "bottom_right"))
        close(bottom_right, self.torch(q, k, v, attn_mask=lower_right))

    @pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 4, 1, 7), (2, 1, 5, 1), (5, 7), (7,)])
    def test_bool_and_float_masks_of_any_broadcast(self, shape):
        q, k, v = random_qkv(kv_heads=4)
        generator = torch.Generator().manual_seed(1)
        keep = torch.rand(shape, generator=generator) < 0.7
        close(attention(q, k, v, mask=keep), self.torch(q, k, v, attn_mask=keep.expand(2, 4, 5, 7)))
        bias = torch.randn(shape, dtype=F64, generator=generator)
        close(attention(q, k, v, bias=bias), self.torch(q, k, v, attn_mask=bias.expand(2, 4, 5, 7)))

    def test_gradients(self):
        generator = torch.Generator().manual_seed(2)
        keep = torch.rand(2, 4, 5, 7, generator=generator) < 0.7
        do = torch.randn(2, 4, 5, 4, dtype=F64, generator=generator)
        ours, theirs = random_qkv(grad=True), random_qkv(grad=True)
        attention(*ours, mask=keep).backward(do)
        self.torch(*theirs, attn_mask=keep, enable_gqa=True).backward(do)
        for a, b in zip(ours, theirs, strict=True):
            close(a.grad, b.grad)


MASKS = {
    "none": None,
    "causal": masks.causal(3, 4),
    "empty rows": masks.causal(3, 4, "top_left"),  # with the padding below, row 0 keeps no key
    "several": [masks.window(2, 1, 3, 4), masks.padding(torch.tensor([2, 4]), 4)],
}
SCORES = {
    "none": None,
    "softcap": scores.softcap(1.5),
    "several": [scores.alibi(torch.tensor([0.5, 0.25]), 3, 4), scores.softcap(2.0)],
}


class TestGradients:
    """Against finite differences, of out and lse together."""

    def inputs(self):
        return random_qkv(q_heads=2, kv_heads=1, q_len=3, kv_len=4, head_dim=2, value_dim=3, grad=True)

    @pytest.mark.parametrize("score", SCORES)
    @pytest.mark.parametrize("mask", MASKS)
    def test_q_k_v_bias_sink_scale(self, mask, score):
        mask = MASKS[mask]
        if mask is MASKS["empty rows"]:
            mask = [mask, masks.padding(3, 4, "left")]  # keys 1 .. 3 are real, row 0 may see only key 0
        bias = torch.linspace(-1, 1, 8, dtype=F64).reshape(1, 2, 1, 4).requires_grad_()
        sink = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
        scale = torch.tensor(0.7, dtype=F64, requires_grad=True)

        def both(q, k, v, bias, sink, scale):
            return attention(
                q, k, v, mask=mask, score=SCORES[score], bias=bias, sink=sink, scale=scale, return_lse=True
            )

        assert torch.autograd.gradcheck(both, (*self.inputs(), bias, sink, scale))

    def test_without_sink_through_rows_with_no_key(self):
        keep = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])

        def both(q, k, v):
            out, lse = attention(q, k, v, mask=keep, return_lse=True)
            assert lse[:, :, 1].eq(-math.inf).all()
            return out, lse[:, :, ::2]  # -inf has no finite difference

        assert torch.autograd.gradcheck(both, self.inputs())

    @pytest.mark.parametrize("mask", ["none", "causal"])
    def test_cosine_and_temperature(self, mask):
        temperature = torch.tensor([2.0, 5.0], dtype=F64, requires_grad=True)

        def both(q, k, v, temperature):
            return attention(
                q, k, v, mask=MASKS[mask], similarity="cosine", temperature=temperature, return_lse=True
            )

        assert torch.autograd.gradcheck(both, (*self.inputs(), temperature))

    def test_tables_of_scores(self):
        slopes = torch.tensor([[0.5, 0.25], [0.1, 0.2]], dtype=F64, requires_grad=True)
        table = torch.linspace(-1, 1, 16, dtype=F64).reshape(2, 8).requires_grad_()

        def out(q, k, v, slopes, table):
            score = [scores.alibi(slopes, 3, 4), scores.relative_position(table, 3, 4, 6)]
            return attention(q, k, v, score=score)

        assert torch.autograd.gradcheck(out, (*self.inputs(), slopes, table))

    def test_second_order(self):
        def both(q, k, v):
            return attention(q, k, v, mask=masks.causal(3, 4), return_lse=True)

        assert torch.autograd.gradgradcheck(both, self.inputs())
