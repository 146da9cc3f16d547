"""Tangents and second derivatives by formula against numbers worked by hand, autograd, finite differences."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad

from harness.drawn import EVERYTHING, FEATURES, Draw, close, inputs_of, of_two, options_of
from harness.exact import F64, column
from tilewise_reference import attention, cases, dropout_keep, gradients, masks, scores, second, tangent

LN3 = math.log(3)
SECOND = [*EVERYTHING[:-1], "of two", "dropout"]


def flat(found):
    named = [t for t in found[:-1] if t is not None]
    return [*named, *(t for tables in found.scores for t in tables)]


def along(options, tangents):
    """The tangents, in the order of ``inputs_of``, by the names of ``tangent``'s arguments."""
    left = iter(tangents)
    given = {f"{name}_tangent": next(left) for name in "qkv"}
    for name in ("bias", "scale", "temperature", "sink"):
        if isinstance(options.get(name), torch.Tensor):
            given[f"{name}_tangent"] = next(left)
    given["score_tangents"] = [[next(left) for _ in score.parameters] for score in options.get("score", ())]
    return given


def tangents_of(draw, options):
    return [draw.randn(*x.shape).detach() for x in inputs_of(draw.qkv, options)]


def both(qkv, options):
    """out and lse, whose -inf have no derivative."""
    out, lse = attention(*qkv, return_lse=True, **options)
    return out, lse.masked_fill(lse == -math.inf, 0)


