"""fp8 in the tools: what is counted of it, by which rates, and what is said where it cannot be."""

import dataclasses

import pytest
import torch

import tilewise
from tilewise.plan.request import make_request
from tilewise.plan.tiles import arch_choice, multiplies_fp8
from tilewise.pytorch.quantize import quantize_shapes
from tilewise.tools.chips import CHIPS, find_chip
from tilewise.tools.compiled.compiler import Compiled
from tilewise.tools.compiled.machine_code import Instruction
from tilewise.tools.compiled.main_loop import main_loops
from tilewise.tools.compiled.variants import plain_call, plain_inputs
from tilewise.tools.explain.explain import explain
from tilewise.tools.explain.ranks.explain import explain_ranks
from tilewise.tools.inputs import fp8_shapes
from tilewise.tools.inspect.inspect import applicable, inspect_one
from tilewise.tools.tune.plan import choose_cases

BATCH, Q_HEADS, KV_HEADS, LENGTH, KEYS, DIM = 4, 16, 8, 2048, 2050, 128


def a_call(dim=DIM, value_dim=DIM):
    """On meta tensors: in bf16, and in fp8 with scales."""
    q = torch.empty(BATCH, Q_HEADS, LENGTH, dim, dtype=torch.bfloat16, device="meta")
    k = torch.empty(BATCH, KV_HEADS, KEYS, dim, dtype=torch.bfloat16, device="meta")
    v = k.new_empty(BATCH, KV_HEADS, KEYS, value_dim)
    *numbers, scales = fp8_shapes(q, k, v)
    return (q, k, v), numbers, scales


