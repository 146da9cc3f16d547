"""What only a Hopper GPU can show of its forward: races, graphs, long runs. No GPU has run this file yet."""

from __future__ import annotations

import pytest
import torch
import triton

import tilewise
from harness.oracle import check
from tilewise import Causal, Padding, Softcap, Window
from tilewise.kernels.tile import HopperTile
from tilewise.plan import tiles

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU (sm_90)", allow_module_level=True)
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 is set: no kernel runs on the GPU", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
HOPPER = dict(impl="hopper")


def qkv(q_len=1000, kv_len=1100, heads=8, kv_heads=2, dim=128, batch=3, dtype=torch.bfloat16):
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(batch, *shape, dim, device=DEVICE, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize(
    "mask",
    [None, Causal(), Causal("top_left"), Window(300, 20)],
    ids=["full", "causal", "top left", "window"],
)
def test_long_rows_against_float64(mask, dim, dtype):
    check(*qkv(1500, 1700, heads=2, kv_heads=1, dim=dim, batch=1, dtype=dtype), mask=mask, **HOPPER)


@pytest.mark.parametrize("length", [1, 17, 127, 128, 129, 1000])
def test_odd_lengths(length):
    for q_len, kv_len in ((length, length), (length, 300), (300, length)):
        check(*qkv(q_len, kv_len, heads=4, dim=64, batch=1), mask=Causal(), **HOPPER)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("has_turns", [True, False])
def test_the_same_bits_two_hundred_times(dim, has_turns):
    """A wait that is missing shows once in many runs: beside another kernel, with the cache cold or warm."""
    q, k, v = qkv(dim=dim)
    lens = torch.tensor([1100, 700, 1], device=DEVICE)
    arguments = dict(mask=Causal("top_left") & Padding(lens), score=Softcap(20.0), return_lse=True, **HOPPER)
    tile = HopperTile(128, 64 if dim == 256 else 128, 8, 2, has_turns=has_turns)
    noise, other = torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    with tiles.use(tile, passes=["hopper"]):
        check(q, k, v, **{name: value for name, value in arguments.items() if name != "return_lse"})
        want = tilewise.attention(q, k, v, **arguments)
        for repeat in range(200):
            if repeat % 3 == 0:
                with torch.cuda.stream(other):
                    noise @ noise
            got = tilewise.attention(q, k, v, **arguments)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), f"repeat {repeat}"


TILES = {
    "three warpgroups": (64, HopperTile(192, 64, 12, 2)),
    "three warpgroups out of turn": (64, HopperTile(192, 64, 12, 2, has_turns=False)),
    "one stage": (128, HopperTile(128, 64, 8, 1)),
    "three stages": (64, HopperTile(128, 128, 8, 3)),
    "four stages": (64, HopperTile(128, 64, 8, 4)),
    "Q in registers": (128, HopperTile(128, 128, 8, 2, is_q_in_registers=True)),
}


@pytest.mark.parametrize("name", TILES)
def test_tiles(name):
    dim, tile = TILES[name]
    with tiles.use(tile, passes=["hopper"]):
        for mask in (None, Causal(), Window(200, 0)):
            check(*qkv(700, 900, heads=4, dim=dim, batch=2), mask=mask, **HOPPER)


def test_a_captured_call_answers_new_data():
    q, k, v = qkv()
    for _ in range(2):
        tilewise.attention(q, k, v, mask=Causal(), **HOPPER)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tilewise.attention(q, k, v, mask=Causal(), **HOPPER)
    for _ in range(3):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, tilewise.attention(q, k, v, mask=Causal(), **HOPPER))


def test_more_tiles_than_a_grid_axis_and_offsets_beyond_32_bits():
    q, k, v = qkv(40, 40, heads=40_000, kv_heads=20_000, dim=64, batch=2)
    out = tilewise.attention(q, k, v, **HOPPER)
    want = tilewise.attention(q[1:, 39_990:], k[1:, 19_995:], v[1:, 19_995:], **HOPPER)
    assert torch.equal(out[1:, 39_990:], want)
    check(q[1:, 39_998:], k[1:, 19_999:], v[1:, 19_999:], **HOPPER)
    far = torch.randn(1, 1, 1, 64, device=DEVICE, dtype=torch.bfloat16)
    whole = torch.zeros(3 * (1 << 30), device=DEVICE, dtype=torch.bfloat16)
    last = whole.as_strided((2, 1, 70, 64), (2 * (1 << 30), 64, 64, 1))[1:]
    last.copy_(torch.randn(1, 1, 70, 64, device=DEVICE))
    check(far, last, last, **HOPPER)
    both = whole.as_strided((2, 1, 70, 64), (2 * (1 << 30), 64, 64, 1))
    out = tilewise.attention(far.expand(2, 1, 1, 64).contiguous(), both, both, **HOPPER)
    assert torch.equal(out[1:], tilewise.attention(far, last.clone(), last.clone(), **HOPPER))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(mode):
    q, k, v = [x.requires_grad_() for x in qkv(300, 300)]

    def attend(q, k, v):
        return tilewise.attention(q * 1, k * 1, v * 1, mask=Causal(), **HOPPER).square().sum()

    want = torch.autograd.grad(attend(q, k, v), (q, k, v))
    compiled = torch.compile(attend, fullgraph=True, mode=mode)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
        assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(got, want, strict=True))
