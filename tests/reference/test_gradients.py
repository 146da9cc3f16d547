"""The gradients by formula against numbers worked by hand, autograd on the oracle and finite differences."""

import itertools
import math

import pytest
import torch

from harness.drawn import EVERYTHING, FEATURES, Draw, close, inputs_of, options_of
from harness.exact import F64, column
from tilewise_reference import attention, gradients, masks, scores

LN3 = math.log(3)


def flat(found):
    named = [t for t in found[:-1] if t is not None]
    return [*named, *(t for tables in found.scores for t in tables)]


def autograd(qkv, options, dout, dlse):
    out, lse = attention(*qkv, return_lse=True, **options)
    lse = lse.masked_fill(lse == -math.inf, 0)
    result = (out * dout).sum() + (lse * dlse).sum()
    return torch.autograd.grad(result, inputs_of(qkv, options), materialize_grads=True)


def check(draw, options, with_dout=True, with_dlse=True):
    out, lse = attention(*draw.qkv, return_lse=True, **options)
    dout = torch.randn(out.shape, dtype=F64, generator=draw.generator) * with_dout
    dlse = torch.randn(lse.shape, dtype=F64, generator=draw.generator) * with_dlse
    found = flat(gradients(*draw.qkv, dout, dlse if with_dlse else None, **options))
    expected = autograd(draw.qkv, options, dout, dlse)
    for actual, wanted, given in zip(found, expected, inputs_of(draw.qkv, options), strict=True):
        assert actual.shape == given.shape and not actual.requires_grad
        close(actual, wanted)


class TestByHand:
    """As in the tests of attention: weights 1/4 and 3/4 of the values 8 and 4, so o = 5."""

    q, k, v = column(1.0), column(0.0, LN3), column(8.0, 4.0)

    def run(self, dout=1.0, dlse=None, **options):
        return gradients(self.q, self.k, self.v, column(dout), dlse, **options)

    def expect(self, got, *numbers):
        assert got.flatten().tolist() == pytest.approx(numbers, rel=1e-14, abs=1e-15)

    def test_plain(self):
        got = self.run()
        # ds = 1/4 (8 - 5), 3/4 (4 - 5)
        self.expect(got.v, 1 / 4, 3 / 4)
        self.expect(got.k, 3 / 4, -3 / 4)
        self.expect(got.q, -3 / 4 * LN3)
        assert got[3:] == (None, None, None, None, ())

    def test_lse(self):
        got = self.run(0.0, torch.ones(1, 1, 1))
        self.expect(got.v, 0.0, 0.0)
        self.expect(got.k, 1 / 4, 3 / 4)  # d lse / d s = p

    def test_sink(self):
        # A sink of ln 4: weights 1/8, 3/8 and 1/2, o = 2.5
        got = self.run(sink=torch.tensor([math.log(4)], dtype=F64))
        self.expect(got.k, (8 - 2.5) / 8, 3 * (4 - 2.5) / 8)
        self.expect(got.sink, -2.5 / 2)

    def test_dropout(self):
        # The second key dropped, 1 - p = 1/2: o = 2 · 1/4 · 8 = 4; dp = 16, 0; ds = 1/4 (16 - 4), 3/4 (0 - 4)
        got = self.run(dropout_p=0.5, dropout_keep=torch.tensor([True, False]))
        self.expect(got.v, 1 / 2, 0.0)
        self.expect(got.k, 3.0, -3.0)


@pytest.mark.parametrize("features", [(), *((f,) for f in FEATURES), *itertools.combinations(FEATURES, 2)])
def test_autograd_for_each_feature_and_each_two(features):
    """Grouped heads, more keys than queries or fewer (rows with no key under a causal mask)."""
    for heads, lengths in (((6, 2), (5, 7)), ((3, 1), (5, 4))):
        draw = Draw(*heads, *lengths)
        check(draw, options_of(draw, features))


AT = torch.tensor([3, -1])
POSITIONED = {
    "slopes": lambda d: {"score": [scores.alibi(d.randn(d.q_heads), *d.lengths, AT)]},
    "slopes of a number": lambda d: {"score": [scores.alibi(d.randn(2, d.q_heads), *d.lengths, -2)]},
    "table": lambda d: {"score": [scores.relative_position(d.randn(d.q_heads, 8), *d.lengths, 6, align=AT)]},
    "masks": lambda d: {
        "mask": [masks.causal(*d.lengths, AT + 2), masks.window(4, 1, *d.lengths, AT)],
        "bias": d.randn(d.q_heads, *d.lengths),
    },
}


