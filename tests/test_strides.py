"""Where rows are, by strides of every kind: the same bits as from contiguous tensors."""

import math
from typing import Any

import pytest
import torch

import tilewise
from tilewise.kernels.tile import Tile

TILE = Tile(16, 16)


def small(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with tilewise.tiles.use(TILE):
        return tilewise.attention(**arguments, return_lse=True, impl="portable")


def assert_same(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other) and other.any(), "not the same bits, or none that show anything"
        assert not other.isnan().any()


def around(t: torch.Tensor, fill: float = math.nan) -> torch.Tensor:
    """A view in the middle of a larger tensor of NaN (of True for a mask)."""
    big = torch.full([size + 3 for size in t.shape], True if t.dtype == torch.bool else fill, device=t.device)
    view = big.to(t.dtype)[tuple(slice(1, size + 1) for size in t.shape)]
    return view.copy_(t)


def every_other(t: torch.Tensor) -> torch.Tensor:
    """Every dimension strided by two, the innermost too."""
    big = torch.zeros([2 * size for size in t.shape], device=t.device, dtype=t.dtype)
    return big[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The innermost dimension outermost in memory."""
    return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """Starts one element after an aligned address."""
    flat = torch.empty(t.numel() + 1, device=t.device, dtype=t.dtype)[1:]
    assert flat.data_ptr() % 16 != 0
    return flat.view(t.shape).copy_(t)


def odd_single(t: torch.Tensor) -> torch.Tensor:
    """Dimensions of size 1 carry strides that lead out of the tensor; nothing may follow them."""
    strides = [stride if size > 1 else 12_345_677 for size, stride in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(t.shape, strides)


def expanded(t: torch.Tensor) -> torch.Tensor:
    """Stride 0 along every dimension but the last two: the first batch and head for all."""
    return t[:1, :1].expand(t.shape)


def broadcast_rows(t: torch.Tensor) -> torch.Tensor:
    """Stride 0 along the rows."""
    return t[:, :, :1].expand(t.shape)


VIEWS = [around, every_other, transposed, misaligned, odd_single, expanded, broadcast_rows]


@pytest.mark.in_turns
@pytest.mark.any_cpu
@pytest.mark.oldest
@pytest.mark.parametrize("view", VIEWS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(view, dtype, device):
    """Each tensor as such a view, all at once, and the same numbers contiguous: the same bits. Where all keys
    and values are one, only lse has a gradient by the scores: out is the value whatever they are."""
    batch, heads = (1, 1) if view is odd_single else (2, 2)
    shapes = {"q": (batch, heads, 5, 8), "k": (batch, heads, 19, 8), "v": (batch, heads, 19, 6)}
    call = {name: view(torch.randn(shape, device=device).to(dtype)) for name, shape in shapes.items()}
    pairs = (batch, heads, 5, 19)
    call["bias"] = view(torch.randn(pairs, device=device).to(dtype))
    call["mask"] = view(torch.rand(pairs, device=device) < 0.7)
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in call.items()}
    assert_same(small(**call), small(**contiguous))
    do = view(torch.randn(batch, heads, 5, 6, device=device).to(dtype))
    results = []
    for tensors, gradient in ((call, do), (contiguous, do.clone(memory_format=torch.contiguous_format))):
        mask = tensors.pop("mask")
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        out, lse = small(**leaves, mask=mask)
        with tilewise.tiles.use(TILE):
            both = (gradient, torch.ones_like(lse))
            results.append(torch.autograd.grad((out, lse), list(leaves.values()), both))
    assert_same(*results)
