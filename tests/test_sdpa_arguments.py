"""Argument by argument: PyTorch's attention and tilewise's in its place answer alike, or both refuse.

What is different is in docs/pytorch.md, and in DIFFERENT here. That the numbers are right is `test_sdpa`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tilewise
from harness.interpreted import set_interpreted

Tensor = torch.Tensor
D, BF16, FP16 = torch.float64, torch.bfloat16, torch.float16


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", BF16)


def given(
    *rest: Any, q: Any = (2, 3, 5, 8), k: Any = (2, 3, 7, 8), v: Any = None, dtypes: Any = (), **named: Any
) -> Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of a call. A tuple stands for random numbers of that shape, a pair of it and a dtype for
    those of that dtype; dtypes are those of q, k and v."""

    def tensor(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes).to(dtype)

    def made(x: Any) -> Any:
        if not isinstance(x, tuple):
            return x
        return tensor(*x) if x and isinstance(x[0], tuple) else tensor(x)

    kinds = (tuple(dtypes) if isinstance(dtypes, (tuple, list)) else (dtypes,) * 3) or (torch.float32,) * 3
    return lambda: (
        (*map(tensor, (q, k, v or k), kinds), *map(made, rest)),
        {name: made(value) for name, value in named.items()},
    )


MASK = (5, 7)
BOTH_ANSWER: dict[str, tuple[Any, Callable[[], Any]]] = {
    "autocast": (autocast, given()),
    "autocast, dtypes mixed": (autocast, given(dtypes=(torch.float32, BF16, FP16))),
    "autocast, a mask in fp32": (autocast, given(MASK)),
    "autocast, a mask in its dtype": (autocast, given((MASK, BF16))),
    "autocast, a mask in another": (autocast, given((MASK, FP16))),
    "autocast, all in float64": (autocast, given((MASK, D), dtypes=D)),
    "float64": (nullcontext, given((MASK, D), dtypes=D)),
    "float64, a mask in fp32": (nullcontext, given(MASK, dtypes=D)),
    "bf16, a mask in fp32": (nullcontext, given(MASK, dtypes=BF16)),
    "no sequence": (nullcontext, given(q=(0, 3, 5, 8), k=(0, 3, 7, 8))),
    "heads broadcast": (nullcontext, given(k=(2, 1, 7, 8))),
    "a whole scale": (nullcontext, given(scale=2)),
    "a scale in a tensor": (nullcontext, lambda: (given()()[0], dict(scale=torch.tensor(0.5)))),
    "infinity in a mask": (
        nullcontext,
        lambda: (
            (*given()()[0], torch.zeros(MASK).index_put((torch.tensor(1),), torch.tensor(torch.inf))),
            {},
        ),
    ),
    "a row that sees nothing": (
        nullcontext,
        lambda: ((*given()()[0], torch.zeros(MASK).index_fill(0, torch.tensor(2), -torch.inf)), {}),
    ),
    "gaps within rows": (
        nullcontext,
        lambda: (tuple(x[..., ::2] for x in given(q=(2, 3, 5, 16))()[0][:1] * 3), {}),
    ),
    "every pair dropped": (nullcontext, given(dropout_p=1.0)),
}
BOTH_REFUSE: dict[str, tuple[Any, Callable[[], Any]]] = {
    "autocast, float64 beside fp32": (autocast, given(dtypes=(D, torch.float32, torch.float32))),
    "autocast, a mask in float64": (autocast, given((MASK, D))),
    "a mask in float64": (nullcontext, given((MASK, D))),
    "a mask in fp16": (nullcontext, given((MASK, FP16))),
    "dtypes mixed": (nullcontext, given(dtypes=(torch.float32, BF16, torch.float32))),
    "complex numbers": (nullcontext, given(dtypes=torch.complex64)),
    "integers": (nullcontext, given(dtypes=torch.int32)),
    "a mask of more dimensions": (nullcontext, given((1, 2, 3, 5, 7))),
    "a mask of more keys": (nullcontext, given((5, 8))),
    "grouped heads without a ratio": (nullcontext, given(q=(2, 4, 5, 8), enable_gqa=True)),
    "dropout_p below 0": (nullcontext, given(dropout_p=-0.1)),
    "dropout_p above 1": (nullcontext, given(dropout_p=1.1)),
}
# PyTorch 2.11 and 2.13 answer on a CPU, and we refuse, with these words.
DIFFERENT: dict[str, tuple[str, Callable[[], Any]]] = {
    "no heads": ("neither may be 0", given(q=(2, 0, 5, 8), k=(2, 0, 7, 8))),
    "head_dim 0": ("head_dim=0 must be from 1 to 576", given(q=(2, 3, 5, 0), k=(2, 3, 7, 0), v=(2, 3, 7, 8))),
    "value_dim 0": ("value_dim=0 must be from 1 to 512", given(v=(2, 3, 7, 0))),
    "head_dim above 576": ("head_dim=600 must be", given(q=(2, 3, 5, 600), k=(2, 3, 7, 600))),
    "a mask beside is_causal": ("cannot be given together", given(MASK, is_causal=True)),
    "keys and values grouped apart": (
        "head counts k: 3, v: 2",
        given(q=(2, 6, 5, 8), v=(2, 2, 7, 8), enable_gqa=True),
    ),
}


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    set_interpreted(monkeypatch, False)


