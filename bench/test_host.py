"""What a call costs the host: everything above the kernels, which are replaced by nothing.

    python -m pytest bench/test_host.py --benchmark-columns=median,iqr

Short sequences and decoding are bound by this time, not by the GPU. The tensors are so small that PyTorch's
SDPA beside it does next to no arithmetic either. On a GPU the rows "tilewise, launched" add Triton's launch;
there SDPA launches its kernels too, and nobody waits for them.
"""

import pytest
import torch
import torch.nn.functional as F
import triton

import tilewise
from tilewise import backward, forward

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KERNELS = (forward.forward_kernel, backward.prepare_kernel, backward.dkv_kernel, backward.dq_kernel)
FEATURES = {
    "plain": lambda: {},
    "causal": lambda: dict(mask=tilewise.Causal()),
    "padding, bias": lambda: dict(
        mask=tilewise.Padding(torch.tensor([3], device=DEVICE)), bias=torch.randn(4, 4, device=DEVICE)
    ),
}


def attend(implementation: str, feature: str):
    """The call under test, f(q, k, v)."""
    if implementation == "sdpa":
        extra = {"plain": {}, "causal": dict(is_causal=True)}
        extra["padding, bias"] = dict(attn_mask=torch.randn(1, 1, 4, 4, device=DEVICE))
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **extra[feature])
    arguments = FEATURES[feature]()
    return lambda q, k, v: tilewise.attention(q, k, v, **arguments, impl="portable")


MODES = ("inference", "forward", "forward and backward")
# Compiling takes seconds a row, so that only one feature is compiled.
ROWS = [(feature, mode, False) for feature in FEATURES for mode in MODES]
ROWS += [("causal", mode, True) for mode in MODES]


@pytest.mark.parametrize("implementation", ["tilewise", "sdpa", *(["tilewise, launched"] if ON_GPU else [])])
@pytest.mark.parametrize("feature, mode, compiled", ROWS)
def test_host(benchmark, monkeypatch, implementation, feature, mode, compiled):
    if implementation == "tilewise":
        for cls in {type(kernel) for kernel in KERNELS}:
            monkeypatch.setattr(cls, "run", lambda *args, **options: None)
    torch.set_num_threads(1)  # threads that wait for work would be what is measured
    torch.manual_seed(0)
    trained = mode != "inference"
    q, k, v = (torch.randn(1, 2, 4, 16, device=DEVICE).requires_grad_(trained) for _ in range(3))
    do = torch.ones_like(q)
    call = attend(implementation, feature)
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")

    def run() -> None:
        out = call(q, k, v)
        if mode == "forward and backward":
            torch.autograd.grad(out, (q, k, v), do)

    benchmark.group = f"host cost: {mode}, {feature}, {'compiled' if compiled else 'eager'}"
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    with torch.set_grad_enabled(trained):
        run()
        benchmark.pedantic(run, rounds=30 if ON_GPU else 10, iterations=50, warmup_rounds=2)
    if ON_GPU:
        torch.cuda.synchronize()
