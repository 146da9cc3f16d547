"""Gradients of biases, slopes, tables and parameters of one's own, which sum over what they broadcast along,
and what is refused because it has none."""

import itertools
import random

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from harness.features import build, judge
from harness.problem import DTYPES, SMALL, lengths
from tilewise import ALiBi, Bias, Causal, Dense, RelativePosition, Softcap, UserMask, UserScore

SUBSETS = ["".join(axes) for n in range(5) for axes in itertools.combinations("bhqk", n)]


# ---- Bias


def broadcast_shape(axes: str, sizes: tuple[int, ...] = (2, 2, 17, 20)) -> tuple[int, ...]:
    return tuple(size if axis in axes else 1 for axis, size in zip("bhqk", sizes, strict=True))


@pytest.mark.in_turns
@pytest.mark.parametrize("axes", SUBSETS)
def test_bias_that_broadcasts(device, axes):
    """Sums over each set of dimensions along which a bias has size 1."""
    p = build(device, random.Random(axes), [DTYPES[SUBSETS.index(axes) % 3]], **SMALL)
    bias = p.randn(
        *broadcast_shape(axes), dtype=(torch.float32, torch.float16, torch.bfloat16)[len(axes) % 3]
    )
    p.arguments, p.mask = {"bias": bias}, Causal()
    assert judge(p, backward=True)["Bias.bias (0)"].shape == bias.shape


@pytest.mark.parametrize("shape", [(), (20,), (1,), (17, 1), (17, 20), (2, 1, 20), (2, 17, 20)], ids=str)
def test_bias_of_lower_rank(device, shape):
    p = build(device, random.Random(6), [], **SMALL)
    p.arguments = {"bias": p.randn(*shape)}
    judge(p, backward=True)


@pytest.mark.parametrize("view", ["transposed", "sliced", "every other", "expanded rows", "expanded heads"])
def test_bias_in_any_layout(device, view):
    p = build(device, random.Random(7), ["float16"], **SMALL)
    x = p.randn(2, 2, 17, 20)
    if view == "transposed":
        x = p.randn(20, 2, 17, 2).permute(3, 1, 2, 0)
    elif view == "sliced":
        x = torch.full((2, 3, 20, 29), torch.nan, device=device)[:, 1:, 2:19, 5:25].copy_(x)
    elif view == "every other":
        x = torch.full((2, 2, 34, 60), torch.nan, device=device)[:, :, 1::2, 2::3].copy_(x)
    else:
        x = (x[:, :, :1] if view == "expanded rows" else x[:, :1]).expand(2, 2, 17, 20)
    p.arguments = {"bias": x}
    judge(p, backward=True)


def test_several_biases_between_modifiers(device):
    p = build(device, random.Random(8), [], **SMALL)
    p.scores = [Bias(p.randn(2, 1, 20)), Softcap(2.0), Bias(p.randn(17, 20)), Softcap(1.5)]
    p.arguments = {"bias": p.randn(2, 2, 17, 1), "scale": 0.5}
    assert len(judge(p, backward=True)) == 6


# ---- Slopes, tables, parameters of one's own


