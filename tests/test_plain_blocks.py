"""The definition in blocks of rows, on the plain PyTorch path: the cases of `test_torch_path` once more, in
blocks so small that every boundary comes up. Which calls it answers: `test_plain_fused`.
"""

from typing import Any

import pytest
import torch
from test_plain_fused import attend, seeded, tensors
from test_torch_path import BATCH, FEATURES, KV_LEN, Q_HEADS, Q_LEN, check_feature, trained

import tilewise
from tilewise.pytorch import plain

Tensor = torch.Tensor
CASES = FEATURES | {
    "dropout": lambda d: (seeded(d), {}),
    "dropout in a window": lambda d: (dict(mask=tilewise.Window(1, 0), **seeded(d)), {}),
    "full bias in a window": lambda d: window_with_bias(d, BATCH, Q_HEADS, Q_LEN, KV_LEN),
    "bias of rows in a window": lambda d: window_with_bias(d, Q_LEN, 1),
    "bias of one number": lambda d: window_with_bias(d),
}


def window_with_bias(device: torch.device, *sizes: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    bias = trained(device, *sizes)
    return dict(mask=tilewise.Window(1, 0), bias=bias, score=tilewise.Softcap(3.0)), {"bias": bias}


def rows_a_block(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(plain, "BLOCK", BATCH * Q_HEADS * KV_LEN * rows)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_blocks_of_any_number_of_rows(name, rows, device, monkeypatch):
    rows_a_block(monkeypatch, rows)
    monkeypatch.setitem(FEATURES, name, CASES[name])
    check_feature(name, device, impl="torch")


@pytest.mark.parametrize("block, rows", [(2 * 4 * 9 * 3 + 5, [3, 3, 1]), (1, [1] * 7)])
def test_a_block_holds_as_many_scores_as_it_may(block, rows, monkeypatch):
    """And one row at the least."""
    monkeypatch.setattr(plain, "BLOCK", block)
    request = tilewise.api.make_request(*tensors(q_len=7, kv_len=9))
    assert [part.q_end - part.q_start for part in plain.blocks(request)] == rows


@pytest.mark.parametrize(
    "mask, blocks",
    [
        (tilewise.Causal(), [(0, 2, 0, 4), (2, 4, 0, 6), (4, 5, 0, 7)]),
        (tilewise.Causal("top_left"), [(0, 2, 0, 2), (2, 4, 0, 4), (4, 5, 0, 5)]),
        (tilewise.Window(1, 0), [(0, 2, 1, 4), (2, 4, 3, 6), (4, 5, 5, 7)]),
        (tilewise.Causal() & tilewise.Window(0, 5), [(0, 2, 2, 4), (2, 4, 4, 6), (4, 5, 6, 7)]),
        (tilewise.Padding(torch.tensor([3, 1])), [(0, 2, 0, 3), (2, 4, 0, 3), (4, 5, 0, 3)]),
        (tilewise.Padding(torch.tensor([3, 1]), "left"), [(0, 2, 4, 7), (2, 4, 4, 7), (4, 5, 4, 7)]),
        (tilewise.Window(0, 0, "top_left") & tilewise.Padding(3), [(0, 2, 0, 2), (2, 4, 2, 3), (4, 5, 3, 3)]),
        (tilewise.Intervals(torch.tensor(-9), torch.tensor(99)), [(0, 2, 0, 7), (2, 4, 0, 7), (4, 5, 0, 7)]),
        (torch.ones(5, 7, dtype=torch.bool), [(0, 2, 0, 7), (2, 4, 0, 7), (4, 5, 0, 7)]),
    ],
    ids=lambda case: type(case).__name__,
)
def test_a_block_has_the_keys_that_its_rows_may_see(mask, blocks, monkeypatch):
    rows_a_block(monkeypatch, 2)
    q, k, v = tensors(q_len=Q_LEN, kv_len=KV_LEN)
    found = plain.blocks(tilewise.api.make_request(q, k, v, mask=mask))
    assert [block[:4] for block in found] == blocks


def test_rows_that_see_no_key_in_blocks_of_their_own(monkeypatch):
    """Blocks without any key: out 0, lse -inf, and NaN that arrives there goes nowhere."""
    q, k, v = tensors(q_len=7, kv_len=4)
    monkeypatch.setattr(plain, "BLOCK", 2 * 4 * 4)
    out, lse = attend(q, k, v, mask=tilewise.Causal(), return_lse=True)  # rows 0, 1, 2 stand before key 0
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -torch.inf).all()
    assert lse[:, :, 3:].isfinite().all()
    do = torch.ones_like(out)
    do[:, :, :3] = torch.nan
    grads = torch.autograd.grad(out, (q, k, v), do)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, :3] == 0).all() and (grads[0][:, :, 4:] != 0).any()


def test_nan_that_no_row_of_a_block_sees_stays_out_of_it(monkeypatch):
    q, k, v = tensors()
    monkeypatch.setattr(plain, "BLOCK", 2 * 4 * 6 * 3)
    with torch.no_grad():
        k[:, :, 5], v[:, :, 5] = torch.nan, torch.inf
    out = attend(q, k, v, mask=tilewise.Causal(), score=tilewise.Softcap(1.0))
    assert out[:, :, :3].isfinite().all() and out[:, :, 5].isnan().all()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("mask", [None, tilewise.Causal()])
def test_nothing_to_attend(lengths, mask, monkeypatch):
    monkeypatch.setattr(plain, "BLOCK", 1)
    q, k, v = tensors(*lengths)
    out, lse = attend(q, k, v, mask=mask, return_lse=True)
    assert out.shape == (2, 4, lengths[0], 8) and (out == 0).all() and (lse == -torch.inf).all()
    assert attend(q[:0], k[:0], v[:0]).shape == (0, 4, lengths[0], 8)