@pytest.mark.parametrize("name", POSITIONED)
def test_positions_of_each_sequence(name):
    draw = Draw(6, 2, 5, 7)
    check(draw, POSITIONED[name](draw))


@pytest.mark.parametrize(("with_dout", "with_dlse"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("value_dim", [1, 3, 5])
@pytest.mark.parametrize("features", [["causal"], ["sink", "dropout"], EVERYTHING])
def test_gradients_of_out_and_lse_each_and_together(features, value_dim, with_dout, with_dlse):
    draw = Draw(6, 2, 5, 7, value_dim=value_dim)
    check(draw, options_of(draw, features), with_dout, with_dlse)


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 6, 5, 7), (2, 1, 5, 7), (2, 6, 1, 7), (2, 6, 5, 1),
                                   (2, 1, 1, 7), (1, 1, 1), (6, 5, 7), (5, 7), (5, 1), (7,), ()])  # fmt: skip
def test_bias_is_summed_over_what_it_broadcasts(shape):
    draw = Draw(6, 2, 5, 7)
    check(draw, {"bias": draw.randn(*shape), **options_of(draw, ["dense mask", "softcap"])})


@pytest.mark.parametrize("lengths", [(1, 1), (1, 6), (6, 1), (0, 4), (4, 0), (0, 0)])
def test_short_and_empty(lengths):
    for features in (["causal"], ["sink", "bias", "table", "dropout", "cosine"]):
        draw = Draw(4, 2, *lengths)
        check(draw, options_of(draw, features))
        draw = Draw(4, 2, *lengths, batch=0)
        check(draw, options_of(draw, features))


def test_cosine_of_short_rows():
    """Rows of length 0 and of 10⁻¹³, which are divided by 10⁻¹², beside one of 10⁻¹¹ and longer ones."""
    draw = Draw(2, 1, 3, 4)
    with torch.no_grad():
        draw.qkv[0][0, 0, 0], draw.qkv[1][1, 0, 2] = 0, 0
        for t, row, size in zip(draw.qkv[:2] * 2, (1, 0, 2, 1), (1e-13, 1e-13, 1e-11, 1e-11), strict=True):
            t[0, 0, row] *= size / t[0, 0, row].norm()
    check(draw, options_of(draw, ["cosine", "causal"]))


class ByFormula(torch.autograd.Function):
    """``attention`` whose backward is ``gradients``."""

    @staticmethod
    def forward(ctx, options, *inputs):
        ctx.options = options
        ctx.save_for_backward(*inputs)
        return attention(*inputs[:3], return_lse=True, **options)

    @staticmethod
    def backward(ctx, dout, dlse):
        return None, *flat(gradients(*ctx.saved_tensors[:3], dout, dlse, **ctx.options))


@pytest.mark.parametrize("features", [[], ["dense mask"], ["cosine", "causal"], ["bias", "dropout"],
                                      ["alibi by batch", "softcap", "table"], EVERYTHING],
                         ids=" ".join)  # fmt: skip
def test_finite_differences(features):
    draw = Draw(2, 1, 2, 3, head_dim=2, value_dim=3)
    options = options_of(draw, features)

    def both(*inputs):
        out, lse = ByFormula.apply(options, *inputs)
        return out, lse[lse > -math.inf]  # -inf has no finite difference

    assert torch.autograd.gradcheck(both, inputs_of(draw.qkv, options))


