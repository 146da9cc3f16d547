"""What the rungs share: where kernels run, a problem, who is right, and the table. Begin with 01_naive.py.

Import it first: Triton decides when it is imported whether kernels run on a GPU or in its interpreter.
"""

import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

if missing := [name for name in ("torch", "triton", "numpy") if importlib.util.find_spec(name) is None]:
    sys.exit(f"ladder: {missing[0]} is not installed: pip install {' '.join(missing)}")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))  # of this clone, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "reference"))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton

from tilewise.ladder.counting import Counts, counted
from tilewise_reference import attention, masks, yardstick

INTERPRETED = triton.knobs.runtime.interpret  # each kernel as ordinary Python, on the CPU
DEVICE = "cpu" if INTERPRETED else "cuda"
SIZES = (128, 256)  # what is counted, twice as long the second time
TIMED = (1024, 4096, 16384)  # what is timed on a GPU
D = 64  # head_dim
LOG2E = 1.4426950408889634  # exp(x) = exp2(x · LOG2E)

__all__ = ["DEVICE", "LOG2E", "SIZES", "Counts", "D", "counted", "masks"]


def problem(*lengths: int) -> list[torch.Tensor]:
    """A matrix [length, D] of random numbers in fp16 for each length, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, D, generator=generator).to(DEVICE, torch.float16) for n in lengths]


def rung(number: int) -> ModuleType:
    """The file of this number, as a module."""
    (file,) = Path(__file__).parent.glob(f"{number:02}_*.py")
    if file.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        sys.modules[file.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[file.stem])
    return sys.modules[file.stem]


@functools.cache
def counts_of(number: int) -> list[Counts]:
    """What another rung has counted for the two sizes."""
    with contextlib.redirect_stdout(None):
        return rung(number).main()


# ---- Who is right


def judge(found: Sequence[torch.Tensor], given: Sequence[torch.Tensor], mask: Any = None) -> None:
    """Compare O, or O, dQ, dK and dV, with float64; given are Q, K, V, and dO where there are gradients. None
    may be much further off than PyTorch is in the same dtype: `tilewise_reference.yardstick` has the rule."""
    truth = answers(attention, [x.double() for x in given], mask)
    theirs = answers(lambda *x, mask: yardstick.pytorch_attention(*x, mask=mask)[0], given, mask)
    for name, ours, want, other in zip(("O", "dQ", "dK", "dV"), found, truth, theirs, strict=False):
        assert ours.shape == want.shape, f"{name} must be {tuple(want.shape)}, but is {tuple(ours.shape)}"
        allowed = yardstick.allowed_error(want, ours.dtype, yardstick.largest_difference(other, want))
        error = yardstick.difference(ours, want)
        assert (error <= allowed).all(), (
            f"{name} is off by up to {error.max():.1e}, {allowed.min():.1e} allowed"
        )
    assert len(found) == len(truth)


def answers(
    compute: Callable[..., torch.Tensor], given: Sequence[torch.Tensor], mask: Any
) -> list[torch.Tensor]:
    """O, and with dO its gradients by autograd; the rungs have no batch and no heads."""
    leaves = [x.detach()[None, None].requires_grad_(len(given) > 3) for x in given[:3]]
    out = compute(*leaves, mask=mask)
    grads = torch.autograd.grad(out, leaves, given[3][None, None].to(out.dtype)) if len(given) > 3 else ()
    return [x.detach()[0, 0] for x in (out, *grads)]


def count(way: Callable[..., Any], *lengths: int, mask: Any = None) -> Counts:
    """What a way to compute attention does, for a problem of these lengths; its answer is judged."""
    given = problem(*lengths)
    with counted() as counts:
        found = way(*given)
    judge(found if isinstance(found, tuple) else (found,), given, mask)
    return counts


# ---- What is shown

ROWS: dict[str, Callable[[Counts], int]] = {
    "memory: bytes, each once a kernel": lambda c: c.memory,
    "  of these, written": lambda c: c.written,
    "bytes that loads ask for": lambda c: c.asked,
    "FLOPs in products of matrices": lambda c: c.matmul,
    "other multiplications": lambda c: c.multiplications,
    "exponentials": lambda c: c.exponentials,
    "programs": lambda c: c.programs,
    "FLOPs of the busiest program": lambda c: c.longest,
}


def show(doc: str | None, columns: dict[str, Sequence[Counts]], size: str = f"N = {SIZES[1]}") -> None:
    """Print a table: a column for each way, with what it does at the larger of two sizes, and how memory grew
    from the smaller one."""
    print((doc or "").partition("\n")[0])
    print(f"Counted at {size}, D = {D}, in fp16:")
    print(f"{'':36}" + "".join(f"{name:>20}" for name in columns) + f"{'changed':>12}")
    small, large = zip(*columns.values(), strict=True)
    for name, value in ROWS.items():
        print_row(name, [value(each) for each in large])
        if value(large[0]) == large[0].memory:
            grown = (f"× {b.memory / a.memory:.1f}" for a, b in zip(small, large, strict=True))
            print(f"{'  twice as long, grows by':36}" + "".join(f"{each:>20}" for each in grown))


def print_row(name: str, values: Sequence[int]) -> None:
    """One line of the table; what is not known, as of PyTorch's programs, is 0."""
    texts = [f"{value:,}" if value else "-" for value in values]
    print(f"{name:36}" + "".join(f"{text:>20}" for text in texts) + f"{changed(values[0], values[-1]):>12}")


def changed(before: int, after: int) -> str:
    """By which factor."""
    if not before or before == after:
        return ""
    return f"× {after / before:.2f}" if after > before else f"÷ {before / after:.2f}"


# ---- How a rung runs


def climb(
    file: str,
    main: Callable[[], Any],
    ways: dict[str, Callable[..., Any]],
    lengths: Callable[[int], Sequence[int]] = lambda n: (n, n, n),
    masks_of: dict[str, Callable[[int], Any]] | None = None,
    is_for_hopper: bool = False,
) -> None:
    """Run a rung: what it counts and asserts, in the interpreter; on a GPU also the times of `ways`.

    ways: functions of q, k, v, and perhaps dO, that return O, or O, dQ, dK and dV. masks_of: what some of
    them mask, by length.
    """
    if INTERPRETED:
        main()
        if not torch.cuda.is_available():
            print("Times need a GPU: none here.\n")
        return
    if not torch.cuda.is_available():
        sys.exit(f"ladder: there is no GPU, and TRITON_INTERPRET={os.environ['TRITON_INTERPRET']}: unset it")
    subprocess.run([sys.executable, file], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
    if is_for_hopper and (torch.version.hip or torch.cuda.get_device_capability()[0] != 9):
        print("This rung's kernel is for Hopper GPUs (compute capability 9.0), and this is none: no times.\n")
        return
    for n in TIMED:
        given, times = problem(*lengths(n)), {}
        for name, way in ways.items():
            if n == TIMED[0]:
                found = way(*given)
                mask = masks_of[name](n) if masks_of and name in masks_of else None
                judge(found if isinstance(found, tuple) else (found,), given, mask)
            times[name] = triton.testing.do_bench(functools.partial(way, *given))
        print(f"N = {n:6}: " + "   ".join(f"{name} {time:.3f} ms" for name, time in times.items()))
    print()
