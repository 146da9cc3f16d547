"""The forward kernel against float64: head counts, dimensions, lengths, tiles and memory layouts."""

import random

import pytest
import torch

import tilewise
from harness.features import build, judge, of_kind
from harness.oracle import check
from harness.problem import lengths, run
from tilewise import Causal, Dense, Documents, Intervals, Padding, Prefix
from tilewise.kernels.tile import Tile

DTYPES = ("float32", "float16", "bfloat16")

# ---- Sizes


@pytest.mark.in_turns
@pytest.mark.parametrize("value_dim", ["equal", "smaller", "larger"])
@pytest.mark.parametrize("head_dim", [1, 3, 16, 20, 40, 64, 80, 96, 128, 255, 256])
def test_dims(device, head_dim, value_dim):
    other = {"equal": head_dim, "smaller": -(-head_dim // 3), "larger": min(256, head_dim + 37)}[value_dim]
    dtype = DTYPES[(head_dim + other) % 3]
    sizes = {"batch": 1, "q_len": 17, "kv_len": 35, "head_dim": head_dim, "value_dim": other}
    run(device, dtype, "causal", **sizes)


@pytest.mark.parametrize("q_heads, kv_heads", [(6, 2), (8, 1), (9, 3), (1, 1), (3, 3), (6, 3), (5, 1)])
def test_heads(device, q_heads, kv_heads):
    p = build(device, random.Random(8), ["alibi", "float16"], q_heads=q_heads, kv_heads=kv_heads, kv_len=20)
    p.mask = Dense(p.randn(q_heads, p.q_len, p.kv_len) > -0.5)
    judge(p)


@pytest.mark.in_turns
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("q_len", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("kv_len", [0, 1, 16, 33])
def test_lengths_with_both_causal_corners(device, q_len, kv_len, align):
    p = build(device, random.Random(6), ["bfloat16"], q_len=q_len, kv_len=kv_len)
    p.mask = Causal(align)
    judge(p)


@pytest.mark.parametrize("q_len, kv_len", [(0, 0), (0, 7), (7, 0), (1, 1)])
@pytest.mark.parametrize("features", ["", "sink", "bias sink", "cosine scattered_documents user_score"])
def test_empty_inputs_with_features(device, q_len, kv_len, features):
    run(device, *features.split(), q_len=q_len, kv_len=kv_len)


@pytest.mark.parametrize("tile_q", [16, 32, 64])
@pytest.mark.parametrize("tile_kv", [16, 32, 64])
def test_tiles(device, tile_q, tile_kv):
    sizes = lengths(device, (45, 71))
    run(device, "window", "causal", "softcap", "float16", tile=Tile(tile_q, tile_kv), batch=1, **sizes)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_the_table(device, dtype):
    run(device, dtype, "causal", "grouped_heads", tile=None, batch=1, **lengths(device, (77, 150)))


# ---- Memory layouts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [entry.name for entry in of_kind("layout")])
def test_layout(device, layout, dtype):
    run(device, layout, dtype, "grouped_heads", "odd_dims", q_len=18, kv_len=21, seed=dtype)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
def test_expanded(device, axes):
    """Stride 0 along each dimension of q, k, v, mask, bias, sink and temperature."""

    def expanded(*shape: int) -> torch.Tensor:
        sizes = [1 if axis in axes else n for axis, n in enumerate(shape)]
        return torch.randn(sizes, device=device).expand(shape)

    q, k, v = expanded(2, 4, 18, 20), expanded(2, 2, 21, 20), expanded(2, 2, 21, 24)
    one = torch.randn(1, device=device).expand(4)
    mask, bias = expanded(2, 4, 18, 21) > -0.5, expanded(2, 4, 18, 21)
    with tilewise.tiles.use(Tile(16, 16)):
        check(q, k, v, mask=mask, bias=bias, sink=one, similarity=tilewise.Cosine(one))


def test_every_tensor_may_be_strided(device):
    """Steps of 2 and 3 through storages that are NaN, or point far outside, in between."""

    def strided(x: torch.Tensor, step: int) -> torch.Tensor:
        junk = torch.nan if x.is_floating_point() else True if x.dtype == torch.bool else 2**30
        storage = torch.full((*x.shape, step), junk, dtype=x.dtype, device=device)
        storage[..., 1] = x.to(device)
        return storage[..., 1]

    q, k, v = (strided(torch.randn(2, 2, n, 20), 2) for n in (19, 35, 35))
    ids = strided(torch.tensor([3, 1, 1, 2, 2] * 7), 3)
    start = strided(torch.randint(0, 15, (2, 1, 19)), 2)
    stood = strided(torch.tensor([11, 16]), 3)
    kept, read = strided(torch.tensor([30, 35]), 2), strided(torch.tensor([3, 30], dtype=torch.int32), 3)
    mask = Documents(ids[:19], ids) & Intervals(start, start + 15) & Padding(kept) & Prefix(read, stood)
    mask = mask & strided(torch.rand(35) > 0.2, 2)
    score = [
        tilewise.ALiBi(strided(torch.randn(2), 3), "bottom_right"),
        tilewise.RelativePosition(strided(torch.randn(2, 8), 2), 12, align=stood),
    ]
    bias, sink = strided(torch.randn(2, 1, 19, 35), 3), strided(torch.randn(2), 2)
    with tilewise.tiles.use(Tile(16, 16)):
        check(q, k, v, mask=mask, score=score, bias=bias, sink=sink)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)], ids=str)
def test_output_has_the_memory_order_of_q(device, order):
    """A caller who transposed [batch, length, heads, dim] inputs transposes back without a copy."""
    sizes = (2, 3, 17)
    inverse = [order.index(axis) for axis in range(3)]
    q = torch.randn(*(sizes[axis] for axis in order), 16, device=device).permute(*inverse, 3)
    k, v = torch.randn(2, 3, 20, 16, device=device), torch.randn(2, 3, 20, 8, device=device)
    out, lse = check(q, k, v)
    assert out.permute(*order, 3).is_contiguous() and lse.is_contiguous()
