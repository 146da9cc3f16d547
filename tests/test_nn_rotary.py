"""`tilewise.nn.Rotary` against the paper's complex numbers, in float64."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from harness.oracle import _assert_close
from tilewise.nn import AttentionCore, CrossAttention, Rotary, SelfAttention
from tilewise_reference.yardstick import largest_difference

pytestmark = pytest.mark.oldest
STYLES = ("half", "interleaved")
FAR = 1_000_000


def by_complex_numbers(x, positions, style, dim, frequencies, dtype):
    """x [batch, heads, length, head_dim], the pairs of its first `dim` dimensions times exp(i · position ·
    frequency); positions [length] or [batch, length], frequencies [dim / 2]. `dtype` is that of the product:
    the angles are float64 always, since it is they that are tested."""
    angles = positions.double()[..., None, :, None] * frequencies.double()
    factor = torch.polar(torch.ones_like(angles), angles).to(
        torch.complex(x[:0].to(dtype), x[:0].to(dtype)).dtype
    )
    turned, rest = x.to(dtype).split([dim, x.shape[-1] - dim], dim=-1)
    if style == "half":
        z = torch.complex(*turned.chunk(2, dim=-1)) * factor
        turned = torch.cat((z.real, z.imag), dim=-1)
    else:
        z = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous()) * factor
        turned = torch.view_as_real(z).flatten(-2)
    return torch.cat((turned, rest), dim=-1)


def of_theta(theta, dim, device):
    return torch.tensor(
        [theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64, device=device
    )


def check(rotary, frequencies, positions=None, dtype=torch.float32, where=None, length=7):
    """Hold both results of `rotary` against float64. The yardstick is what PyTorch's complex64 is off by, in
    every dtype: bf16 and fp16 may add the one rounding of the result."""
    device = frequencies.device
    where = torch.arange(length, device=device) if where is None else where
    q, k = (torch.randn(2, heads, length, rotary.head_dim, device=device).to(dtype) for heads in (4, 2))
    for name, x, got in zip(("q", "k"), (q, k), rotary(q, k, positions), strict=True):
        assert got.dtype == dtype and got.shape == x.shape
        want, theirs = (
            by_complex_numbers(x, where, rotary.style, rotary.rotary_dim, frequencies, wide)
            for wide in (torch.float64, torch.float32)
        )
        _assert_close(name, got, want, largest_difference(theirs, want))


# ---- The numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim, rotary_dim", [(8, None), (64, None), (10, 4), (9, 8), (2, 2)])
@pytest.mark.parametrize("style", STYLES)
def test_turns_by_position_times_frequency(style, dim, rotary_dim, dtype, device):
    rotary = Rotary(dim, style=style, rotary_dim=rotary_dim, theta=500.0)
    check(rotary, of_theta(500.0, rotary_dim or dim, device), dtype=dtype)


@pytest.mark.parametrize("style", STYLES)
def test_frequencies_of_ones_own(style, device):
    frequencies = torch.tensor([1.0, 0.3, 0.001], device=device)
    check(Rotary(8, style=style, rotary_dim=6, frequencies=frequencies), frequencies)


@pytest.mark.parametrize("number", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_positions_one_row_for_all_or_one_a_sequence(number, device):
    rotary, frequencies = Rotary(8), of_theta(10000.0, 8, device)
    one = torch.tensor([3, 0, 77, 4, 4, 250, 9], device=device, dtype=number)
    check(rotary, frequencies, one, where=one)
    check(rotary, frequencies, one[None], where=one)
    each = torch.stack((one, one.flip(0)))
    check(rotary, frequencies, each, where=each)
    check(rotary, frequencies, 41, where=41 + torch.arange(7, device=device))
    check(rotary, frequencies, -3, where=torch.arange(-3, 4, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["theta", "own"])
def test_right_at_a_million(own, dtype, device):
    """Where fp32's angles are off by as much as 1/32, also in a module that `to(dtype)` has gone over."""
    frequencies = of_theta(10000.0, 64, device)
    frequencies = frequencies.float() if own else frequencies
    rotary = Rotary(64, frequencies=frequencies if own else None).to(dtype)
    check(rotary, frequencies, FAR, dtype, where=FAR + torch.arange(7, device=device))


