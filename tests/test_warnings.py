"""Where kernels are interpreted NumPy computes: quiet about what calls may hold, and about nothing else."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import tilewise
from tilewise.parts.numerics import INTERPRETED

LENGTH, DIM = 20, 16
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings(), tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        warnings.simplefilter("error", RuntimeWarning)
        yield


def padded(device: torch.device, dtype: torch.dtype, padding: float) -> list[torch.Tensor]:
    """q, k and v; of the keys and values of the first sequence those behind the fifth are `padding`."""
    tensors = [torch.randn(2, 2, LENGTH, DIM, device=device).to(dtype) for _ in range(3)]
    for x in tensors[1:]:
        x[0, :, 5:] = padding
    return [x.requires_grad_() for x in tensors]


KINDS = [("portable", torch.float32), ("portable", torch.float16), ("hopper", torch.float16)]


def can_run(q: torch.Tensor, impl: str) -> bool:
    """Hopper's forward runs in the emulator, and on its chip."""
    reasons = tilewise.why_not(q, q, q, impl=impl)
    assert not reasons or (q.is_cuda and "sm_90" in reasons[0])
    return not reasons


@pytest.mark.parametrize("impl, dtype", KINDS)
@pytest.mark.parametrize("padding", [torch.nan, torch.inf])
def test_padding_may_hold_anything(padding, impl, dtype, device):
    q, k, v = padded(device, dtype, padding)
    if not can_run(q, impl):
        return
    lengths = torch.tensor([5, LENGTH], device=device)
    mask: tilewise.Mask = tilewise.Padding(lengths)
    if impl == "portable":  # keys that no row sees stand between others, in tiles that are visited
        mask = tilewise.Dense(torch.arange(LENGTH, device=device) < lengths[:, None, None, None])
    score = tilewise.Softcap(5.0)
    out = tilewise.attention(q, k, v, mask=mask, score=score, similarity="cosine", impl=impl)
    out.float().square().sum().backward()
    assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad))


@pytest.mark.parametrize("impl, dtype", KINDS)
def test_a_bias_may_be_the_lowest_number(impl, dtype, device):
    """As masks of other libraries are: finfo.min where a pair does not count."""
    q, k, v = padded(device, dtype, 1.0)
    if not can_run(q, impl):
        return
    bias = torch.zeros(LENGTH, LENGTH, device=device)
    bias[1, 3:] = bias[2] = LOWEST
    bias[4] = -torch.inf
    bias.requires_grad_()
    out = tilewise.attention(q, k, v, bias=bias, impl=impl)
    out.float().square().sum().backward()
    assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad, bias.grad))


def test_calls_of_other_threads_are_quiet_too(device):
    """NumPy's setting belongs to a thread, and PyTorch may call a backward from one of its own."""
    raised: list[BaseException] = []

    def call() -> None:
        try:
            test_a_bias_may_be_the_lowest_number("portable", torch.float32, device)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert not raised


def overflows() -> None:
    np.full(4, 3e38, np.float32) * np.float32(10)


def test_numpy_warns_before_and_after_a_call_as_it_did(device):
    for _ in range(2):
        with pytest.raises(RuntimeWarning, match="overflow"):
            overflows()
        with pytest.raises(RuntimeWarning, match="invalid"):
            np.sqrt(np.full(4, -1.0))
        test_a_bias_may_be_the_lowest_number("portable", torch.float32, device)
    with pytest.raises(ValueError):  # nor does a call that fails leave it changed
        tilewise.attention(*padded(device, torch.float32, 1.0), mask=tilewise.Padding(torch.ones(3).int()))
    with pytest.raises(RuntimeWarning, match="overflow"):
        overflows()


@triton.jit
def divided(s, batch, head, q_idx, kv_idx, args):
    return s / (kv_idx - kv_idx).to(tl.float32)


def test_other_warnings_come_through(device):
    """A function of the caller's that divides by zero hears of it, where NumPy is what computes."""
    q, k, v = (x.detach() for x in padded(device, torch.float32, 1.0))
    if INTERPRETED:
        with pytest.raises(Exception, match="divide by zero"):
            tilewise.attention(q, k, v, score=divided)
    else:
        tilewise.attention(q, k, v, score=divided)
