"""`tilewise.explain`: its numbers against counts made otherwise."""

from __future__ import annotations

import pytest
import torch

import tilewise
from harness.explained import ALL_CASES, TRAINING_KERNELS, attend, launched_grids, meta, prose
from tilewise.kernels import prepare
from tilewise.kernels.forward import forward_launch
from tilewise.kernels.tile import Tile
from tilewise.parts.shape import Shape
from tilewise.plan import passes
from tilewise.plan.bind import bind
from tilewise.plan.passes import run_backward, run_forward
from tilewise.plan.request import make_request
from tilewise.plan.tiles import gpu_tile
from tilewise.tools.chips import find_chip
from tilewise.tools.explain.command import explain_case

MODELS = [name for name in ALL_CASES if not name.startswith(("paper", "short"))]


@pytest.mark.parametrize("name", MODELS)
def test_flops_and_bytes_are_those_of_the_named_case(name, nothing_runs):
    """The case counts from its own description, and knows nothing of tiles."""
    case = ALL_CASES[name]
    found = explain_case(case, "H200", training=case.cache is None)
    forward = found.kernels[0]
    assert forward.flops == case.flops()
    if case.cache is not None:  # no backward, and what is kept is lse alone, of each split
        merged = sum(kernel.bytes for kernel in found.kernels[1:])
        assert case.bytes() <= forward.bytes + merged
        assert forward.bytes <= 1.04 * case.bytes() + merged + 1000
        return
    assert found.flops == case.flops() + case.flops("backward")
    # Seven products where five count: S and dP are computed twice.
    products = sum(k.flops for k in found.kernels if k.name in ("dq", "dkv"))
    again = 2 * case.batch * case.q_heads * case.pairs() * (case.head_dim + case.value_dim)
    assert products == case.flops("backward") + again
    kept = 3 * 4 * case.batch * case.q_heads * case.q_len  # lse and two statistics, which the case leaves out
    # Document ids, factors of the cosine and the like are all that may come on top.
    assert case.bytes() <= forward.bytes - kept <= 1.04 * case.bytes() + 1000


@pytest.mark.parametrize("name", ["llama3-8b-prefill", "deepseek-v3-prefill", "beginner-article"])
@pytest.mark.parametrize("gpu", ["H200", "A100", "MI300X"])
def test_tiles_are_those_of_the_table(name, gpu):
    case = ALL_CASES[name]
    found = explain_case(case, gpu, training=True)
    shape = Shape(
        case.batch, case.q_heads, case.kv_heads, case.q_len, case.kv_len, case.head_dim, case.value_dim
    )
    for kernel in found.kernels:
        work = "dkv" if kernel.name == "prepare" else kernel.name
        assert kernel.tile == gpu_tile(find_chip(gpu).arch, case.torch_dtype.itemsize, shape, work)
        assert kernel.tile_from == "shipped table"
        assert kernel.waves == kernel.programs / find_chip(gpu).multiprocessors


def test_programs_are_the_grids_of_the_launches(device, monkeypatch):
    """Against the grids that the launchers of every kernel ask for."""
    q = torch.randn(2, 4, 45, 24, device=device)
    k, v = torch.randn(2, 2, 70, 24, device=device), torch.randn(2, 2, 70, 40, device=device)
    table = torch.randn(4, 32, device=device, requires_grad=True)
    arguments = dict(mask=tilewise.Causal(), score=tilewise.RelativePosition(table))
    grids = launched_grids(monkeypatch, TRAINING_KERNELS)
    with tilewise.tiles.use(Tile(16, 32)):
        found = tilewise.explain(q, k, v, **arguments, work="training", gpu="H200")
        request = make_request(q, k, v, **arguments, impl="portable")
        out, _, statistics = run_forward(request, True, True)
        needs = [True, True, True, *(t.requires_grad for _, t in request.other_tensors)]
        run_backward(request, out, statistics, out, None, needs)
    assert {kernel.name: kernel.programs for kernel in found.kernels} == grids


def test_memory_is_what_the_launchers_allocate(device, monkeypatch):
    q = torch.randn(2, 4, 45, 24, device=device)
    k, v = torch.randn(2, 2, 70, 24, device=device), torch.randn(2, 2, 70, 40, device=device)
    bias = torch.randn(4, 1, 70, device=device, requires_grad=True)
    prepared: list[prepare.BackwardCall] = []
    monkeypatch.setattr(
        passes, "prepare", lambda *args: prepared.append(prepare.prepare(*args)) or prepared[-1]
    )
    with tilewise.tiles.use(Tile(32, 32)):
        found = tilewise.explain(q, k, v, bias=bias, work="training", gpu="H200")
        request = make_request(q, k, v, bias=bias, impl="portable")
        out, lse, statistics = run_forward(request, True, True)
        dq, dk, dv, dbias = run_backward(request, out, statistics, out, None, [True] * 4)
    assert {x.name: x.bytes for x in found.memory} == {
        "out": out.nbytes, "lse": lse.nbytes, "row statistics": statistics.nbytes,
        "delta": prepared[0].delta.nbytes, "ranges": prepared[0].ranges.nbytes,
        "dq": dq.nbytes, "dk and dv": dk.nbytes + dv.nbytes,
        "sums of Bias.bias": 4 * 2 * 4 * 70, "gradient of Bias.bias": dbias.nbytes,
    }  # fmt: skip
    assert sum(x.bytes for x in found.memory) < 45 * 70 * 2 * 4 * 4 * 4, "more than a few score matrices"


