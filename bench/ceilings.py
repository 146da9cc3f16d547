"""What can this machine do at most? Copy bandwidth and matmul rates, measured in the run that needs them.

measure_ceilings(device, seconds=3.0) -> Ceilings
"""

from __future__ import annotations

import statistics

import torch

from tilewise.plan import tiles

from .results import Ceilings
from .sampling import Call, Recorder, sample

MATMUL_DTYPES = ("bfloat16", "float16", "float32")
FP8 = "float8_e4m3fn"  # to bfloat16, sums as the tensor cores keep them; where the chip has any for it


def measure_ceilings(
    device: torch.device | str, seconds: float = 3.0, recorder: Recorder | None = None
) -> Ceilings:
    """A copy of 1 GiB, and square matmuls of 8192 on random normal data, with fp32 as
    `torch.get_float32_matmul_precision()` says; on a CPU small ones."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    size, side = (1 << 30, 8192) if on_gpu else (1 << 22, 128)
    generator = torch.Generator(device).manual_seed(0)
    calls: dict[str, Call] = {"copy": _copy(size, device)}
    for dtype in MATMUL_DTYPES:
        calls[dtype] = _matmul(side, getattr(torch, dtype), device, generator)
    if not on_gpu or tiles.multiplies_fp8(tiles.architecture(device)):
        calls[FP8] = _fp8_matmul(side, device, generator)
    least, rounds = (3, 100) if on_gpu else (1, 3)
    medians = {
        name: statistics.median(times)
        for name, times in sample(calls, seconds, device, rounds, least=least, recorder=recorder).items()
    }
    if on_gpu:
        calls.clear()
        torch.cuda.empty_cache()
    return Ceilings(
        copy_bytes_per_second=2 * size / medians["copy"],  # read and written
        matmul_flops_per_second={
            name: 2 * side**3 / median for name, median in medians.items() if name != "copy"
        },
    )


def _copy(size: int, device: torch.device) -> Call:
    source, target = torch.zeros(2, size, dtype=torch.int8, device=device)
    return lambda: target.copy_(source)


def _matmul(side: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    a, b = (
        torch.randn(side, side, generator=generator, device=device, dtype=torch.float32).to(dtype)
        for _ in range(2)
    )
    out = torch.empty(side, side, dtype=dtype, device=device)
    return lambda: torch.matmul(a, b, out=out)


def _fp8_matmul(side: int, device: torch.device, generator: torch.Generator) -> Call:
    a, b = (
        torch.randn(side, side, generator=generator, device=device).to(getattr(torch, FP8)) for _ in range(2)
    )
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
