"""`tilewise.explain` of packed sequences: advice, limits and memory."""

from __future__ import annotations

import pytest
import torch

import tilewise
from harness.explained import leave_interpreter, meta, prose
from tilewise.kernels.tile import Tile


def test_advice_looks_at_every_sequence():
    starts = torch.tensor([0, 1000, 1900, 2900])
    q = meta(2900, 16, 128)
    lower = torch.ones(1000, 1000, dtype=torch.bool).tril()
    pieces = torch.arange(1000) % 4
    random_pairs = torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0)) < 0.5

    def said(**given):
        return [s for s in tilewise.explain(q, q, q, q_offsets=starts, gpu="H200", **given).suggestions]

    causal = tilewise.explain(q, q, q, q_offsets=starts, gpu="H200", mask=tilewise.Causal())
    dense = tilewise.explain(q, q, q, q_offsets=starts, gpu="H200", mask=lower)
    (advice,) = [s for s in dense.suggestions if "says what tilewise.Causal() says" in s.text]
    assert advice.factor == pytest.approx(dense.seconds / causal.seconds) and advice.factor > 1.4
    assert not any("bool mask" in s.text for s in said(mask=random_pairs))
    gaps = lower & (random_pairs | torch.eye(1000, dtype=torch.bool) | (torch.arange(1000) == 0))
    assert any("tilewise.Causal() & mask skips" in s.text for s in said(mask=gaps))
    assert any("documents come in pieces" in s.text for s in said(mask=tilewise.Documents(pieces)))
    whole = tilewise.Documents(pieces.sort().values)
    assert not any("documents come in pieces" in s.text for s in said(mask=whole))


def test_idle_programs_are_not_counted_as_work():
    """Of 2 + 34 numbers of tiles a head, two have a tile; the rest is idle."""
    starts = torch.tensor([0, 64, *[128] * 31])
    q = meta(128, 8, 64)
    with tilewise.tiles.use(Tile(64, 64)):
        found = tilewise.explain(q, q, q, q_offsets=starts, gpu="H200")
        pair = tilewise.explain(q, q, q, q_offsets=torch.tensor([0, 64, 128]), gpu="H200")
    assert (found.kernels[0].programs, found.kernels[0].busy, pair.kernels[0].busy) == (8 * 36, 16, 16)
    assert found.limit == "programs" and found.limits.matmul == pair.limits.matmul
    assert "the 16 of forward leave 116 of 132" in prose(found)
    assert any(s.text.startswith("16 programs") for s in found.suggestions)


def test_a_bias_of_every_pair_is_read_where_sequences_are():
    """A bias as long as the longest sequence, of which the others read a part."""
    starts, q = torch.tensor([0, 512, 1024 - 256]), meta(768, 2, 64)
    bias = meta(2, 2, 512, 512, dtype=torch.float32)
    with tilewise.tiles.use(Tile(64, 64)):
        read, without = (
            tilewise.explain(q, q, q, q_offsets=starts, gpu="H200", bias=b).kernels[0].bytes
            for b in (bias, None)
        )
    assert read - without == 4 * 2 * (512 * 512 + 256 * 256)


def test_plain_pytorch_holds_scores_of_one_sequence(monkeypatch):
    leave_interpreter(monkeypatch)
    q = torch.randn(140, 2, 16)
    given = dict(q_offsets=torch.tensor([0, 100, 120, 140]), score=tilewise.Softcap(5.0))
    for work in ("forward", "training"):
        found = tilewise.explain(q, q, q, **given, work=work, strict=True)
        assert [x.bytes for x in found.memory_here] == [4 * 2 * 100 * 100] and not found.refused
    assert not tilewise.explain(q, q, q, q_offsets=given["q_offsets"]).memory_here
