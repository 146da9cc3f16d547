"""The forward on the FlashAttention papers' grid, beside every backend of PyTorch's SDPA.

    python -m pytest bench --benchmark-json=results.json

Each row first checks its answer: the largest error against float64 on one head stands beside the time, with
TFLOP/s (matmuls over the pairs that count) and the GPU's name, in the row's extra_info.
"""

import pytest
import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import tilewise
from tilewise_reference.attention import attention as oracle
from tilewise_reference.cases import Case, paper_grid
from tilewise_reference.masks import causal

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CASES = list(
    paper_grid(lengths=(1024, 4096, 16384), dtype="bfloat16")
    if ON_GPU
    else paper_grid(head_dims=(64,), lengths=(64,), dtype="float32")
)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,  # holds the score matrix in memory: for the CPU's tiny case alone
}
IMPLEMENTATIONS = (
    ["tilewise", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"] if ON_GPU else ["tilewise", "sdpa_math"]
)


def run(implementation: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    is_causal = "causal" in case.features
    if implementation == "tilewise":
        return tilewise.attention(q, k, v, mask=tilewise.Causal() if is_causal else None)
    with sdpa_kernel(BACKENDS[implementation.removeprefix("sdpa_")]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def largest_error(case: Case, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Against float64, on the first head and the first 1024 queries of the first sequence."""
    rows = min(case.q_len, 1024)
    mask = causal(rows, case.kv_len, "top_left") if "causal" in case.features else None
    q, k, v, out = (x[:1, :1].double() for x in (q[:, :, :rows], k, v, out[:, :, :rows]))
    return (out - oracle(q, k, v, mask=mask)).abs().max().item()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(benchmark, case, implementation):
    batch = case.batch if ON_GPU else 1
    heads = case.q_heads if ON_GPU else 1
    torch.manual_seed(0)
    q = torch.randn(batch, heads, case.q_len, case.head_dim, dtype=case.torch_dtype, device=DEVICE)
    k, v = torch.randn_like(q), torch.randn_like(q)

    def call() -> torch.Tensor:
        out = run(implementation, case, q, k, v)
        if ON_GPU:
            torch.cuda.synchronize()
        return out

    benchmark.group = case.name
    out = benchmark.pedantic(call, rounds=30 if ON_GPU else 1, warmup_rounds=5 if ON_GPU else 0)
    error = largest_error(case, out, q, k, v)
    benchmark.extra_info |= {
        "error": error,
        "tflops": case.flops() / benchmark.stats.stats.median / 1e12 if ON_GPU else None,
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU, Triton's interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    # One rounding of P and of the result, and the sums of a long row: far above that, an answer is wrong.
    assert error < 16 * torch.finfo(case.torch_dtype).eps
