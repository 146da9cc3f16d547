"""merge: results over disjoint keys make the result over all of them, with gradients."""

import pytest
import torch

import tilewise
from tilewise import Causal, merge


def parts(device, dtype=torch.float32):
    return [torch.randn(2, 3, n, 16, device=device).to(dtype).requires_grad_() for n in (20, 33, 33)]


@pytest.mark.parametrize("mask", [None, Causal()], ids=str)
def test_two_halves_of_the_keys_make_the_whole(mask, device):
    """As for a shared prefix: causal attention over the last keys, all of the first."""
    q, k, v = parts(device)
    near = tilewise.attention(q, k[:, :, 13:], v[:, :, 13:], mask=mask, return_lse=True)
    far = tilewise.attention(q, k[:, :, :13], v[:, :, :13], return_lse=True)
    whole = tilewise.attention(q, k, v, mask=mask, return_lse=True)
    for found in (merge(*near, *far), merge(*far, *near)):
        for got, want in zip(found, whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    do, dlse = torch.randn_like(whole[0]), torch.randn_like(whole[1])
    got, want = (torch.autograd.grad(x, (q, k, v), (do, dlse), retain_graph=True) for x in (found, whole))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_has_no_key_stays_out(device):
    """NaN in its out too, and in its gradient; two without keys have none together."""
    out = torch.randn(1, 1, 3, 8, device=device, requires_grad=True)
    lse = torch.randn(1, 1, 3, device=device, requires_grad=True)
    junk = torch.full_like(out, torch.nan).requires_grad_()
    empty = torch.full_like(lse, -torch.inf).requires_grad_()
    for given in ((out, lse, junk, empty), (junk, empty, out, lse)):
        got, got_lse = merge(*given)
        assert torch.equal(got, out) and torch.equal(got_lse, lse)
        grads = torch.autograd.grad((got.sum(), got_lse.sum()), given)
        assert all(grad.isfinite().all() for grad in grads)
    got, got_lse = merge(junk, empty, junk, empty)
    assert (got == 0).all() and (got_lse == -torch.inf).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(got.sum(), (junk, empty)))


def test_second_derivatives(device):
    out_a, out_b = (torch.randn(2, 3, 4, dtype=torch.float64, device=device).requires_grad_() for _ in "ab")
    lse_a, lse_b = (torch.randn(2, 3, dtype=torch.float64, device=device).requires_grad_() for _ in "ab")
    assert torch.autograd.gradgradcheck(merge, (out_a, lse_a, out_b, lse_b))


def test_half_precision_and_large_sums(device):
    out = torch.ones(1, 4, 8, dtype=torch.bfloat16, device=device)
    lse = torch.tensor([[1e4, -1e4, 0.0, 88.0]], device=device)
    got, got_lse = merge(out, lse, 3 * out, lse)
    assert got.dtype == torch.bfloat16 and (got == 2).all()
    torch.testing.assert_close(got_lse, lse + torch.log(torch.tensor(2.0)))


def test_shapes_that_do_not_fit(device):
    out, lse = torch.zeros(2, 3, 4, device=device), torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match=r"lse_b.shape=\(3,\) the same without the last dimension"):
        merge(out, lse, out, lse[0])