@pytest.mark.parametrize("shape", [(2,), (2, 2), (1, 2), (2, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_slopes(device, shape, align):
    p = build(
        device, random.Random(9), [], **(SMALL | {"q_len": 20, "kv_len": 17 if align == "top_left" else 33})
    )
    p.scores = [ALiBi(p.randn(*shape), align)]
    judge(p, backward=True)


TABLES = [  # buckets, max_distance: reached by both lengths; beyond them; below them; one bucket of each side
    (8, 12),
    (32, 128),
    (12, 7),
    (4, 5),
]


@pytest.mark.in_turns
@pytest.mark.parametrize("pair", [(19, 37), (37, 19)], ids=str)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("table", [0, 1], ids=["near", "far"])
def test_table(device, table, bidirectional, align, pair):
    buckets, max_distance = TABLES[2 * table + (align == "top_left")]
    p = build(device, random.Random(10), [], **(SMALL | {"batch": 1} | lengths(device, pair)))
    p.scores = [RelativePosition(p.randn(2, buckets), max_distance, bidirectional, align)]
    p.mask = Causal() if bidirectional else None
    judge(p, backward=True)


@triton.jit
def stretch_factor(s, batch, head, q_idx, kv_idx, args):
    ptr, by_batch, by_head, by_q, by_kv = args
    return 1.0 + tl.load(ptr + batch * by_batch + head * by_head + q_idx * by_q + kv_idx * by_kv)


@triton.jit
def stretch_score(s, batch, head, q_idx, kv_idx, args):
    return s * stretch_factor(s, batch, head, q_idx, kv_idx, args)


@triton.jit
def stretch_by_parameter(s, batch, head, q_idx, kv_idx, args):
    return s


def stretch_twin(s, batch, head, q_idx, kv_idx, parameter, by_batch, by_head, by_q, by_kv):
    index = batch * by_batch + head * by_head + q_idx * by_q + kv_idx * by_kv
    return s * (1 + parameter.flatten()[index].to(s.dtype))


def stretch(parameter: torch.Tensor, axes: str) -> UserScore:
    """s · (1 + parameter), the parameter's dimensions being these axes."""
    strides = dict(zip(axes, parameter.stride(), strict=True))
    return UserScore(
        stretch_score,
        (parameter, *(strides.get(axis, 0) for axis in "bhqk")),
        twin=stretch_twin,
        derivative=stretch_factor,
        parameters={0: (axes, stretch_by_parameter)},
    )


@pytest.mark.in_turns
@pytest.mark.parametrize("axes", SUBSETS)
def test_parameters_of_a_user_score(device, axes):
    p = build(device, random.Random(axes), [DTYPES[SUBSETS.index(axes) % 3]], **SMALL)
    shape = [size for axis, size in zip("bhqk", (2, 2, 17, 20), strict=True) if axis in axes]
    p.scores = [stretch(p.randn(*shape), axes), Softcap(4.0)]
    judge(p, backward=True)


@triton.jit
def line_score(s, batch, head, q_idx, kv_idx, args):
    return s * tl.load(args[1] + head) + tl.load(args[2] + kv_idx)


@triton.jit
def line_slope(s, batch, head, q_idx, kv_idx, args):
    return tl.load(args[1] + head)


@triton.jit
def line_by_slope(s, batch, head, q_idx, kv_idx, args):
    return s


def line_twin(s, batch, head, q_idx, kv_idx, unused, slope, offset):
    return s * slope[head].to(s.dtype) + offset[kv_idx].to(s.dtype)


def test_two_parameters_of_one_user_score(device):
    """Positions count arguments of every kind; a derivative of None stands for 1."""
    p = build(device, random.Random(11), [], **SMALL)
    parameters = {2: ("k", None), 1: ("h", line_by_slope)}
    args = (3, p.randn(2), p.randn(20))
    p.scores = [UserScore(line_score, args, twin=line_twin, derivative=line_slope, parameters=parameters)]
    got = judge(p, backward=True)
    assert [tuple(gradient.shape) for gradient in got.values()][3:] == [(2,), (20,)]


@triton.jit
def tabled_keep(q_idx, kv_idx, batch, head, args):
    return tl.load(args[1][0] + kv_idx) != 0


def test_tensors_in_nested_arguments_do_not_shift_gradients(device):
    """args may hold tuples, of which the library sees no more than a function that reads them."""
    p = build(device, random.Random(12), [], **SMALL)
    kept = torch.arange(20, device=device) % 3
    (q, k, v), bias, gradients = p.tensors(), p.randn(17, 20), []
    for mask in (UserMask(tabled_keep, (1, (kept, 2))), Dense(kept != 0)):
        leaf = bias.clone().requires_grad_()
        out = tilewise.attention(q, k, v, mask=mask, bias=leaf, impl="portable")
        gradients.append(torch.autograd.grad(out.sum(), leaf, allow_unused=True)[0])
    assert gradients[0] is not None, "the bias has no gradient at all"
    assert torch.equal(*gradients)


# ---- What has no gradient is refused


@triton.jit
def halve(s, batch, head, q_idx, kv_idx, args):
    return 0.5 * s


@triton.jit
def offset_keep(q_idx, kv_idx, batch, head, args):
    return kv_idx > tl.load(args[0])


def test_a_user_score_without_derivative(device):
    q, k, v = (torch.randn(1, 1, 4, 8, device=device) for _ in range(3))
    score = UserScore(halve, twin=lambda s, *_: 0.5 * s)
    want = tilewise.attention(q, k, v, score=score, impl="portable")
    q.requires_grad_()
    with pytest.raises(ValueError, match="has no derivative"):
        tilewise.attention(q, k, v, score=score, impl="portable")
    assert "halve" in tilewise.why_not(q, k, v, score=score, impl="portable")[0]
    with torch.no_grad():
        assert torch.equal(tilewise.attention(q, k, v, score=score, impl="portable"), want)
    tilewise.attention(q, k, v, score=score, impl="torch").sum().backward()
    assert q.grad.any()


def test_trained_arguments_without_a_derivative(device):
    q, k, v = (torch.randn(1, 2, 4, 8, device=device) for _ in range(3))
    for trained in (1, 2):
        args = (3, torch.randn(2, device=device), torch.randn(4, device=device))
        args[trained].requires_grad_()
        parameters = {3 - trained: ("k" if trained == 1 else "h", None)}
        score = UserScore(line_score, args, derivative=line_slope, parameters=parameters)
        with pytest.raises(ValueError, match=rf"args\[{trained}\] requires a gradient"):
            tilewise.attention(q, k, v, score=score, impl="portable")
    threshold = torch.zeros(1, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"UserMask.args\[0\] requires a gradient, and a mask has none"):
        tilewise.attention(q, k, v, mask=UserMask(offset_keep, (threshold,)), impl="portable")


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({3: ("h", None)}, "key 3"),
        ({-1: ("h", None)}, "key -1"),
        ({0: ("h", None)}, "key 0"),  # a number
        ({1: ("x", None)}, "axes 'x'"),
        ({1: ("hh", None)}, "axes 'hh'"),
        ({1: ("kq", None)}, "axes 'kq'"),
    ],
)
def test_bad_parameters_of_a_user_score(parameters, message):
    with pytest.raises(ValueError, match=message):
        UserScore(line_score, (3, torch.zeros(2), torch.zeros(4)), parameters=parameters)


@pytest.mark.parametrize("axes", ["", "k", "q", "bh", "hk"])
def test_parameters_whose_shape_misfits_their_axes(device, axes):
    q, k, v = (torch.randn(1, 2, n, 8, device=device) for n in (3, 4, 4))
    args = (3, torch.zeros(2, device=device), torch.zeros(4, device=device))
    score = UserScore(line_score, args, derivative=line_slope, parameters={1: (axes, line_by_slope)})
    with pytest.raises(ValueError, match=rf"args\[1\].shape=\(2,\) must be .*axes '{axes}'"):
        tilewise.attention(q, k, v, score=score, impl="portable")


def test_an_argument_that_begins_to_require_a_gradient_is_judged_again(device):
    """What passed is remembered: also whether an argument required a gradient, beside others that do."""
    q, k, v = (torch.randn(1, 2, 4, 8, device=device, requires_grad=True) for _ in range(3))
    factors, offsets = torch.randn(2, device=device), torch.randn(4, device=device)
    score = UserScore(line_score, (3, factors, offsets), derivative=line_slope, parameters={2: ("k", None)})
    tilewise.attention(q, k, v, score=score, impl="portable")
    factors.requires_grad_()
    with pytest.raises(ValueError, match=r"args\[1\] requires a gradient"):
        tilewise.attention(q, k, v, score=score, impl="portable")
