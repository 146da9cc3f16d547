"""fp8: the same rounding bit for bit everywhere, what `quantize` makes, and what is refused.

That the forward is right with every other feature, test_properties.py and its like draw: the features
fp8_of_heads and fp8_of_rows, against plain fp8 attention.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch.autograd import forward_ad

import tilewise
from harness.oracle import check
from tilewise import Causal, Scales, Stats
from tilewise.parts.numerics import round_to, widen
from tilewise.plan import tiles
from tilewise.plan.request import request_of
from tilewise.plan.rules import fp8 as rules
from tilewise_reference.fp8 import e4m3, rotation
from tilewise_reference.fp8 import quantize as definition

FP8 = torch.float8_e4m3fn
ATOM = 1024


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


# ---- Rounding


@triton.jit
def convert_kernel(x_ptr, y_ptr, TO_FP8: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if TO_FP8:
        tl.store(y_ptr + i, round_to(x, tl.float8e4nv))
    else:
        tl.store(y_ptr + i, widen(x))


def test_every_number_is_widened_as_pytorch_does(device):
    x = torch.arange(256, device=device, dtype=torch.int32).to(torch.uint8).view(FP8)
    y = torch.empty(256, device=device)
    convert_kernel[(1,)](x, y, False, 256)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(
        y.signbit()[:255], x.float().signbit()[:255]
    )  # the last is NaN, whose sign says nothing


def test_rounding_is_that_of_the_reference_bit_for_bit(device):
    """Every number, every point between two, its neighbours in fp32, and bit patterns of all kinds; NaN has
    two patterns, of which any will do."""
    known = torch.arange(127, dtype=torch.int32).to(torch.uint8).view(FP8).float()
    between = (known[1:] + known[:-1]) / 2
    up, down = (torch.nextafter(between, torch.tensor(end)) for end in (math.inf, -math.inf))
    odd = torch.tensor([448.0, 456, 464, 464.1, 480, 1e30, math.inf, math.nan, 2**-10, 2**-10 * 1.01, 1e-40])
    generator = torch.Generator().manual_seed(0)
    drawn = (
        torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator).to(torch.int32).view(torch.float32)
    )
    near = torch.randn(1 << 16, generator=generator) * torch.logspace(-4, 3, 1 << 16)
    x = torch.cat([known, between, up, down, odd, -known, -between, -up, -down, -odd, drawn, near])
    x = torch.nn.functional.pad(x, (0, -len(x) % ATOM)).to(device)
    y = torch.empty(len(x), dtype=FP8, device=device)
    convert_kernel[(len(x) // ATOM,)](x, y, True, ATOM)
    want, nan = e4m3(x), x.isnan()
    assert torch.equal(bits(y)[~nan], bits(want)[~nan])
    assert torch.equal(bits(y)[nan] & 0x7F, torch.full_like(bits(y)[nan], 0x7F))
    exact = x[~nan].double().clamp(-448, 448)
    assert (y[~nan].double() - exact).abs().le(exact.abs() * 2**-4 + 2**-10).all()


def test_nan_that_a_row_sees_stays(device):
    q, k, v = (torch.randn(1, 1, 17, 32, device=device).to(FP8) for _ in range(3))
    k[0, 0, 3, 0] = torch.nan
    scales = Scales(*torch.ones(3, 1, device=device))
    out = tilewise.attention(q, k, v, scales=scales, mask=Causal(), impl="portable")
    assert out[:, :, 3:].isnan().all() and not out[:, :, :3].isnan().any()


# ---- What `quantize` makes


@pytest.mark.oldest
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("per", ["tensor", "head", 20])
@pytest.mark.parametrize("dim, dtype", [(16, torch.float16), (40, torch.bfloat16), (80, torch.float32)])
def test_quantize_is_the_reference_bit_for_bit(device, dim, dtype, per, rotate):
    q, k, v = (torch.randn(2, heads, 45, dim, device=device).to(dtype) for heads in (4, 2, 2))
    k[..., 1] *= 30
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    found = tilewise.quantize(q, k, v, per=per, rotate=rotate, impl="portable")
    for name, x, is_rotated in (("q", q, rotate), ("k", k, rotate), ("v", v, False)):
        want, scale = definition(x, per, is_rotated), getattr(found.scales, name)
        if is_rotated and x.is_cuda:  # whose sums are in an order of their own
            torch.testing.assert_close(scale, want.scale)
            continue
        assert torch.equal(scale, want.scale)
        assert torch.equal(bits(getattr(found, name)), bits(want.x8)), name
    assert (found.scales.rows, found.scales.dtype) == (per if isinstance(per, int) else None, dtype)
    assert found.q.stride() == q.stride() and found.v.stride(2) == 1 and found.v.stride(3) % 16 == 0


def test_both_ways_to_quantize_are_one(device):
    tensors = [torch.randn(1, 2, 300, 64, device=device) for _ in range(3)]
    for per in ("tensor", "head", 128):
        one, other = (tilewise.quantize(*tensors, per=per, impl=impl) for impl in ("portable", "torch"))
        for a, b in zip((*one[:3], *one.scales[:3]), (*other[:3], *other.scales[:3]), strict=True):
            assert torch.equal(a.float(), b.float()) and a.stride() == b.stride()


def test_scales_of_what_has_no_finite_largest_number(device):
    """Zeros, nothing, infinity, NaN, and numbers that fp32 hardly holds."""
    x = torch.zeros(1, 5, 16, 16, device=device)
    x[0, 1, 3, 3], x[0, 1, 4, 4], x[0, 1, 5, 5] = math.inf, math.nan, -7.0
    x[0, 2, 0, 0], x[0, 3, 0, 0] = 1e-40, 3e38
    for impl in ("portable", "torch"):
        q8, _, _, scales = tilewise.quantize(x, x, x, impl=impl)
        assert scales.q[0, 0] == 1 and scales.q[0, 4] == 1 and scales.q[0, 1] == torch.tensor(7 / 448)
        assert scales.q[0, 2] == torch.finfo(torch.float32).tiny
        assert q8[0, 1, 3, 3].float() == 448 and q8[0, 1, 4, 4].isnan() and q8[0, 1, 5, 5].float() == -448
        assert q8[0, 3, 0, 0].float() == 448 and not q8[0, 0].float().any()
        nothing = tilewise.quantize(x[:, :, :0], x, x, per=16, impl=impl)
        assert nothing.q.shape == (1, 5, 0, 16) and nothing.scales.q.shape == (1, 5, 0)


@pytest.mark.parametrize("dim", [1, 2, 48, 64, 80, 128, 192, 256, 576])
def test_the_rotation_is_orthogonal_and_spreads(dim):
    r = rotation(dim)
    torch.testing.assert_close(r @ r.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-12)
    side = min(128, dim & -dim)
    alone, alike = torch.eye(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)
    assert (alone @ r).abs().max() <= side**-0.5 + 1e-12
    assert (alike @ r).abs().max() <= math.sqrt(2) + 1e-12  # Hadamard's matrix alone: √side


def test_a_rotation_leaves_products_and_helps_against_outliers(device):
    """One number in a hundred is ten times as large: the rounding of those that meet decides a score."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        x, y, z = (torch.randn(1, 2, 40, 64, generator=generator) for _ in range(3))
        return (x + 10 * y * (z > 2.3)).to(device)

    q, k, v = drawn(), drawn(), drawn()
    _, exact = tilewise.attention(q.double(), k.double(), v.double(), return_lse=True)
    errors = []
    for rotate in (False, True):
        q8, k8, v8, scales = tilewise.quantize(q, k, v, rotate=rotate)
        _, lse = check(q8, k8, v8, scales=scales)
        errors.append((lse - exact).square().mean().sqrt().item())
    assert errors[1] < errors[0] < 0.2