@pytest.mark.parametrize("features", [[], ["cosine", "softcap"], ["sink", "bias", "dropout"]], ids=" ".join)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
class TestUnseenRowsNeverLeak:
    keep = torch.ones(5, 7, dtype=torch.bool)
    keep[2], keep[:, 3] = False, False  # query 2 sees nothing, nobody sees key 3

    def test_into_gradients(self, junk, features):
        results = []
        for planted in (0.5, junk):
            draw = Draw(6, 2, 5, 7)
            options = options_of(draw, features) | {"mask": self.keep}
            dout, dlse = draw.randn(2, 6, 5, 4).detach(), draw.randn(2, 6, 5).detach()
            q, k, v = (t.detach().clone() for t in draw.qkv)
            q[:, :, 2], k[:, :, 3], v[:, :, 3], dout[:, :, 2] = planted, planted, planted, planted
            dlse[:, :, 2] = planted
            found = gradients(q, k, v, dout, dlse, **options)
            # With a sink, that is the lse of a row with no key.
            results.append(found._replace(sink=None))
        for a, b in zip(*map(flat, results), strict=True):
            assert torch.equal(a, b) and b.isfinite().all()
        assert all(t.eq(0).all() for t in (found.q[:, :, 2], found.k[:, :, 3], found.v[:, :, 3]))
        assert all(t.ne(0).all() for t in (found.q[:, :, 1], found.k[:, :, 2], found.v[:, :, 2]))

    def test_unseen_rows_have_no_gradient_whatever_the_others_hold(self, junk, features):
        draw = Draw(6, 2, 5, 7)
        options = options_of(draw, features) | {"mask": self.keep}
        q, k, v = (t.detach().clone() for t in draw.qkv)
        q[:, :, 0], k[:, :, 0], v[:, :, 0] = junk, junk, junk
        found = gradients(q, k, v, torch.ones(2, 6, 5, 4), torch.ones(2, 6, 5), **options)
        assert all(t.eq(0).all() for t in (found.q[:, :, 2], found.k[:, :, 3], found.v[:, :, 3]))

    def test_into_autograd_from_dout(self, junk, features):
        draw = Draw(6, 2, 5, 7)
        options = options_of(draw, features) | {"mask": self.keep}
        dout = torch.ones(2, 6, 5, 4, dtype=F64)
        dout[:, :, 2] = junk
        out = attention(*draw.qkv, **options)
        found = torch.autograd.grad(out, inputs_of(draw.qkv, options), dout)
        assert all(t.isfinite().all() for t in found)

    def test_from_scores_of_pairs_that_do_not_count(self, junk, features):
        draw = Draw(6, 2, 5, 7)
        options = options_of(draw, features) | {"mask": self.keep}
        options["score"] = [scores.additive_bias(torch.where(self.keep, 1.0, junk)), scores.softcap(2.0)]
        found = gradients(*draw.qkv, torch.ones(2, 6, 5, 4), torch.ones(2, 6, 5), **options)
        assert all(t.isfinite().all() for t in flat(found))
        assert found.scores[0][0][~self.keep].eq(0).all()


def test_row_of_minus_infinity_has_no_gradient():
    draw = Draw(2, 1, 2, 3)
    bias = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf] * 3], dtype=F64)
    dlse = torch.tensor([1.0, math.nan]).expand(2, 2, 2)  # of lse = -inf, a constant
    found = gradients(*draw.qkv, torch.ones(2, 2, 2, 4), dlse, bias=bias)
    assert found.q[:, :, 1].eq(0).all() and all(t.isfinite().all() for t in flat(found))
    assert found.bias[bias == -math.inf].eq(0).all()


def test_only_tensors_have_gradients():
    draw = Draw(6, 2, 5, 7)
    dout = torch.ones(2, 6, 5, 4)
    found = gradients(*draw.qkv, dout, scale=2.0, similarity="cosine", temperature=3.0)
    assert found[3:] == (None, None, None, None, ())
    score = [scores.softcap(2.0), scores.alibi(draw.randn(6), 5, 7)]
    found = gradients(*draw.qkv, dout, score=score, sink=draw.randn(6))
    assert found.sink is not None and [len(tables) for tables in found.scores] == [0, 1]
    assert len(gradients(*draw.qkv, dout, score=score[0], bias=draw.randn(5, 7)).scores) == 1


def test_computes_and_returns_in_dtype():
    draw = Draw(6, 2, 5, 7)
    options = options_of(draw, EVERYTHING)
    half = [t.detach().half() for t in draw.qkv]
    dout, dlse = torch.ones(2, 6, 5, 4, dtype=torch.float16), torch.ones(2, 6, 5)
    exact = flat(gradients(*half, dout, dlse, **options))
    single = flat(gradients(*half, dout, dlse, **options, dtype=torch.float32))
    assert {t.dtype for t in exact} == {F64} and {t.dtype for t in single} == {torch.float32}
    for a, b in zip(single, exact, strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=0, atol=32 * 2**-23 * max(1.0, float(b.abs().max())))


def test_errors():
    draw = Draw(6, 2, 5, 7)
    dout, dlse = torch.ones(2, 6, 5, 4), torch.ones(2, 6, 5)

    def fails(match, *given, **options):
        with pytest.raises(ValueError, match=match):
            gradients(*draw.qkv, *given, **options)

    fails(r"score=<function .*no derivative; give .*Score\(", dout, score=lambda s, *index: s)
    fails(r"dout.shape.*\(2, 6, 5, 3\) must be \(2, 6, 5, 4\)", dout[..., :3])
    fails(r"dlse.shape.*\(2, 6, 5, 1\) must be \(2, 6, 5\)", dout, dlse[..., None])
    fails("temperature needs", dout, temperature=2.0)