def test_inference_keeps_nothing_but_the_result():
    assert [x.name for x in tilewise.explain(*attend()).memory] == ["out"]
    assert [x.name for x in tilewise.explain(*attend(), return_lse=True).memory] == ["out", "lse"]


@pytest.mark.parametrize("dim, ratio", [(64, 1.0), (128, 0.5), (256, 0.25)])
def test_limits_on_a_hopper_are_the_textbook_ones(dim, ratio):
    """16 exponentials against 4096 FLOPs a clock: a pair takes 4 · head_dim of these and one of those."""
    found = tilewise.explain(*attend(dim=dim, heads=2048 // dim), gpu="h200")
    (kernel,) = found.kernels
    assert kernel.executed_flops == kernel.flops == found.flops == 4 * 4096 * 4096 * 2048
    assert kernel.limits.matmul == pytest.approx(found.flops / 989.5e12, rel=1e-3)
    assert kernel.limits.exponentials / kernel.limits.matmul == pytest.approx(ratio)
    assert kernel.limits.memory == pytest.approx(4 * 4096 * 2048 * 2 / 4.8e12)
    assert kernel.intensity == pytest.approx(4096 / 2)
    assert found.seconds == kernel.limits.overlapped == kernel.limits.matmul
    assert found.seconds_in_turns == pytest.approx((1 + ratio) * found.seconds)


def test_a_softcap_doubles_the_exponentials():
    plain, capped = (
        tilewise.explain(*attend(), score=score, work="training") for score in (None, tilewise.Softcap(5))
    )
    for before, after in zip(plain.kernels, capped.kernels, strict=True):
        assert after.exponentials == {"forward": 2, "prepare": 0}.get(after.name, 3) * before.exponentials
    assert capped.kernels[0].limits.largest in ("matmul", "exponentials")


def test_decoding_is_bound_by_memory():
    found = explain_case(ALL_CASES["llama3-8b-decode"], "H200", training=False)
    assert found.limit == "memory"
    assert found.seconds == pytest.approx(16 * 8 * 8192 * 256 * 2 / 4.8e12, rel=0.01)


def test_idle_multiprocessors_make_the_rest_slower():
    """One head of one row tile: the same work on 1 of 132 multiprocessors, which gets 128 bytes a clock."""
    one, many = (tilewise.explain(*attend(128, heads), gpu="H200").kernels[0] for heads in (1, 132))
    assert (one.programs, many.programs) == (1, 132)
    assert one.limits.matmul == pytest.approx(many.limits.matmul)
    assert one.limits.memory == pytest.approx(one.bytes / (128 * 1.83e9))
    assert many.limits.memory == pytest.approx(many.bytes / 4.8e12)


@pytest.mark.parametrize(
    "heads, kv_heads, kv_len, limit",
    [
        (132, 132, 300, "memory"),  # a program on each multiprocessor
        (131, 131, 300, "memory"),  # one idle, and the memory could do no more
        (32, 8, 300, "programs"),  # matmuls of 15 padding rows in 16, for want of others that share them
        (8, 8, 8192, "programs"),  # 8 ports let less through than the memory has
    ],
)
def test_too_few_programs_are_the_limit_where_more_would_help(heads, kv_heads, kv_len, limit):
    q, k = meta(1, heads, 1, 128), meta(1, kv_heads, kv_len, 128)
    found = tilewise.explain(q, k, k, gpu="H200")
    kernel = found.kernels[0]
    assert kernel.programs == heads and found.limit == kernel.limits.limit == limit
    assert found.to_dict()["kernels"][0]["limit"] == limit
    idle = f"the {heads} of forward leave {132 - heads} of 132 multiprocessors idle"
    assert (idle in prose(found)) == (limit == "programs")
    assert ("on tiles of 16 rows that hold 1" in prose(found)) == (limit == "programs")


def test_fp32_follows_the_precision_that_pytorch_is_set_to(monkeypatch):
    ieee = tilewise.explain(*attend(dtype=torch.float32), gpu="H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    tf32 = tilewise.explain(*attend(dtype=torch.float32), gpu="H200")
    assert ieee.limits.matmul / tf32.limits.matmul == pytest.approx(2048 / 256)


def test_the_forward_grid_of_an_explained_call(device):
    """The launch itself, without a stand-in for the kernel."""
    q = torch.randn(1, 2, 45, 16, device=device)
    found = tilewise.explain(q, q, q, gpu="H200")
    request = make_request(q, q, q, impl="portable")
    out = torch.empty_like(q)
    grid, _ = forward_launch(bind(request), out, None, None, found.kernels[0].tile)
    assert grid == (found.kernels[0].programs,)