def test_packed_tensors_are_quantized_as_they_are(device):
    q, k, v = (torch.randn(33, heads, 32, device=device).bfloat16() for heads in (4, 2, 2))
    offsets = torch.tensor([0, 9, 33], device=device)
    for per in ("head", 8):
        q8, k8, v8, scales = tilewise.quantize(q, k, v, per=per)
        assert q8.shape == q.shape and v8.stride(0) == 1
        check(q8, k8, v8, scales=scales, q_offsets=offsets)


# ---- With what else there is


def test_statistics_are_those_of_the_numbers(device):
    q, k, v = (torch.randn(2, heads, 40, 32, device=device).half() for heads in (4, 2, 2))
    rows = torch.tensor([1, 39], device=device)
    stats = Stats(max_logit=True, entropy=True, key_mass=True, rows=rows, top_k=3)
    for per in ("head", 16):
        q8, k8, v8, scales = tilewise.quantize(q, k, v, per=per)
        given = dict(mask=Causal(), return_stats=stats)
        _, found = tilewise.attention(q8, k8, v8, scales=scales, impl="portable", **given)
        numbers = [x.double() * tiled(s.double(), per, x) for x, s in zip((q8, k8, v8), scales, strict=False)]
        _, want = tilewise.attention(*numbers, impl="torch", **given)
        for name, got, exact in zip(want._fields, found, want, strict=True):
            torch.testing.assert_close(got.double(), exact.double(), rtol=1e-5, atol=1e-5, msg=name)


