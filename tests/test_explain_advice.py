"""`tilewise.explain`: advice where it applies, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tilewise
from harness.calls import even_keys
from harness.explained import attend, meta


def advice(found: Any, word: str) -> list[Any]:
    return [s for s in found.suggestions if word in s.text]


SQUARE = 1024
LOWER = torch.ones(SQUARE, SQUARE, dtype=torch.bool).tril()
RANDOM = torch.rand(SQUARE, SQUARE, generator=torch.Generator().manual_seed(0)) < 0.5
# The first key and its own each row keeps: the first and last are those of a causal mask.
GAPS = LOWER & (RANDOM | torch.eye(SQUARE).bool() | (torch.arange(SQUARE) == 0))
BAND = LOWER & ~LOWER.tril(-100)
DOCUMENTS = torch.arange(SQUARE) % 8


def strided(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device="meta")


ROWS = attend(SQUARE)
ADVICE = {
    "a causal mask as a tensor": (
        lambda: dict(mask=LOWER), "says what tilewise.Causal() says", lambda: dict(mask=tilewise.Causal()),
        1.5,
    ),
    "a mask that a causal one bounds": (
        lambda: dict(mask=GAPS), "tilewise.Causal() & mask", lambda: dict(mask=RANDOM), 1.5,
    ),
    "a band": (
        lambda: dict(mask=BAND), "says what tilewise.Intervals", lambda: dict(mask=tilewise.Window(99, 0)),
        2.5,
    ),
    "key padding as a tensor": (
        lambda: dict(mask=torch.arange(SQUARE)[None, None, None] < 300),
        "says what tilewise.Padding", lambda: dict(mask=tilewise.Padding(300)), 2.0,
    ),
    "a mask without contents": (
        lambda: dict(mask=meta(SQUARE, SQUARE, dtype=torch.bool)), "skips no tile", lambda: {}, None,
    ),
    "a user's mask without interval": (
        lambda: dict(mask=tilewise.UserMask(even_keys)), "UserMask(even_keys) has no interval",
        lambda: {}, None,
    ),
    "documents in pieces": (
        lambda: dict(mask=tilewise.Documents(DOCUMENTS)), "documents come in pieces",
        lambda: dict(mask=tilewise.Documents(DOCUMENTS.sort().values)), 2.5,
    ),
    "fp32": (
        lambda: {n: x.float() for n, x in zip("qkv", ROWS, strict=True)}, "TF32", lambda: {}, 10.0,
    ),
    "a padded dimension": (
        lambda: {n: meta(1, 16, SQUARE, 100) for n in "qkv"}, "head_dim=100 is multiplied as 128",
        lambda: {n: meta(1, 16, SQUARE, 96) for n in "qkv"}, 1.25,
    ),
    "columns apart": (
        lambda: dict(k=strided(ROWS[1], (0, SQUARE * 128, 1, SQUARE))), "dimension has a stride: k (1024)",
        lambda: {}, None,
    ),
    "rows apart by odd bytes": (
        lambda: dict(v=strided(ROWS[2], (0, SQUARE * 129, 129, 1))), "v (strides of 258 bytes)",
        lambda: {}, None,
    ),
    "expanded heads": (
        lambda: dict(k=meta(1, 1, SQUARE, 128).expand(1, 16, SQUARE, 128),
                     v=meta(1, 1, SQUARE, 128).expand(1, 16, SQUARE, 128)),
        "give k[:, :1]", lambda: {}, None,
    ),
    "matmuls and exponentials in turns": (
        lambda: {}, "impl='hopper' asks for the forward that overlaps", lambda: dict(gpu="A100"), 1.3,
    ),
    "few programs": (
        lambda: {n: meta(1, 8, SQUARE, 128) for n in "qkv"}, "64 programs", lambda: {}, 2.0,
    ),
    "a bias of every pair": (
        lambda: dict(bias=meta(1, 16, SQUARE, SQUARE, dtype=torch.float32)), "64.0 MiB to read",
        lambda: dict(bias=meta(1, 16, 1, SQUARE, dtype=torch.float32)), 1.1,
    ),
    "a window narrower than a tile": (
        lambda: dict(mask=tilewise.Window(15, 0), k=meta(1, 1, SQUARE, 128), v=meta(1, 1, SQUARE, 128)),
        "pairs for each that counts", lambda: dict(mask=tilewise.Window(900, 0)), None,
    ),
    "dropout": (lambda: dict(dropout_p=0.1), "Philox", lambda: {}, None),
    "plain PyTorch": (lambda: dict(impl="torch"), "impl='torch'", lambda: dict(impl="portable"), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVICE)
def test_advice_is_given_where_it_applies_and_nowhere_else(name):
    applies, words, does_not, at_least = ADVICE[name]
    usual = dict(zip("qkv", ROWS, strict=True)) | dict(gpu="H200", work="forward")
    (said,) = advice(tilewise.explain(**(usual | applies())), words)
    if at_least is None:
        assert said.factor is None
    else:
        assert said.factor >= at_least
    assert not advice(tilewise.explain(**(usual | does_not())), words)


def test_factors_are_ratios_of_explained_times():
    """What a suggestion promises is what the changed call is explained to take."""
    usual = dict(zip("qkv", ROWS, strict=True)) | dict(gpu="H200", work="training")
    dense, causal = (tilewise.explain(**usual, mask=m) for m in (LOWER, tilewise.Causal()))
    (said,) = advice(dense, "tilewise.Causal()")
    assert said.factor == pytest.approx(dense.seconds / causal.seconds)
    single = {n: x.float() for n, x in zip("qkv", ROWS, strict=True)}
    (said,) = advice(tilewise.explain(**(usual | single)), "fp32")
    assert said.factor == pytest.approx(
        tilewise.explain(**(usual | single)).seconds / tilewise.explain(**usual).seconds
    )
    factors = [s.factor or 0 for s in dense.suggestions]
    assert factors == sorted(factors, reverse=True)


def test_hoppers_forward_is_suggested_where_it_takes_the_call():
    """With what overlapping could give at most, and the word that no GPU has run it."""
    usual = dict(zip("qkv", ROWS, strict=True)) | dict(gpu="H200")
    portable, hopper = (tilewise.explain(**usual, impl=impl) for impl in (None, "hopper"))
    (said,) = advice(portable, "impl='hopper'")
    assert said.factor == pytest.approx(portable.seconds_in_turns / hopper.seconds)
    assert "no GPU has run it yet" in said.text
    training = tilewise.explain(**usual, work="training")
    (less,) = advice(training, "impl='hopper'")
    assert 1.05 < less.factor < said.factor, "the backward stays as it is"
    for changes in (
        dict(impl="hopper"),
        dict(impl="torch"),
        dict(dropout_p=0.1),
        dict(mask=tilewise.Documents(DOCUMENTS)),
        {name: x.float() for name, x in zip("qkv", ROWS, strict=True)},
        dict(q=meta(1, 16, 1, 128)),  # bound by memory
    ):
        assert not advice(tilewise.explain(**(usual | changes)), "impl='hopper' asks for the forward")


def test_addresses_are_looked_at_where_there_are_any(device):
    storage = torch.zeros(2 * 64 * 64 + 1, dtype=torch.float16, device=device)
    shifted = storage[1:].view(1, 2, 64, 64)
    fresh = torch.zeros(1, 2, 64, 64, dtype=torch.float16, device=device)
    (said,) = advice(tilewise.explain(shifted, fresh, fresh, gpu="H200"), "16 bytes")
    assert "q (its address)" in said.text
    assert not advice(tilewise.explain(fresh, fresh, fresh, gpu="H200"), "16 bytes")