class Wanted(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    second: list[torch.Tensor]


def autograd(qkv, options, dout, dlse, tangents):
    """Two times backward: what Σ gradients · tangents depends on, in dout and dlse linearly, is both."""
    inputs, arrived = inputs_of(qkv, options), [dout.requires_grad_(), dlse.requires_grad_()]
    found = torch.autograd.grad(
        both(qkv, options), inputs, arrived, create_graph=True, materialize_grads=True
    )
    moved = sum((g * t).sum() for g, t in zip(found, tangents, strict=True))
    *wanted, out, lse = torch.autograd.grad(moved, [*inputs, *arrived], materialize_grads=True)
    return Wanted(out, lse, wanted)


def check(draw, options):
    out, lse = attention(*draw.qkv, return_lse=True, **options)
    dout, dlse = draw.randn(*out.shape).detach(), draw.randn(*lse.shape).detach()
    tangents = tangents_of(draw, options)
    given = along(options, tangents)
    wanted = autograd(draw.qkv, options, dout, dlse, tangents)
    for actual, expected in zip(tangent(*draw.qkv, **options, **given), wanted[:2], strict=True):
        assert actual.shape == expected.shape and not actual.requires_grad
        close(actual, expected)
    found = flat(second(*draw.qkv, dout, dlse, **options, **given))
    for actual, expected, x in zip(found, wanted.second, inputs_of(draw.qkv, options), strict=True):
        assert actual.shape == x.shape and not actual.requires_grad
        close(actual, expected)


class TestByHand:
    """As in the tests of the gradients: weights 1/4 and 3/4 of the values 8 and 4, so o = 5."""

    q, k, v = column(1.0), column(0.0, LN3), column(8.0, 4.0)

    def expect(self, got, *numbers):
        assert got.flatten().tolist() == pytest.approx(numbers, rel=1e-14, abs=1e-15)

    def test_tangent(self):
        # The first key moves, and its score of 0 with it.
        out, lse = tangent(self.q, self.k, self.v, k_tangent=column(1.0, 0.0))
        self.expect(lse, 1 / 4)
        # tp = 1/4 (1 - 1/4), 3/4 (0 - 1/4), of 8 and 4
        self.expect(out, 3 / 16 * (8 - 4))

    def test_second(self):
        got = second(self.q, self.k, self.v, column(1.0), k_tangent=column(1.0, 0.0))
        self.expect(got.v, 3 / 16, -3 / 16)  # the weights move
        # ds = p (v - o) is 3/4, -3/4; of it tp (v - o) - p to = 3/16 · 3 - 1/4 · 3/4, 3/16 - 3/4 · 3/4
        self.expect(got.k, 3 / 8, -3 / 8)
        # dq = Σ ds k, so Σ tds k + ds tk
        self.expect(got.q, -3 / 8 * LN3 + 3 / 4)
        assert got[3:] == (None, None, None, None, ())

    def test_lse(self):
        got = second(self.q, self.k, self.v, column(0.0), torch.ones(1, 1, 1), k_tangent=column(1.0, 0.0))
        self.expect(got.k, 3 / 16, -3 / 16)  # d lse / d s = p
        self.expect(got.v, 0.0, 0.0)

    def test_sink(self):
        # A sink of ln 4 that moves: weights 1/8, 3/8 and 1/2, o = 2.5
        sink = dict(sink=torch.tensor([math.log(4)], dtype=F64), sink_tangent=torch.ones(1))
        out, lse = tangent(self.q, self.k, self.v, **sink)
        self.expect(lse, 1 / 2)
        self.expect(out, -2.5 / 2)
        got = second(self.q, self.k, self.v, column(1.0), **sink)
        # dsink = -p_sink o, and p_sink moves by 1/4
        self.expect(got.sink, -(1 / 4 * 2.5 - 1 / 2 * 1.25))


PAIRS = [pair for i, pair in enumerate(itertools.combinations(FEATURES, 2)) if i % 3 == 0]


@pytest.mark.parametrize("features", [(), *((f,) for f in FEATURES), *PAIRS, EVERYTHING, SECOND])
def test_autograd_for_each_feature_and_some_together(features):
    """Grouped heads, more keys than queries or fewer (rows with no key under a causal mask)."""
    for heads, lengths in (((6, 2), (5, 7)), ((3, 1), (5, 4))):
        draw = Draw(*heads, *lengths)
        check(draw, options_of(draw, features))


MODELS = {str(case.features): case for case in (*cases.CASES, *cases.FEATURE_CASES)}


def options_of_case(case, draw):
    """What a model asks for, on the sizes of the draw."""
    asks, heads = case.features, draw.q_heads
    options = {"mask": [], "score": [], "similarity": asks.get("similarity", "scaled_dot")}
    if "causal" in asks:
        options["mask"].append(masks.causal(*draw.lengths, asks["causal"]))
    if "window" in asks:
        options["mask"].append(masks.window(2, asks["window"][1], *draw.lengths))
    if "documents" in asks:
        options["mask"].append(masks.documents(torch.arange(draw.q_len) // 3))
    if "bool_mask" in asks:
        options["mask"].append(draw.keep())
    if "scale" in asks:
        options["scale"] = asks["scale"]
    if "softcap" in asks:
        options["score"].append(scores.softcap(1.5))
    if "alibi" in asks:
        options["score"].append(scores.alibi(draw.randn(heads), *draw.lengths))
    if "relative_position" in asks:
        both_ways = asks["relative_position"][2]
        options["score"].append(
            scores.relative_position(draw.randn(heads, 8), *draw.lengths, 9, bidirectional=both_ways)
        )
    if "bias" in asks:
        sizes = zip(asks["bias"], (2, heads, *draw.lengths), strict=True)
        options["bias"] = draw.randn(*(1 if asked == 1 else size for asked, size in sizes))
    if "temperature" in asks:
        options["temperature"] = draw.randn(heads)
    if "sink" in asks:
        options["sink"] = draw.randn(heads)
    if "dropout" in asks:
        options |= {"dropout_p": 0.3, "dropout_keep": dropout_keep(7, 0.3, draw.pairs)}
    assert set(asks) <= {*options, "causal", "window", "documents", "bool_mask", "softcap", "alibi",
                         "relative_position", "dropout", "trained"}  # fmt: skip
    return options


@pytest.mark.parametrize("case", MODELS.values(), ids=lambda case: case.name)
def test_autograd_for_what_models_ask_for(case):
    kv_heads = 1 if case.kv_heads == 1 else 2
    draw = Draw(2 * kv_heads if case.q_heads > case.kv_heads else kv_heads, kv_heads, 6, 6)
    check(draw, options_of_case(case, draw))


@pytest.mark.parametrize("lengths", [(1, 1), (1, 6), (6, 1), (0, 4), (4, 0), (0, 0)])
def test_short_and_empty(lengths):
    for features in (["causal"], ["sink", "bias", "table", "dropout", "cosine"]):
        for batch in (2, 0):
            draw = Draw(4, 2, *lengths, batch=batch)
            check(draw, options_of(draw, features))


def test_cosine_of_short_rows():
    """Rows of length 10⁻¹³, which are divided by 10⁻¹², beside one of 10⁻¹¹ and longer ones."""
    draw = Draw(2, 1, 3, 4)
    with torch.no_grad():
        for t, row, size in zip(draw.qkv[:2] * 2, (1, 0, 2, 1), (1e-13, 1e-13, 1e-11, 1e-11), strict=True):
            t[0, 0, row] *= size / t[0, 0, row].norm()
    check(draw, options_of(draw, ["cosine", "causal"]))


def test_forward_mode_is_the_tangent():
    """PyTorch's own forward mode, in which all that is trained is dual."""

    class Duals(Draw):
        def randn(self, *shape):
            x = super().randn(*shape).detach()
            return forward_ad.make_dual(x, torch.ones_like(x))

    plain = Draw(6, 2, 5, 7)
    options = options_of(plain, SECOND)
    ones = [torch.ones_like(x) for x in inputs_of(plain.qkv, options)]
    found = tangent(*plain.qkv, **options, **along(options, ones))
    with forward_ad.dual_level():
        draw = Duals(6, 2, 5, 7)
        qkv = [forward_ad.make_dual(x.detach(), torch.ones_like(x)) for x in draw.qkv]
        wanted = [forward_ad.unpack_dual(x).tangent for x in both(qkv, options_of(draw, SECOND))]
        for actual, expected in zip(found, wanted, strict=True):
            close(actual, expected)


class ByFormula(torch.autograd.Function):
    """``gradients`` whose derivatives are ``second`` and ``tangent``."""

    @staticmethod
    def forward(ctx, options, dout, dlse, *inputs):
        ctx.options = options
        ctx.save_for_backward(dout, dlse, *inputs)
        return tuple(flat(gradients(*inputs[:3], dout, dlse, **options)))

    @staticmethod
    def backward(ctx, *tangents):
        dout, dlse, *inputs = ctx.saved_tensors
        given = ctx.options | along(ctx.options, tangents)
        found = second(*inputs[:3], dout, dlse, **given)
        return None, *tangent(*inputs[:3], **given), *flat(found)


@pytest.mark.parametrize(("features", "fast"), [(["cosine", "causal"], False), (SECOND, True)])
def test_finite_differences(features, fast):
    draw = Draw(2, 1, 2, 3, head_dim=2, value_dim=3)
    options = options_of(draw, features)
    out, lse = both(draw.qkv, options)
    arrived = draw.randn(*out.shape), draw.randn(*lse.shape)
    inputs = inputs_of(draw.qkv, options)
    differentiated = lambda *given: ByFormula.apply(options, *given)  # noqa: E731
    assert torch.autograd.gradcheck(differentiated, (*arrived, *inputs), fast_mode=fast)


@pytest.mark.parametrize("features", [[], ["cosine", "softcap"], ["sink", "bias", "dropout"]], ids=" ".join)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
class TestUnseenRowsNeverLeak:
    keep = torch.ones(5, 7, dtype=torch.bool)
    keep[2], keep[:, 3] = False, False  # query 2 sees nothing, nobody sees key 3

    def test_from_tensors_tangents_and_what_arrives(self, junk, features):
        results = []
        for planted in (0.5, junk):
            draw = Draw(6, 2, 5, 7)
            options = options_of(draw, features) | {"mask": self.keep}
            dout, dlse = draw.randn(2, 6, 5, 4).detach(), draw.randn(2, 6, 5).detach()
            tangents = tangents_of(draw, options)
            q, k, v = (t.detach().clone() for t in draw.qkv)
            for x in (q, dout, dlse, tangents[0]):
                x[:, :, 2] = planted
            for x in (k, v, *tangents[1:3]):
                x[:, :, 3] = planted
            given = options | along(options, tangents)
            out, lse = tangent(q, k, v, **given)
            # With a sink, that row's lse is the sink, which depends on dlse.
            found = second(q, k, v, dout, dlse, **given)._replace(sink=None)
            results.append([out, lse, *flat(found)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and b.isfinite().all()
        assert out[:, :, 2].eq(0).all() and out[:, :, 1].ne(0).all()
        assert all(t.eq(0).all() for t in (found.q[:, :, 2], found.k[:, :, 3], found.v[:, :, 3]))
        assert all(t.ne(0).all() for t in (found.q[:, :, 1], found.k[:, :, 2], found.v[:, :, 2]))

    def test_from_scores_of_pairs_that_do_not_count(self, junk, features):
        draw = Draw(6, 2, 5, 7)
        options = options_of(draw, features) | {"mask": self.keep}
        by_key = draw.randn(7).detach()
        by_key[3] = junk  # and so is every derivative of the first score
        bias = torch.where(self.keep, 1.0, junk)
        options["score"] = [
            of_two(draw.randn(6), by_key), scores.additive_bias(bias), scores.softcap(2.0)
        ]  # fmt: skip
        tangents = tangents_of(draw, options)
        tangents[-1] = torch.where(self.keep, 1.0, junk)
        given = options | along(options, tangents)
        found = second(*draw.qkv, torch.ones(2, 6, 5, 4), torch.ones(2, 6, 5), **given)
        assert all(t.isfinite().all() for t in (*tangent(*draw.qkv, **given), *flat(found)))
        assert found.scores[0][1][3].eq(0).all() and found.scores[1][0][~self.keep].eq(0).all()


def test_row_of_minus_infinity_does_not_move():
    draw = Draw(2, 1, 2, 3)
    bias = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf] * 3], dtype=F64)
    dlse = torch.tensor([1.0, math.nan]).expand(2, 2, 2)  # of lse = -inf, a constant
    given = dict(bias=bias, q_tangent=torch.ones_like(draw.qkv[0]), bias_tangent=torch.ones_like(bias))
    out, lse = tangent(*draw.qkv, **given)
    found = second(*draw.qkv, torch.ones(2, 2, 2, 4), dlse, **given)
    assert lse[:, :, 1].eq(0).all() and out[:, :, 1].eq(0).all() and found.q[:, :, 1].eq(0).all()
    assert all(t.isfinite().all() for t in flat(found)) and found.bias[bias == -math.inf].eq(0).all()


def test_tangents_that_are_left_out_are_0():
    draw = Draw(6, 2, 5, 7)
    options = options_of(draw, SECOND)
    zeros = along(options, [torch.zeros_like(x) for x in inputs_of(draw.qkv, options)])
    some = {"k_tangent": torch.ones_like(draw.qkv[1])}
    dout = torch.ones(2, 6, 5, 4)
    for a, b in zip(flat(second(*draw.qkv, dout, **options, **some)),
                    flat(second(*draw.qkv, dout, **options, **(zeros | some))), strict=True):  # fmt: skip
        assert torch.equal(a, b) and b.ne(0).any()
    assert all(t.eq(0).all() for t in tangent(*draw.qkv, **options))
    options = dict(scale=2.0, similarity="cosine", temperature=3.0)
    assert second(*draw.qkv, dout, **options)[3:] == (None, None, None, None, ())


def test_computes_and_returns_in_dtype():
    draw = Draw(6, 2, 5, 7)
    options = options_of(draw, ["dense mask", "bias", "alibi", "softcap", "cosine", "sink", "dropout"])
    half = [t.detach().half() for t in draw.qkv]
    given = options | along(options, tangents_of(draw, options))
    dout = torch.ones(2, 6, 5, 4, dtype=torch.float16)
    exact, single = (
        [*tangent(*half, **given, dtype=dtype), *flat(second(*half, dout, **given, dtype=dtype))]
        for dtype in (F64, torch.float32)
    )
    assert {t.dtype for t in exact} == {F64} and {t.dtype for t in single} == {torch.float32}
    for a, b in zip(single, exact, strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=0, atol=32 * 2**-23 * max(1.0, float(b.abs().max())))


def test_errors():
    draw = Draw(6, 2, 5, 7)
    q, k, v = draw.qkv
    dout = torch.ones(2, 6, 5, 4)

    def fails(match, function, *given, **options):
        with pytest.raises(ValueError, match=match):
            function(q, k, v, *given, **options)

    rule = scores.Score(lambda s, *index: s**2, lambda s, *index: 2 * s)
    fails(r"no second derivatives; give .*second_derivatives", second, dout, score=rule)
    tangent(q, k, v, score=rule)
    fails(r"score=<function .*no derivative", tangent, score=lambda s, *index: s)
    fails(r"q_tangent.shape=\(2, 6, 5, 1\) must be \(2, 6, 5, 3\)", tangent, q_tangent=q[..., :1])
    fails(r"scale_tangent is given, but scale=2.0 is no tensor", tangent, scale=2.0, scale_tangent=q.sum())
    fails(r"sink_tangent is given, but sink=None is no tensor", tangent, sink_tangent=q[0, :, 0, 0])
    alibi = scores.alibi(draw.randn(6), 5, 7)
    fails(r"score_tangents has \[2\] tangents, one a parameter is \[1\]", tangent, score=alibi,
          score_tangents=[[None, None]])  # fmt: skip
    fails(r"score_tangents\[0\]\[0\].shape=\(6, 1\) must be \(6,\)", tangent, score=alibi,
          score_tangents=[[torch.ones(6, 1)]])  # fmt: skip
    fails(r"dout.shape.*\(2, 6, 5, 3\) must be \(2, 6, 5, 4\)", second, dout[..., :3])