def test_scores_depend_on_the_distance_alone(device):
    q, k = torch.randn(2, 1, 1, 5, 16, device=device, dtype=torch.float64)
    rotary = Rotary(16)
    near, far = (torch.matmul(a, b.mT) for a, b in (rotary(q, k), rotary(q, k, FAR)))
    torch.testing.assert_close(near, far, rtol=0, atol=1e-8)
    assert not torch.allclose(near, q @ k.mT, atol=0.1)


@pytest.mark.parametrize("style", STYLES)
def test_gradients(style, device):
    """Against float64 autograd through the complex numbers."""
    q, k, do = (torch.randn(2, 2, 5, 10, device=device, requires_grad=True) for _ in range(3))
    frequencies = of_theta(10000.0, 6, device)
    turned, _ = Rotary(10, style=style, rotary_dim=6)(q, k, 11)

    def gradient(out, x):
        return torch.autograd.grad(out, x, do.detach().to(out.dtype))[0]

    def theirs(dtype):
        x = q.detach().to(dtype).requires_grad_()
        where = 11 + torch.arange(5, device=device)
        return gradient(by_complex_numbers(x, where, style, 6, frequencies, dtype), x)

    want = theirs(torch.float64)
    _assert_close("dq", gradient(turned, q), want, largest_difference(theirs(torch.float32), want))


def test_float64_stays_float64(device):
    q, k = torch.randn(2, 1, 2, 3, 6, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: Rotary(6)(q, k, FAR), (q, k))


# ---- Being a PyTorch module


def own():
    return torch.tensor([1.0, 1 / 3, 0.1, 0.0123])


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_frequencies_are_not_rounded_by_a_modules_dtype(move):
    module = move(SelfAttention(16, heads=2, rotary=Rotary(8, frequencies=own())))
    assert torch.equal(module.core.rotary.frequencies, own())
    assert module.to("cpu", torch.float16).core.rotary.frequencies.dtype == torch.float32


def test_only_frequencies_that_were_given_are_saved():
    plain = SelfAttention(16, heads=2, rotary=Rotary(8))
    assert plain.state_dict().keys() == SelfAttention(16, heads=2).state_dict().keys()
    module = SelfAttention(16, heads=2, rotary=Rotary(8, frequencies=own()))
    other = SelfAttention(16, heads=2, rotary=Rotary(8, frequencies=torch.zeros(4)))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.core.rotary.frequencies, own())


def test_the_tensor_given_is_copied():
    frequencies = own()
    rotary = Rotary(8, frequencies=frequencies)
    frequencies.zero_()
    assert torch.equal(rotary.frequencies, own())


@pytest.mark.parametrize("frequencies", [None, own()], ids=["theta", "own"])
@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
def test_built_on_the_meta_device(frequencies, assign):
    """A module that is given its weights later has the right angles then, by either way of giving them."""

    def build():
        return SelfAttention(16, heads=2, rotary=Rotary(8, frequencies=frequencies), impl="torch")

    module, x = build(), torch.randn(2, 5, 16)
    with torch.device("meta"):
        late = build().to("meta")
    assert late(x.to("meta")).device.type == "meta"
    if not assign:
        late.to_empty(device="cpu")
    late.load_state_dict(module.state_dict(), assign=assign)
    assert torch.equal(late(x), module(x))


def test_copies(device):
    module = SelfAttention(16, heads=2, rotary=Rotary(8, frequencies=own()), impl="torch").to(device)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    x = torch.randn(2, 5, 16, device=device)
    for other in (copy.deepcopy(module), torch.load(saved, weights_only=False)):
        assert torch.equal(other(x), module(x))


def test_memory_order_is_that_of_the_projection():
    """Heads within rows, so that the result of attention is joined without a copy."""
    q, k = torch.randn(2, 2, 5, 3, 8).transpose(2, 3)
    for turned in (*Rotary(8)(q, k), *Rotary(8, rotary_dim=4)(q, k)):
        assert turned.transpose(1, 2).is_contiguous()


def test_empty_inputs():
    rotary = Rotary(8)
    for shape in ((0, 2, 5, 8), (1, 2, 0, 8)):
        assert all(x.shape == shape for x in rotary(torch.ones(shape), torch.ones(shape)))