def test_shapes_are_those_of_quantize():
    inputs, numbers, scales = a_call(value_dim=64)
    for name, x, x8, scale in zip("qkv", inputs, numbers, scales[:3], strict=True):
        wanted, its_scale = quantize_shapes(x, 0, False, name == "v", "portable")
        assert (x8.shape, x8.stride(), x8.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert (scale.shape, scale.dtype) == (its_scale.shape, its_scale.dtype)
    assert scales.dtype == torch.bfloat16 and scales.rows is None
    assert tilewise.why_not(*numbers, scales=scales, impl="portable") == []


@pytest.mark.parametrize(("gpu", "arch"), [("H200", "sm_90"), ("B200", "sm_100")])
def test_explain_counts_bytes_of_each_tensor_and_twice_the_rate(gpu, arch):
    inputs, numbers, scales = a_call()
    wide, narrow = explain(*inputs, gpu=gpu), explain(*numbers, scales=scales, gpu=gpu)
    (kernel,), (of_bf16,) = narrow.kernels, wide.kernels
    read = sum(x.numel() for x in numbers) + 4 * sum(scale.numel() for scale in scales[:3])
    out = 2 * inputs[0].numel()
    assert kernel.bytes == read + out
    assert [(x.name, x.bytes) for x in narrow.memory] == [("out", out)]
    assert (kernel.tile, kernel.tile_from) == arch_choice(arch, 1, make_request(*numbers).shape, "forward")
    assert kernel.flops == of_bf16.flops
    rate = kernel.executed_flops / kernel.limits.matmul
    assert rate == pytest.approx(2 * of_bf16.executed_flops / of_bf16.limits.matmul)
    assert "out is bfloat16, as scales.dtype says; fp8 has a forward alone, and no backward follows" in (
        narrow.notes
    )
    assert narrow.dtype == "float8_e4m3fn" and narrow.on_gpu == "portable"
    assert not any("stride" in said.text for said in narrow.suggestions), "V lies along the keys on purpose"


def test_columns_of_fp8_are_no_fewer_than_a_matmul_needs():
    """80 columns are 16 and 64 in 16 bits; of Q and K in fp8 the narrower piece has 32."""
    _, numbers, scales = a_call(80, 80)
    (kernel,) = explain(*numbers, scales=scales, gpu="H200").kernels
    pairs = kernel.tiles.visited * kernel.tile.tile_q * kernel.tile.tile_kv
    assert kernel.executed_flops == 2 * pairs * (96 + 80)


def test_explain_of_a_cache_in_fp8():
    q = torch.empty(2, 8, 1, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 2, 8192, 128, dtype=torch.bfloat16, device="meta")
    *numbers, scales = fp8_shapes(q, k, k)
    found = explain(*numbers, scales=scales, gpu="H200", kv_lens=torch.tensor([8192, 100], dtype=torch.int32))
    forward, combine = found.kernels
    split_bytes = forward.bytes - q.numel() - 2 * 2 * (8192 + 100) * 128
    assert combine.bytes == pytest.approx(split_bytes + 2 * q.numel(), abs=200)  # and scales and lengths
    assert [x.bytes for x in found.memory if x.name == "out"] == [2 * q.numel()]


def test_real_numbers_are_explained(device):
    made = tilewise.quantize(
        *[torch.randn(1, 2, 33, 16, device=device) for _ in range(3)], per=16, impl="torch"
    )
    found = explain(*made[:3], scales=made.scales, gpu="H200")
    assert found.kernels and "out is float32" in found.notes[0] and not found.refused


def test_what_fp8_cannot_do_is_said():
    _, numbers, scales = a_call()
    found = explain(*numbers, scales=scales, gpu="A100")
    assert found.kernels == ()
    assert found.no_kernels == (
        "torch.float8_e4m3fn needs an NVIDIA GPU of sm_90 or newer, and A100 is sm_80"
    )
    with pytest.raises(
        ValueError, match="fp8 has a forward alone: explain a call with scales with work='for"
    ):
        explain(*numbers, scales=scales, work="training")
    with pytest.raises(ValueError, match="scales: sharing fp8 numbers over ranks is not built"):
        explain_ranks(*numbers, scales=scales, ranks=4, link="450GB/s")
    for dtype in ("fp8", "float8_e4m3fn"):
        with pytest.raises(ValueError, match=f"--dtype {dtype} must be one of .*; fp8 is not tuned yet"):
            choose_cases([], dtype)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_rates_are_of_chips_that_multiply_fp8(chip):
    assert bool(chip.fp8_flops) == multiplies_fp8(chip.arch)
    if chip.fp8_flops:
        assert chip.matmul_rate(1) == 2 * chip.matmul_rate(2)
    else:
        with pytest.raises(ValueError, match=f"{chip.name} .* is no chip on which tilewise multiplies fp8"):
            chip.matmul_rate(1)


def test_the_rate_is_the_datasheets():
    assert find_chip("H100").matmul_rate(1) == pytest.approx(1979e12, rel=1e-3)  # dense, H100 SXM datasheet


# ---- inspect


def test_inspect_of_fp8():
    assert applicable(("forward", "hopper", "dkv"), ["sm_90"], ["fp8"], [64], []) == ["forward"]
    given = plain_call("fp8", 64)
    (q, k, v), scales = (given[name] for name in "qkv"), given["scales"]
    assert {x.dtype for x in (q, k, v)} == {torch.float8_e4m3fn}
    assert v.stride(2) == 1 and q.stride(3) == k.stride(3) == 1
    assert scales.q.shape == (q.shape[0], q.shape[1]) and scales.v.shape == (k.shape[0], k.shape[1])
    assert plain_call("bf16", 64).keys() == {"q", "k", "v"} and len(plain_inputs("bf16", 64)) == 3


def test_tensor_cores_and_limits_are_those_of_the_dtype():
    product, back = Instruction("QGMMA.64x128x32.F32.E4M3.E4M3"), Instruction("BRA", targets=(0,))
    loops = main_loops([product, Instruction("MUFU.EX2"), back], warps=4, warp=32)
    tile = dict(TILE_Q=64, TILE_KV=128, HEAD_TILE=64, VALUE_TILE=64)
    fp8 = Compiled(
        "fp8 64 full", "forward_kernel", "sm_90", "float8_e4m3fn", tile, 4, 2, 200, {}, 0, 1024, 0, {},
        {product.opcode: 1}, loops,
    )  # fmt: skip
    assert fp8.uses_tensor_cores
    assert not dataclasses.replace(fp8, matmuls={"HGMMA.64x128x16.F32": 1}).uses_tensor_cores
    assert dataclasses.replace(fp8, target="sm_100", matmuls={"UTCQMMA": 1}).uses_tensor_cores
    bf16 = dataclasses.replace(fp8, dtype="bfloat16")
    assert not bf16.uses_tensor_cores
    (of_fp8,), (of_bf16,) = inspect_one(fp8).loops, inspect_one(bf16).loops
    assert of_fp8.counts.matmul_flops == 2 * 64 * 128 * 32
    assert of_fp8.bound.matmul == of_bf16.bound.matmul / 2