def tiled(scale: torch.Tensor, per: str | int, x: torch.Tensor) -> torch.Tensor:
    if per == "head":
        return scale[:, :, None, None]
    return scale.repeat_interleave(per, 2)[:, :, : x.shape[2], None]


def test_a_cache_is_split_and_its_empty_tiles_have_no_say(device):
    """Scales of tiles that hold no row may be anything."""
    q, k, v = (torch.randn(2, heads, n, 32, device=device) for heads, n in ((4, 1), (2, 128), (2, 128)))
    q8, k8, v8, scales = tilewise.quantize(q, k, v, per=16)
    for x in (scales.k, scales.v):
        x[0, :, 3:], x[1, :, 7:] = torch.nan, 1e30
    lens = torch.tensor([45, 110], device=device)
    check(q8, k8, v8, scales=scales, kv_lens=lens, split_size=32)


def test_the_shares_of_small_scales_are_kept(device):
    """The values of some keys are a thousand times larger than those of others, and so are their scales."""
    q, k, v = (torch.randn(1, 1, 64, 32, device=device) for _ in range(3))
    v[:, :, 32:] *= 1000
    q8, k8, v8, scales = tilewise.quantize(q, k, v, per=32)
    check(q8, k8, v8, scales=scales)
    check(q8, k8, v8, scales=scales, mask=Causal())


def test_the_small_weights_of_a_long_row_are_kept(device):
    """One key has most of the weight, hundreds have less than 2⁻⁹ of it each, and together as much."""
    q = torch.ones(1, 1, 16, 32, device=device)
    k, v = torch.zeros(1, 1, 513, 32, device=device), torch.ones(1, 1, 513, 32, device=device)
    k[:, :, 0], v[:, :, 0] = 1.0, -1.0
    q8, k8, v8, scales = tilewise.quantize(q, k, v)
    out = tilewise.attention(q8, k8, v8, scales=scales, scale=math.log(768) / 32, impl="portable")
    exact = (512 / 768 - 1) / (512 / 768 + 1)
    assert (out - exact).abs().max() < 0.04


def test_plain_pytorch_has_the_same_numbers(device):
    """Nothing but P is rounded differently, and lse is the same: dense, packed and of a cache."""
    q, k, v = (torch.randn(2, heads, 45, 32, device=device) for heads in (4, 2, 2))
    q *= torch.linspace(0.1, 2, 45, device=device)[:, None]
    k *= torch.linspace(2, 0.1, 45, device=device)[:, None]
    offsets, lens = torch.tensor([0, 20, 45], device=device), torch.tensor([45, 33], device=device)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    for per in ("head", 16):
        q8, k8, v8, scales = tilewise.quantize(q, k, v, per=per)
        packed = tilewise.quantize(*rows, per=per)
        own = packed.scales
        if per == "head":
            own = own._replace(q=own.q * torch.tensor([[1.0], [3.0]], device=device))
        for call, given in (
            (tilewise.attention, dict(q=q8, k=k8, v=v8, scales=scales)),
            (tilewise.packed_attention, packed._asdict() | dict(scales=own, q_offsets=offsets)),
            (tilewise.cached_attention, dict(q=q8, cache_k=k8, cache_v=v8, kv_lens=lens, scales=scales)),
        ):
            one, other = (call(**given, impl=impl, return_lse=True) for impl in ("portable", "torch"))
            torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(one[0], other[0], rtol=0.1, atol=0.1)