def test_repr_shows_what_was_chosen():
    assert repr(Rotary(64)) == "Rotary(64, theta=10000, style='half')"
    assert "rotary_dim=16" in repr(Rotary(64, rotary_dim=16, style="interleaved"))
    assert "frequencies=given" in repr(Rotary(8, frequencies=own()))


# ---- Mistakes


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Rotary(0), "head_dim=0 must be an int of at least 1"),
        (lambda: Rotary(7), "rotary_dim=7 must be an even int from 2 to head_dim=7"),
        (lambda: Rotary(8, rotary_dim=10), "rotary_dim=10 must be an even int from 2 to head_dim=8"),
        (lambda: Rotary(8, rotary_dim=0), "rotary_dim=0 must be"),
        (lambda: Rotary(8, rotary_dim=0.5), "rotary_dim=0.5 must be"),
        (lambda: Rotary(8, style="neox"), "style='neox' must be 'half' or 'interleaved'"),
        (lambda: Rotary(8, theta=0), "theta=0 must be a positive number"),
        (lambda: Rotary(8, theta=math.nan), "theta=nan must be a positive number"),
        (lambda: Rotary(8, theta="1e4"), "theta='1e4' must be"),
        (lambda: Rotary(8, frequencies=[1.0] * 4), "frequencies are list, and must be a tensor of"),
        (lambda: Rotary(8, frequencies=own().half()), "frequencies are torch.float16, and must be"),
        (lambda: Rotary(8, frequencies=own()[:3]), r"frequencies.shape=\(3,\) must be .* = \[4\]"),
        (lambda: Rotary(8, frequencies=own(), theta=5.0), "theta=5.0 has no effect beside frequencies="),
        (lambda: Rotary(8, frequencies=own().requires_grad_()), "requires_grad=True must be False"),
        (lambda: SelfAttention(16, heads=2, rotary=Rotary(16)), "rotary.head_dim=16 must be .* head_dim=8"),
        (lambda: AttentionCore(2, 8, rotary="half"), "rotary='half' must be None or a tilewise.nn.Rotary"),
    ],
)
def test_what_cannot_be_built_says_why(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_cross_attention_has_none():
    with pytest.raises(TypeError, match="rotary"):
        CrossAttention(16, heads=2, rotary=Rotary(8))


@pytest.mark.parametrize(
    "positions, words",
    [
        (torch.zeros(5), "positions.dtype=torch.float32 must be an integer type"),
        (torch.zeros(5, dtype=torch.bool), "positions.dtype=torch.bool must be an integer type"),
        (torch.zeros(4, dtype=torch.int64), r"positions.shape=\(4,\) must be \[length\] = \[5\] or"),
        (torch.zeros(3, 5, dtype=torch.int64), r"\[batch, length\] = \[2, 5\]"),
        (
            torch.zeros(5, dtype=torch.int64, device="meta"),
            "positions.device=meta must be that of the queries",
        ),
        (1.5, "positions=1.5 must be None, an int or a tensor of ints"),
        (True, "positions=True must be"),
        ([0, 1, 2, 3, 4], r"positions=\[0, 1, 2, 3, 4\] must be"),
    ],
)
def test_positions_that_do_not_fit_say_why(positions, words):
    module = SelfAttention(16, heads=2, rotary=Rotary(8))
    with pytest.raises(ValueError, match=words):
        module(torch.zeros(2, 5, 16), positions=positions)


def test_inputs_that_do_not_fit_say_why():
    x, rotary = torch.zeros(1, 2, 5, 8), Rotary(8)
    with pytest.raises(ValueError, match=r"k.shape=\(1, 2, 5, 6\) must be \[batch, heads, length, 8\]"):
        rotary(x, x[..., :6])
    with pytest.raises(ValueError, match=r"k.shape=\(1, 2, 4, 8\) must have one length"):
        rotary(x, x[:, :, :4])
    with pytest.raises(ValueError, match=r"rotary.frequencies.device=cpu must be that of the queries, meta"):
        Rotary(8, frequencies=own())(x.to("meta"), x.to("meta"))
    with pytest.raises(ValueError, match="positions= has no effect without rotary="):
        SelfAttention(16, heads=2)(torch.zeros(5, 16), positions=3)
