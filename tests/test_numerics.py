"""Number formats: rounding, widening, matmuls and tanh on the device against PyTorch's own."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from tilewise.parts.numerics import INTERPRETED, float32_precision, matmul, round_to, widen
from tilewise.parts.scores.softcap import tanh

BLOCK = 4096
U = 2.0**-24  # half a unit in the last place of fp32
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@triton.jit
def round_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, round_to(x, y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def widen_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, widen(tl.load(x_ptr + i, mask=i < n, other=0.0)), mask=i < n)


@triton.jit
def tanh_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tanh(tl.load(x_ptr + i, mask=i < n, other=0.0)), mask=i < n)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, K: tl.constexpr, PRECISION: tl.constexpr):
    """C [16, 16] += A [16, K] B [K, 16]."""
    rows, inner = tl.arange(0, 16), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * 16 + rows[None, :])
    c_ptrs = c_ptr + rows[:, None] * 16 + rows[None, :]
    tl.store(c_ptrs, matmul(a, b, tl.load(c_ptrs), PRECISION))


def apply(kernel, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty_like(x, dtype=dtype)
    kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK)
    return y


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bit for bit, but that any NaN is as good as another."""
    integer = {2: torch.int16, 4: torch.int32}[want.element_size()]
    assert got.isnan().equal(want.isnan())
    number = ~want.isnan()
    assert torch.equal(got.view(integer)[number], want.view(integer)[number])


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    """Unsigned 32-bit patterns, held in int64, as fp32."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def every_sixteen_bits(device: torch.device) -> torch.Tensor:
    return torch.arange(1 << 16, device=device)


@pytest.mark.oldest
def test_bfloat16_rounds_to_nearest_even(device):
    """Every sign, exponent (denormals, infinities, NaN) and leading mantissa, with the lower half exactly on,
    just below and just above each value and each tie."""
    lower = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], device=device)
    x = from_bits((every_sixteen_bits(device)[:, None] << 16 | lower).flatten())
    assert_same_bits(apply(round_kernel, x, torch.bfloat16), x.to(torch.bfloat16))


def test_float16_rounds_to_nearest_even(device):
    """Every fp16, the ties between neighbours, and both sides of each tie; beyond the largest and below the
    smallest fp16 too."""
    halves = every_sixteen_bits(device).to(torch.int32).to(torch.int16).view(torch.float16).float()
    finite = halves[halves.isfinite()].sort().values
    ties = (finite[:-1] + finite[1:]) / 2
    around = [torch.nextafter(ties, torch.full_like(ties, side * torch.inf)) for side in (-1, 1)]
    outside = torch.tensor([65519.9, 65520.0, 1e30, 2.0**-25, 2.0**-26, torch.inf, torch.nan], device=device)
    x = torch.cat([halves, ties, *around, outside, -outside])
    assert_same_bits(apply(round_kernel, x, torch.float16), x.to(torch.float16))


def test_float32_rounds_to_itself(device):
    x = from_bits(every_sixteen_bits(device) << 16 | 0x1234)
    assert_same_bits(apply(round_kernel, x, torch.float32), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_widening_is_exact(dtype, device):
    x = every_sixteen_bits(device).to(torch.int32).to(torch.int16).view(dtype)
    assert_same_bits(apply(widen_kernel, x, torch.float32), x.float())


def product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, precision: str) -> torch.Tensor:
    c = c.clone()
    matmul_kernel[(1,)](a, b, c, K=a.shape[1], PRECISION=precision)
    return c


@pytest.mark.oldest
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_accumulates_exactly_what_it_can(dtype, precision, device):
    """Products and sums of small whole numbers have no rounding in any format, bfloat16 and tf32 included."""
    a = torch.randint(-9, 10, (16, 64), device=device)
    b = torch.randint(-9, 10, (64, 16), device=device)
    c = torch.randint(-99, 100, (16, 16), device=device)
    want = (a.double() @ b.double() + c).float()
    assert torch.equal(product(a.to(dtype), b.to(dtype), c.float(), precision), want)


@pytest.mark.any_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_accumulates_in_float32(dtype, device):
    """Inputs are taken as they are, so only the sum rounds: 64 additions in fp32, in any order."""
    a, b = torch.randn(16, 64, device=device).to(dtype), torch.randn(64, 16, device=device).to(dtype)
    c = torch.randn(16, 16, device=device)
    want = a.double() @ b.double() + c
    size = a.double().abs() @ b.double().abs() + c.abs()
    # Tensor cores cut where others round, which doubles the error of each addition.
    got = product(a, b, c, "ieee")
    assert ((got - want).abs() <= 2 * 65 * U * size).all()
    if INTERPRETED:  # the sum of products is rounded once, and what it is added to once more
        assert torch.equal(got, (a.double() @ b.double()).float() + c)


@pytest.mark.any_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 64, 256])
def test_a_sum_does_not_depend_on_its_place(dtype, size, device):
    """As the backward needs it: S = Q Kᵀ and its transpose K Qᵀ have the same bits; so have equal rows."""
    q, k = (100 * torch.randn(16, size, device=device).to(dtype) for _ in range(2))
    none = torch.zeros(16, 16, device=device)
    s = product(q, k.mT.contiguous(), none, "ieee")
    assert torch.equal(product(k, q.mT.contiguous(), none, "ieee").mT, s)
    equal = product(q[:1].expand_as(q).contiguous(), k.mT.contiguous(), none, "ieee")
    assert torch.equal(equal, s[:1].expand_as(s))


def tanh_bound(x: torch.Tensor) -> torch.Tensor:
    """The relative error of tanh as softcap.py computes it: x in fp64."""
    y = x.abs().clamp_max(50.0)
    # Near 0: a product and a sum for each of 4 terms, of which the later ones are small; the first term left
    # out is 1382/155925 y¹⁰ of the whole.
    near = 4 * U + 1382 / 155925 * y**10
    # Far: e = exp(-2y) with its argument rounded twice and exp2 right to 2 units in the last place (PTX ISA);
    # e's error goes through (1 - e) / (1 + e); then three operations, of which the division has 2 units.
    e = torch.exp(-2 * y)
    far = e * (2 * 2 * y * U + 4 * U) * (1 / (1 - e) + 1 / (1 + e)) + (1 + 1 + 4) * U
    return torch.where(y < 0.25, near, far)


def test_tanh(device):
    wide = torch.logspace(-37, 37, 4001, dtype=torch.float64, device=device)
    join = torch.linspace(0.24, 0.26, 4001, dtype=torch.float64, device=device)
    usual = torch.linspace(0, 12, 4001, dtype=torch.float64, device=device)
    positive = torch.cat([wide, join, usual, wide.new_tensor([0.0, 0.25, 3e38, torch.inf])])
    x = torch.cat([positive, -positive]).float()
    y, want = apply(tanh_kernel, x, torch.float32), torch.tanh(x.double())
    excess = (y - want).abs() - tanh_bound(x.double()) * want.abs()
    worst = excess.argmax()
    assert excess[worst] <= 0, f"tanh({x[worst].item()}) = {y[worst].item()}, expected {want[worst].item()}"
    assert tanh_bound(x.double()).max() <= 16 * U  # the bound itself allows no more than 8 units
    assert (y.abs() <= 1).all()
    assert apply(tanh_kernel, x.new_tensor([torch.nan]), torch.float32).isnan().all()


@pytest.fixture
def restore_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


class Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __getitem__(self, grid):
        def launch(**arguments):
            self.grid, self.arguments = grid, arguments

        return launch


@pytest.mark.parametrize(
    "asked, precision", [(None, "ieee"), ("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")]
)
def test_float32_matmuls_follow_pytorchs_precision(asked, precision, device, monkeypatch, restore_precision):
    """None asks for nothing: PyTorch's default is IEEE, so that is what the kernel must be given."""
    if asked is not None:
        torch.set_float32_matmul_precision(asked)
    recorder = Recorder()
    monkeypatch.setattr("tilewise.kernels.forward.forward_kernel", recorder)
    for dtype in DTYPES:
        q, k, v = (torch.randn(1, 1, 4, 8, device=device, dtype=dtype) for _ in range(3))
        tilewise.attention(q, k, v, impl="portable")
        assert recorder.arguments["PRECISION"] == precision == float32_precision()


@pytest.mark.parametrize(
    "name, dtype", list(itertools.product(["scale", "sink", "bias"], DTYPES[:2])), ids=str
)
def test_half_precision_parameters_are_widened_before_use(name, dtype, device):
    """A parameter in half precision means its value, not the bit pattern that the interpreter holds."""
    q, k, v = (torch.randn(1, 2, 5, 8, device=device) for _ in range(3))
    parameter = {"scale": torch.tensor(0.3), "sink": torch.randn(2), "bias": torch.randn(2, 5, 5)}[name]
    parameter = parameter.to(device=device, dtype=dtype)
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        got = tilewise.attention(q, k, v, impl="portable", **{name: parameter})
        want = tilewise.attention(q, k, v, impl="portable", **{name: parameter.float()})
    assert torch.equal(got, want)