def test_weights_that_dropout_enlarges_do_not_overflow(device):
    q, k, v = (torch.randn(1, 2, 40, 32, device=device) for _ in range(3))
    q8, k8, v8, scales = tilewise.quantize(3 * q, k, v)
    for p in (0.5, 0.9, 1.0):
        check(q8, k8, v8, scales=scales, dropout_p=p, dropout_seed=torch.tensor([3], device=device))


def test_a_compiled_function_quantizes_and_attends(device):
    tensors = [torch.randn(1, 2, 24, 32, device=device) for _ in range(3)]

    def attend(q, k, v):
        q8, k8, v8, scales = tilewise.quantize(q, k, v, per=16, rotate=True)
        return tilewise.attention(q8, k8, v8, scales=scales, mask=Causal())

    torch._dynamo.reset()
    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors), attend(*tensors))


def test_autocast_leaves_fp8_alone(device):
    x = torch.randn(1, 1, 20, 32, device=device)
    q8, k8, v8, scales = tilewise.quantize(x, x, x)
    with torch.autocast(device.type, torch.bfloat16):
        out = tilewise.attention(q8, k8, v8, scales=scales)
    assert torch.equal(out, tilewise.attention(q8, k8, v8, scales=scales)) and out.dtype == torch.float32


# ---- What is refused


def test_function_transforms_are_refused(device):
    x = torch.randn(1, 2, 20, 32, device=device)
    q8, k8, v8, scales = tilewise.quantize(x, x, x)

    def loss(bias):
        return tilewise.attention(q8, k8, v8, scales=scales, bias=bias).sum()

    zeros = torch.zeros(20, device=device)
    with pytest.raises(ValueError, match=r"torch\.func .* forward alone"):
        torch.func.jvp(loss, (zeros,), (zeros,))
    with forward_ad.dual_level(), pytest.raises(ValueError, match=r"torch\.func and forward mode"):
        loss(zeros)
    with pytest.raises(ValueError, match=r"quantize under torch\.func"):
        torch.func.vmap(lambda x: tilewise.quantize(x, x, x).q)(x[None])
    with pytest.raises(ValueError, match="bias requires a gradient, and fp8 has a forward alone"):
        loss(zeros.clone().requires_grad_())
    assert loss(zeros).isfinite()


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "gfx942", "gfx950"])
def test_chips_without_such_tensor_cores_are_refused(arch, monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: arch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Chip")
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(1, 2, 20, 32, dtype=FP8, device="cuda")
        scales = Scales(*(torch.empty(1, device="cuda") for _ in range(3)))
        request = request_of(x, x, x, scales=scales)
    why = rules.chip_multiplies_fp8(request)
    assert why is not None and "sm_90 or newer" in why and f"Chip ({arch})" in why and "impl='torch'" in why
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_120")
    assert rules.chip_multiplies_fp8(request) is None


def test_hoppers_kernel_is_refused(device):
    x = torch.randn(1, 2, 20, 32, device=device)
    q8, k8, v8, scales = tilewise.quantize(x, x, x)
    with pytest.raises(ValueError, match=r"impl='hopper': .*float8_e4m3fn must be torch.float16"):
        tilewise.attention(q8, k8, v8, scales=scales, impl="hopper")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(per=0), "per=0 must be"),
        (dict(per="row"), "per='row' must be 'tensor', 'head' or a number"),
        (dict(rotate=1), "rotate=1 must be True or False"),
        (dict(impl="hopper"), "impl='hopper' must be None, 'portable' or 'torch'"),
        (dict(q=None), "q is a NoneType"),
        (dict(k=torch.zeros(2, 20, 32)), r"k\.shape=\(2, 20, 32\) must be"),
        (dict(v=torch.zeros(1, 2, 20, 32, dtype=torch.float64)), r"v\.dtype=torch\.float64 must be"),
        (dict(v=torch.zeros(1, 2, 20, 600)), r"v\.shape\[-1\]=600 must be from 1 to 576"),
        (dict(k=torch.zeros(1, 2, 20, 16), rotate=True), "head_dim of q: 32, k: 16"),
        (dict(q=torch.zeros(1, 2, 20, 32, requires_grad=True)), "q requires a gradient.*no_grad"),
    ],
)
def test_quantize_says_what_is_wrong(changes, words):
    x = torch.zeros(1, 2, 20, 32)
    with pytest.raises(ValueError, match=words):
        tilewise.quantize(**(dict(q=x, k=x, v=x) | changes))
