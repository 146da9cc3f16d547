"""What a call costs the host, Triton's launch included, on a machine without a GPU.

    python -m bench.host_without_gpu            all calls; it takes a C compiler
    python -m bench.host_without_gpu forward    those named, as the table has them

Triton compiles for a Hopper GPU, and its own driver, launchers and C code run as ever, over a libcuda that
does nothing. Tensors are the CPU's, so PyTorch's allocator is too; all else is what the host does before a
GPU begins. Not in it: what CUDA's own launch takes for each kernel. PyTorch's attention stands beside it for
the machine's speed; it computes, and next to nothing, so small are the tensors. Compare ratios.

"long way" is a call as it goes with TILEWISE_REPLAY=0, "repeated" one that looks like an earlier one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROUNDS, TIMES = 400, 10
LIBRARY = "libcuda.so.1"
# What Triton asks of CUDA, answered as a Hopper GPU would that runs nothing.
SOURCE = """
#include <stddef.h>
#include <string.h>
typedef unsigned long long u64;
#define NOTHING(name) int name() { return 0; }
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuModuleUnload) NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig) NOTHING(cuCtxSetLimit) NOTHING(cuLaunchKernelEx) NOTHING(cuLaunchKernel)
NOTHING(cuTensorMapEncodeIm2col)
static int one(int *n) { *n = 1; return 0; }
int cuDeviceGetCount(int *n) { return one(n); }
int cuOccupancyMaxActiveClusters(int *n, void *f, void *c) { return one(n); }
int cuDriverGetVersion(int *n) { *n = 13000; return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuStreamIsCapturing(void *s, int *n) { *n = 0; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
int cuModuleLoadData(void **m, const void *d) { *m = (void *)2; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *n) { *f = (void *)3; return 0; }
int cuFuncGetAttribute(int *n, int a, void *f) { *n = a == 0 ? 1024 : 0; return 0; }
int cuDeviceGetAttribute(int *n, int a, int d) {
  *n = a == 10 ? 32 : a == 8 || a == 97 ? 232448 : a == 16 ? 132 : 1024;
  return 0;
}
int cuCtxGetLimit(size_t *n, int l) { *n = 0; return 0; }
int cuGetErrorString(int c, const char **s) { *s = "no GPU"; return 0; }
int cuPointerGetAttribute(void *out, int a, u64 p) { *(u64 *)out = p; return 0; }
int cuTensorMapEncodeTiled(void *map, int t, unsigned r, void *p, const u64 *sizes, const u64 *strides,
                           const unsigned *box, const unsigned *steps, int i, int s, int l, int o) {
  memset(map, 0, 128);
  return 0;
}
"""


def main(names: Sequence[str]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set: nothing is launched then")
    if shutil.which("cc") is None:
        raise SystemExit("there is no cc on the PATH: a library that stands for CUDA's is compiled with it")
    with tempfile.TemporaryDirectory() as folder, gpu_that_does_nothing(Path(folder)):
        rows = measure(names)
    print(f"{'µs a call, fastest round':36}{'long way':>10}{'repeated':>10}{'sdpa':>10}{'ratio':>10}")
    for name, (long, short, theirs) in rows.items():
        print(f"{name:36}{long:10.1f}{short:10.1f}{theirs:10.1f}{short / theirs:10.2f}")


@contextlib.contextmanager
def gpu_that_does_nothing(folder: Path) -> Iterator[None]:
    """Triton's driver over a library of ours in the folder; calls of CPU tensors are answered by kernels."""
    source = folder / "cuda.c"
    source.write_text(SOURCE)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", f"-Wl,-soname,{LIBRARY}", "-o", folder / LIBRARY, source],
        check=True,
    )
    # Triton links its C code against it, and keeps that: not where it keeps what it makes for a GPU.
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    ctypes.CDLL(str(folder / LIBRARY), mode=ctypes.RTLD_GLOBAL)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    from tilewise.plan import implementation, tiles
    from tilewise.plan.rules import implementations
    from tilewise.plan.user_tiles import UserTable

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(driver)
    kernels: Any = (implementation, implementations)
    for module in kernels:
        module.INTERPRETED = True  # who answers is asked of them, and nothing else
    chosen: Any = tiles
    chosen.architecture = lambda device: "sm_90"
    chosen.user_table = lambda device: UserTable(folder, {}, [])
    yield


def measure(names: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """µs of each call, or of those named: the long way, repeated, PyTorch's attention in the same rounds."""
    import torch

    import tilewise

    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 2, 16, 64, dtype=torch.bfloat16) for _ in range(3))
    leaves: Any = [x.clone().requires_grad_() for x in (q, k, v)]
    do, mask = torch.randn_like(q), tilewise.Causal()
    cache = [torch.randn(1, 2, 256, 64, dtype=torch.bfloat16) for _ in range(2)]
    lens = torch.tensor([100], dtype=torch.int32)
    sdpa: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention

    def without_gradients(run: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(run)

    def both(attend: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, do)

    def ours(q: Any, k: Any, v: Any, impl: str = "portable") -> Any:
        return tilewise.attention(q, k, v, mask=mask, impl=impl)

    def cached() -> Any:
        return tilewise.cached_attention(q, *cache, kv_lens=lens, mask=mask, impl="portable")

    forward = without_gradients(lambda: sdpa(q, k, v))
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (without_gradients(lambda: ours(q, k, v)), forward),
        "forward of Hopper's kernel": (without_gradients(lambda: ours(q, k, v, "hopper")), forward),
        "forward over a cache": (cached, forward),
        "forward, recorded for the backward": (lambda: ours(*leaves), lambda: sdpa(*leaves)),
        "forward and backward": (both(ours), both(sdpa)),
    }
    if unknown := set(names) - calls.keys():
        raise SystemExit(f"{', '.join(sorted(unknown))}: not one of the calls {', '.join(calls)}")
    return {name: taken(*calls[name]) for name in names or calls}


def taken(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float, float]:
    """µs of the long way, of a repeated call and of theirs, in turns; of a busy machine's samples the lowest
    says most."""
    from tilewise.plan.repeated import where

    samples: dict[str, list[float]] = {"long": [], "repeated": [], "theirs": []}
    for _ in range(ROUNDS):
        for name, found in samples.items():
            call, where.cpu = theirs if name == "theirs" else ours, name == "repeated"
            call(), call()  # the first after another finds cold caches
            began = time.perf_counter()
            for _ in range(TIMES):
                call()
            found.append((time.perf_counter() - began) / TIMES * 1e6)
    long, repeated, other = map(min, samples.values())
    return long, repeated, other


if __name__ == "__main__":
    main(sys.argv[1:])
