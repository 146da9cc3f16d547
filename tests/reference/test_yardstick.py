"""PyTorch's own computation, by which every tolerance is measured: right in fp32, rounded where it says."""

import math

import pytest
import torch
import torch.nn.functional as F

from tilewise_reference import attention, masks, scores, statistics
from tilewise_reference.yardstick import (
    allowed_error,
    difference,
    largest_difference,
    math_statistics,
    pytorch_attention,
)


def tensors(dtype: torch.dtype, q_len: int = 5, kv_len: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, q_len, 8), (2, 2, kv_len, 8), (2, 2, kv_len, 6)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


OPTIONS = {
    "plain": {},
    "causal, softcap, sink": dict(
        mask=masks.causal(5, 7), score=scores.softcap(2.0), sink=torch.tensor([0.5, -1.0, 2.0, 0.0])
    ),
    "cosine": dict(similarity="cosine", temperature=torch.tensor([1.0, 5.0, 10.0, 0.5])),
    "dot, dropout": dict(
        similarity="dot",
        scale=0.3,
        dropout_p=0.5,
        dropout_keep=torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.5,
    ),
    "rows without keys": dict(mask=masks.causal(5, 7, "top_left"), sink=None),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_in_fp32_it_is_the_reference_and_so_are_its_gradients(options):
    q, k, v = tensors(torch.float32)
    got, want = pytorch_attention(q, k, v, **options), attention(q, k, v, **options, return_lse=True)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)
    do, dlse = torch.randn_like(got[0]), torch.randn_like(got[1])
    mine = torch.autograd.grad(got, (q, k, v), (do, dlse))
    exact = torch.autograd.grad(want, (q, k, v), (do.double(), dlse.double()))
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_its_statistics_are_those_of_the_reference(options):
    q, k, v = (x.detach() for x in tensors(torch.float32))
    exact = statistics.statistics(q, k, v, **options)
    for mine, want in zip(math_statistics(q, k, v, **options), exact[:3], strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_it_errs_about_as_pytorchs_own_function_does(dtype):
    q, k, v = tensors(dtype, 40, 50)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    exact = attention(q, k, v)
    mine = largest_difference(pytorch_attention(q, k, v)[0], exact)
    theirs = largest_difference(F.scaled_dot_product_attention(q, k, v), exact)
    assert mine > 0 and theirs / 4 < mine < 4 * theirs


def test_what_nobody_sees_may_be_nan():
    q, k, v = (x.detach() for x in tensors(torch.float32))
    k[:, :, 6], v[:, :, 6] = math.nan, math.nan
    out, lse = pytorch_attention(q, k, v, mask=masks.padding(6, 7))
    assert out.isfinite().all() and lse.isfinite().all()


def test_allowed_error_by_hand():
    want = torch.tensor([0.0, 1.0, -4.0, math.inf], dtype=torch.float64)
    tiny = torch.finfo(torch.float32).tiny
    # bf16: 8 bits of mantissa, eps = 2^-7, one rounding of 1 is 2^-8.
    allowed = allowed_error(want, torch.bfloat16, 0.01)
    assert allowed[1].item() == pytest.approx(2 * 0.01 + 2**-8)
    assert allowed[2].item() == pytest.approx(2 * 0.01 + 2**-6)
    assert allowed[0].item() == allowed[3].item() == pytest.approx(2 * 0.01)
    # fp32: ten times PyTorch's error, or ten roundings where that is less.
    assert allowed_error(want, torch.float32, 1e-5)[1].item() == pytest.approx(1e-4)
    assert allowed_error(want, torch.float32, 0.0)[1].item() == pytest.approx(10 * 2**-24)
    assert allowed_error(want, torch.float32, 0.0)[0].item() == pytest.approx(tiny)


def test_nan_is_infinitely_far_and_infinity_is_at_itself():
    got, want = (
        torch.tensor([math.nan, math.inf, 1.0, -math.inf]),
        torch.tensor([1.0, math.inf, 3.0, math.inf]),
    )
    assert difference(got, want.double()).tolist() == [math.inf, 0.0, 2.0, math.inf]
    assert largest_difference(torch.empty(0), torch.empty(0).double()) == 0.0
