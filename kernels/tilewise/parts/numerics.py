"""How numbers are widened, rounded and multiplied: the one place that knows about number formats.

On a GPU each function below is a single conversion or matmul. Triton's interpreter holds a bfloat16 as its
raw 16 bits, truncates where hardware rounds to nearest even, and multiplies the bit patterns in `tl.dot`; of
a float8_e4m3fn it reads NaN as 480, and wraps around above 448, where hardware stays. So there the same steps
are spelled out on integers, and the numerics that tests see are those of the GPU.

A GPU sums every element of a product in one order, that of its instruction. A CPU's BLAS does not: it sums
equal rows in different orders by their place, Q Kᵀ in another than K Qᵀ, and each CPU in its own way. Beside
scores of 10⁴ the backward's P would then not be the forward's. So the interpreter sums in float64, in which
the products are exact, and rounds the sum to fp32: orders differ 2²⁹ times less than that rounding. Adding to
what was accumulated is a rounding of its own, in fp32.
"""

import torch
import triton
import triton.language as tl

# Read once, when the package is imported, as Triton does when it decides how to run `@triton.jit`.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x · LOG2E)
LN2 = tl.constexpr(0.6931471805599453)  # log(x) = log2(x) · LN2


AT_ONCE = 128  # products of fp8 numbers that a tensor core may sum by itself


@triton.constexpr_function
def at_once(products):
    return min(products, AT_ONCE)


@triton.jit
def widen_e4m3(x):
    """Sign, four bits of exponent, biased by 7, and three of the fraction; the largest pattern is NaN."""
    bits = x.to(tl.uint8, bitcast=True).to(tl.int32)
    size = bits & 0x7F
    normal = ((size + (120 << 3)) << 20).to(tl.float32, bitcast=True)  # fp32's exponent is biased by 127
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)  # below 2⁻⁶ in steps of 2⁻⁹
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(bits >= 0x80, -value, value)


@triton.jit
def round_e4m3(x):
    """The inverse: to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    known = size.to(tl.int32, bitcast=True)
    normal = ((known + 0x7FFFF + ((known >> 20) & 1)) >> 20) - (120 << 3)  # half a unit in the last place
    step = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # above 2¹⁴ fp32 counts in steps of 2⁻⁹
    found = tl.where(size < 0.015625, step, normal)
    found = tl.where(x == x, found, 0x7F)
    return (found | tl.where(bits < 0, 0x80, 0)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def widen(x):
    """x in fp32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # A bfloat16 is the upper half of an fp32.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif INTERPRETED and x.dtype == tl.float8e4nv:
        return widen_e4m3(x)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """The fp32 value x in `dtype`, rounded to nearest even; what is too large for e4m3 is its largest number,
    448, also infinity: it has none."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)  # half a unit in the last place, ties to even
        nearest = tl.where(x == x, nearest, 0x7FC00000)  # the carry must not turn a NaN into a number
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif INTERPRETED and dtype == tl.float8e4nv:
        return round_e4m3(x)
    else:
        return x.to(dtype)


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b in fp32. PRECISION matters to fp32 operands alone: "ieee" or "tf32". Of sums of fp8
    products Hopper's tensor cores keep about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2): no more
    than AT_ONCE products are left to them, and acc is added to in fp32."""
    if INTERPRETED:
        a, b = widen(a).to(tl.float64), widen(b).to(tl.float64)
        return acc + tl.dot(a, b, out_dtype=tl.float64).to(tl.float32)
    elif a.dtype == tl.float8e4nv:
        return tl.dot(a, b, acc, max_num_imprecise_acc=at_once(a.shape[1]))
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


def float32_precision() -> str:
    """`tl.dot`'s name for what `torch.set_float32_matmul_precision` asks for ("highest" is IEEE)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