@pytest.mark.parametrize("name", BOTH_ANSWER)
def test_both_answer(name):
    within, make = BOTH_ANSWER[name]
    arguments, named = make()
    with within():
        want = F.scaled_dot_product_attention(*arguments, **named)
        got = tilewise.scaled_dot_product_attention(*arguments, **named)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    if want.numel():  # a rounding of each probability, of a mask, and of the result, in the result's dtype
        size = max(1.0, *(x.double().abs().max().item() for x in arguments if isinstance(x, Tensor)))
        error = (got.double() - want.double()).nan_to_num().abs().max().item()
        assert error <= 8 * torch.finfo(want.dtype).eps * size**3


@pytest.mark.parametrize("name", BOTH_REFUSE)
def test_both_refuse(name):
    within, make = BOTH_REFUSE[name]
    arguments, named = make()
    with within():
        with pytest.raises((RuntimeError, IndexError)):
            F.scaled_dot_product_attention(*arguments, **named)
        with pytest.raises(ValueError):
            tilewise.scaled_dot_product_attention(*arguments, **named)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_different(name):
    words, make = DIFFERENT[name]
    arguments, named = make()
    if name != "no heads":  # which ends the process in PyTorch 2.11, by a division by 0
        assert F.scaled_dot_product_attention(*arguments, **named).shape[0] == 2
    with pytest.raises(ValueError, match=words):
        tilewise.scaled_dot_product_attention(*arguments, **named)


def test_a_mask_that_is_trained():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    mask = torch.randn(MASK, requires_grad=True)
    both = F.scaled_dot_product_attention, tilewise.scaled_dot_product_attention
    want, got = (torch.autograd.grad(sdpa(q, k, v, mask).sin().sum(), mask)[0] for sdpa in both)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
def test_tensors_without_memory(dtype):
    q, k, v = (torch.empty(2, 3, n, 8, device="meta", dtype=dtype) for n in (5, 7, 7))
    want, got = (
        sdpa(q, k, v) for sdpa in (F.scaled_dot_product_attention, tilewise.scaled_dot_product_attention)
    )
    assert got.is_meta and (got.dtype, got.shape) == (want.dtype, want.shape)


def test_jagged_tensors():
    """Causal ones too, which PyTorch takes on GPUs alone; a mask with them is refused by both."""
    values, starts = torch.randn(8, 2, 8), torch.tensor([0, 3, 8])
    x = torch.nested.nested_tensor_from_jagged(values, starts).transpose(1, 2)
    want = F.scaled_dot_product_attention(x, x, x)
    got = tilewise.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(got.values(), want.values())
    causal = tilewise.scaled_dot_product_attention(x, x, x, is_causal=True)
    for one, rows in zip(causal.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(one, F.scaled_dot_product_attention(*[rows[None]] * 3, is_causal=True)[0])
    with pytest.raises((RuntimeError, ValueError)):
        F.scaled_dot_product_attention(x, x, x, torch.zeros(5, 5))
    with pytest.raises(ValueError, match="nested tensors"):
        tilewise.scaled_dot_product_attention(x, x, x, torch.zeros(5, 5))
