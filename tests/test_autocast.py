"""attention under torch.autocast."""

import pytest
import torch

import tilewise
from harness.small_call import KV_LEN, NAMES, Q_LEN, all_equal, attend, tensors


@pytest.mark.oldest
@pytest.mark.parametrize("impl", ["portable", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, impl, device):
    """The call with q, k and v cast by hand; gradients come back in each leaf's own dtype."""
    given = tensors(device, *NAMES)
    leaves = list(given.values())
    with torch.autocast(device.type, dtype):
        out, lse = attend(**given, impl=impl, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    cast = given | {name: given[name].to(dtype) for name in ("q", "k", "v")}
    want, want_lse = attend(**cast, impl=impl, return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    do = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, do)
    assert all(x.dtype == leaf.dtype == torch.float32 for x, leaf in zip(got, leaves, strict=True))
    assert all_equal(got, torch.autograd.grad(want, leaves, do))


@pytest.mark.oldest
@pytest.mark.parametrize("impl", ["portable", "torch"])
def test_autocast_makes_one_dtype_of_several(impl, device):
    given = tensors(device)
    mixed = [given["q"].half(), given["k"].bfloat16(), given["v"]]
    for x in mixed:
        x.requires_grad_()
    with pytest.raises(ValueError, match="dtypes q"):
        tilewise.attention(*mixed, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        out = tilewise.attention(*mixed, impl=impl)
    assert torch.equal(out, tilewise.attention(*(x.bfloat16() for x in mixed), impl=impl))
    out.sum().backward()
    assert [x.grad.dtype for x in mixed] == [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("impl", ["portable", "torch"])
def test_autocast_leaves_masks_alone_and_ends_where_it_ends(impl, device):
    given = tensors(device)
    keep = torch.rand(Q_LEN, KV_LEN, device=device) < 0.7
    with torch.autocast(device.type, torch.bfloat16):
        narrow = attend(given["q"], given["k"], given["v"], mask=keep, impl=impl)
        with torch.autocast(device.type, enabled=False):
            wide = attend(given["q"], given["k"], given["v"], mask=keep, impl=impl)
        assert torch.is_autocast_enabled(device.type)
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert torch.equal(wide, attend(given["q"], given["k"], given["v"], mask=keep, impl=impl))
