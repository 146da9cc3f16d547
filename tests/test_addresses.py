"""Where rows are: offsets beyond 2³¹ elements, and more than 65,535 heads.

Offsets that overflow 32 bits point anywhere, and a wrong address ends the process. So these cases run in a
child process: this file is also its program. A tensor there spans many gigabytes of addresses, of which a few
pages are ever touched: memory that nobody writes costs nothing.
"""

import contextlib
import functools
import json
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton

import tilewise
import tilewise_reference
from tilewise.kernels import backward, forward, parameters, prepare
from tilewise.kernels.parameters import parameter_gradient
from tilewise.parts.scores.score import Parameter
from tilewise.plan.bind import bind
from tilewise.plan.request import make_request

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STRIDE = (1 << 30) + 64  # fits into 32 bits; twice this does not
TILE = tilewise.tiles.Tile(16, 16)
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which the module mmap does not name in every Python


def untouched(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take up memory only where they are touched (on a GPU: memory as it comes)."""
    if DEVICE.type == "cuda":
        return torch.empty(count, dtype=dtype, device=DEVICE)
    size = count * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8).view(dtype)


def far_apart(near: torch.Tensor, axis: int) -> torch.Tensor:
    """The same numbers, with the three neighbours along `axis` STRIDE elements apart."""
    assert near.shape[axis] == 3
    others = [size for i, size in enumerate(near.shape) if i != axis]
    strides = [math.prod(others[i:]) for i in range(1, len(others) + 1)]
    strides.insert(axis, STRIDE)
    far = untouched(2 * STRIDE + near.numel(), near.dtype).as_strided(near.shape, strides)
    return far.copy_(near)


def problem(axis: int | None = None) -> dict[str, torch.Tensor]:
    """q, k, v, of three batches, heads, rows or dims along the axis in question and few along the others."""
    batch, heads, length, dim = (3 if axis == i else size for i, size in enumerate((1, 1, 3, 4)))
    made = {name: torch.randn(batch, heads, length, dim, device=DEVICE) for name in "qkv"}
    return {name: tensor.half() for name, tensor in made.items()}


def small(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with tilewise.tiles.use(TILE):
        return tilewise.attention(*arguments, **options, return_lse=True, impl="portable")


def assert_same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), f"{a.tolist()} instead of {b.tolist()}"
        assert not b.isnan().any() and b.any(), "a result that shows nothing"


def far_input(name: str, axis: int) -> None:
    tensors = problem(axis)
    far = tensors | {name: far_apart(tensors[name], axis)}
    assert_same(small(**far), small(**tensors))


def far_output(axis: int) -> None:
    """The result is written where a far output would have it."""
    tensors = problem(axis)
    out, lse = small(**tensors)
    place = far_apart(torch.zeros_like(out), axis)
    with mock.patch("tilewise.plan.passes.empty_in_order_of", return_value=place):
        far_out, far_lse = small(**tensors)
    assert far_out.stride(axis) == STRIDE
    assert_same((far_out, far_lse), (out, lse))


def far_argument(make: Callable[[Callable], dict[str, Any]], axis: int) -> None:
    """An argument whose tensor lies far apart; make(place) builds it from the near tensor that it places."""
    tensors = problem(axis)
    torch.manual_seed(1)
    near = make(lambda tensor, _: tensor)
    torch.manual_seed(1)
    far = make(lambda tensor, along: far_apart(tensor, along))
    assert_same(small(**tensors, **far), small(**tensors, **near))


def sizes(axis: int) -> tuple[int, int, int, int]:
    """[batch, heads, q_len, kv_len] of problem(axis): lengths are 3, so axis 3 is the keys."""
    return (3 if axis == 0 else 1, 3 if axis == 1 else 1, 3, 3)


def bias(axis: int, place: Callable) -> dict[str, Any]:
    return dict(bias=place(torch.randn(sizes(axis), device=DEVICE).half(), axis))


def dense(axis: int, place: Callable) -> dict[str, Any]:
    kept = (torch.arange(math.prod(sizes(axis)), device=DEVICE) % 4 != 1).view(sizes(axis))
    return dict(mask=place(kept, axis))


def rows(axis: int, place: Callable) -> dict[str, Any]:
    start = torch.arange(math.prod(sizes(axis)[:3]), device=DEVICE, dtype=torch.int32) % 3
    return dict(mask=tilewise.Intervals(*(place(t.view(sizes(axis)[:3]), axis) for t in (start, start + 1))))


def documents(axis: int, place: Callable) -> dict[str, Any]:
    """Axis 0 of the ids is the batch, axis 1 the length."""
    ids = torch.tensor([[2, 5, 2], [7, 7, 1], [4, 6, 6]], device=DEVICE, dtype=torch.int32)
    ids = ids if axis == 0 else ids[:1]
    return dict(mask=tilewise.Documents(place(ids, axis)))


def slopes(axis: int, place: Callable) -> dict[str, Any]:
    return dict(score=tilewise.ALiBi(place(torch.rand(sizes(axis)[:2], device=DEVICE).half(), axis)))


def lengths(mask: Callable, axis: int, place: Callable) -> dict[str, Any]:
    return dict(mask=mask(place(torch.tensor([3, 1, 2], device=DEVICE, dtype=torch.int32), 0)))


def sink(axis: int, place: Callable) -> dict[str, Any]:
    return dict(sink=place(torch.randn(3, device=DEVICE).half(), 0))


# ---- Backward


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, places: dict[int, Any] | None = None,
    **also: torch.Tensor,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The gradients of q, k, v and what else is given, from out and lse together. places: where those of q, k
    or v are written, by number."""
    leaves = {name: x.detach().requires_grad_() for name, x in dict(q=q, k=k, v=v, **also).items()}
    out, lse = small(**leaves)
    make, made = tilewise.plan.passes.empty_in_order_of, []

    def placed(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        made.append((places or {}).get(len(made), make(x, dim)))
        return made[-1]

    with mock.patch("tilewise.plan.passes.empty_in_order_of", placed), tilewise.tiles.use(TILE):
        return torch.autograd.grad((out, lse), list(leaves.values()), (do, torch.ones_like(lse)))


def far_in_backward(name: str, axis: int) -> None:
    """q, k, v, a bias or dO lies far apart."""
    tensors = problem(axis) | {
        "do": problem(axis)["q"],
        "bias": torch.randn(sizes(axis), device=DEVICE).half(),
    }
    far = tensors | {name: far_apart(tensors[name], axis)}
    assert_same(gradients(**far), gradients(**tensors))


def far_gradient(number: int, axis: int) -> None:
    """The gradient of q, k or v is written far apart."""
    tensors = problem(axis) | {"do": problem(axis)["q"]}
    want = gradients(**tensors)
    place = far_apart(torch.zeros_like(want[number]), axis)
    got = gradients(**tensors, places={number: place})
    assert got[number].stride(axis) == STRIDE
    assert_same(got, want)


# ---- Large grids


KERNELS = (
    (forward, "forward_kernel"),
    (prepare, "prepare_kernel"),
    (backward, "dkv_kernel"),
    (backward, "dq_kernel"),
    (parameters, "parameter_kernel"),
)


class LastPrograms:
    """A kernel whose launches run the whole grid on a GPU; in the interpreter, where that takes minutes, its
    last programs."""

    def __init__(self, kernel: Any, count: int) -> None:
        self.kernel, self.count = kernel, count

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert len(grid) == 1, "only the first dimension of a grid may pass 65,535"
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], **arguments: Any) -> None:
        if DEVICE.type == "cuda":
            self.kernel[grid](**arguments)
            return
        builder = triton.runtime.interpreter.interpreter_builder
        program_id, skipped = type(builder).create_get_program_id, max(0, grid[0] - self.count)

        def shifted(builder: Any, axis: int) -> Any:
            handle = program_id(builder, axis)
            handle.data = handle.data + skipped * (axis == 0)
            return handle

        with mock.patch.object(type(builder), "create_get_program_id", shifted):
            self.kernel[(grid[0] - skipped,)](**arguments)


@contextlib.contextmanager
def last_programs(count: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, name in KERNELS:
            shrunk = LastPrograms(getattr(module, name), count)
            stack.enter_context(mock.patch.object(module, name, shrunk))
        yield


def many_heads() -> None:
    """70,001 batch × heads, the last of which differ from all others; forward and backward."""
    batch, dim = 70_001, 4
    names = ("q", "k", "v", "do")
    tensors = {name: untouched(batch * dim, torch.float16).view(batch, 1, 1, dim).zero_() for name in names}
    for tensor in tensors.values():
        tensor[-2:] = torch.randn(2, 1, 1, dim, device=DEVICE).half()
    lens = torch.ones(batch, device=DEVICE, dtype=torch.int32)
    lens[-2] = 0
    do = tensors.pop("do")
    bias = torch.zeros(batch, 1, 1, 1, device=DEVICE, requires_grad=True)
    for tensor in tensors.values():
        tensor.requires_grad_()
    with last_programs(2):
        out, lse = small(**tensors, bias=bias, mask=tilewise.Padding(lens))
        leaves = (*tensors.values(), bias)
        dq, dk, dv, dbias = torch.autograd.grad((out, lse), leaves, (do, torch.ones_like(lse)))
    q, k, v = (tensor.detach() for tensor in tensors.values())
    assert not out[-2].any() and torch.equal(out[-1], v[-1])
    # One key: P = 1, so dS is lse's gradient, 1. The scale is 1/2.
    wanted = {"dq": k[-1] / 2, "dk": q[-1] / 2, "dv": do[-1], "dbias": torch.ones_like(dbias[-1])}
    for (name, want), got in zip(wanted.items(), (dq, dk, dv, dbias), strict=True):
        assert torch.equal(got[-1], want) and want.any(), (
            f"{name}: {got[-1].tolist()} instead of {want.tolist()}"
        )
        assert not got[-2].any(), f"{name} of a row without a key"


def many_rows() -> None:
    """lse, statistics and delta of more than 2³¹ rows, all of them the same row of q; forward and
    backward."""
    batch, q_len, dim = 70_000, 1 << 15, 4
    one = {name: torch.randn(1, 1, 1, dim, device=DEVICE).half() for name in "qkv"}
    out, lse = small(**one)
    tensors = {"q": one["q"].expand(batch, 1, q_len, dim)}
    tensors |= {name: one[name].expand(batch, 1, 1, dim) for name in "kv"}
    everywhere = out.clone().zero_()
    lse_far = untouched(batch * q_len, torch.float32).view(batch, 1, q_len)
    call = bind(make_request(**tensors, impl="portable"))
    statistics = untouched(2 * batch * q_len, torch.float32).view(2, batch, 1, q_len)
    with last_programs(2):
        forward.launch_forward(call, everywhere.expand(batch, 1, q_len, dim), lse_far, statistics, TILE)
    assert torch.equal(everywhere, out)
    assert (lse_far[-1, 0, :32] == lse[0, 0, 0]).all() and lse[0, 0, 0] != 0
    # One key: the largest score, before the scale of 1/2, is the only one, and its exponential sums to 1.
    assert (statistics[0, -1, 0, :32] * 0.5 == lse[0, 0, 0]).all() and not statistics[1, -1, 0, :32].any()

    # One key: P = 1 and dP = dO · O, so that delta is dP - dLSE, and dS is dLSE, 1.
    do = torch.randn_like(out)
    dlse_far, delta_far = (untouched(batch * q_len, torch.float32).view(batch, 1, q_len) for _ in range(2))
    ranges_far = untouched(batch * q_len // 16 * 4, torch.int32).view(batch, 1, q_len // 16, 4)
    here = slice(None) if DEVICE.type == "cuda" else slice(-1, None)  # the rest is not touched
    statistics[0, here], statistics[1, here], dlse_far[here] = lse[0, 0, 0] * 2, 0.0, 1.0
    shape = (batch, 1, q_len, dim)
    rows = statistics.unbind(0)
    call = prepare.BackwardCall(
        call, out.expand(shape), *rows, do.expand(shape), dlse_far, delta_far, ranges_far, 16
    )
    grid, arguments = prepare.prepare_launch(call)
    dq = out.clone().zero_()
    with last_programs(2):
        prepare.prepare_kernel[grid](**arguments)
        delta = delta_far[-1, 0, 0].item()
        assert (delta_far[-1, 0, :32] == delta).all() and delta != 0
        assert ranges_far[-1, 0, :2].tolist() == [[0, 1, 0, 1]] * 2
        delta_far[here] = delta
        backward.launch_dq(call, dq.expand(shape), TILE)
    # delta is a sum of 4 products of which one unit is lost to each, and dS is what it leaves of dP.
    torch.testing.assert_close(dq, one["k"] / 2, rtol=2**-10, atol=2**-16)


def many_pairs() -> None:
    """The gradient of a bias of more than 2³¹ pairs: its last tile."""
    q_len, kv_len, dim = 65_552, 32_784, 4
    one = {name: torch.randn(1, 1, 1, dim, device=DEVICE).half() for name in "qkv"}
    lengths = {"q": q_len, "k": kv_len, "v": kv_len}
    tensors = {name: x.expand(1, 1, lengths[name], dim) for name, x in one.items()}
    bias = torch.zeros(1, 1, 1, 1, device=DEVICE).half().expand(1, 1, q_len, kv_len)
    # All keys alike: P = 1 / kv_len, out = v, and with dLSE = 1 dS is P.
    score = (one["q"].float() * one["k"].float()).sum() / 2
    row_max = score.expand(1, 1, q_len).contiguous()  # in natural units, as there is a bias
    sum_log2 = torch.full_like(row_max, math.log2(kv_len))
    do = torch.randn_like(one["v"])
    delta = ((do.float() * one["v"].float()).sum() - 1).expand(1, 1, q_len).contiguous()
    ranges = torch.tensor([0, kv_len, 0, 0], dtype=torch.int32, device=DEVICE).repeat(1, 1, q_len // 16, 1)
    call = bind(make_request(**tensors, bias=bias, impl="portable"))
    rows = [x.expand(1, 1, q_len, dim) for x in (one["v"], do)]
    call = prepare.BackwardCall(call, rows[0], row_max, sum_log2, rows[1], None, delta, ranges, 16)
    with last_programs(1):
        grad = parameter_gradient(call, 1, Parameter(None, tuple(bias.shape)), bias, TILE)
    got = grad[0, 0, -16:, -16:].float()
    # Subnormal halves are 2⁻²⁴ apart.
    assert ((got - 1 / kv_len).abs() <= 2**-24).all(), got.tolist()


NAMES = ("batch", "head", "row", "dim or key")
CASES: dict[str, Callable[[], None]] = {
    f"{tensor} × {NAMES[axis]}": functools.partial(far_input, tensor, axis)
    for tensor in "qkv"
    for axis in range(4)
}
CASES |= {f"out × {NAMES[axis]}": functools.partial(far_output, axis) for axis in range(4)}
CASES |= {
    f"{make.__name__} × {NAMES[axis]}": functools.partial(far_argument, functools.partial(make, axis), axis)
    for make, axes in ((bias, 4), (dense, 4), (rows, 3), (slopes, 2))
    for axis in range(axes)
}
CASES |= {
    f"backward of {tensor} × {NAMES[axis]}": functools.partial(far_in_backward, tensor, axis)
    for tensor in ("q", "k", "v", "do", "bias")
    for axis in range(4)
}
CASES |= {
    f"d{tensor} × {NAMES[axis]}": functools.partial(far_gradient, number, axis)
    for number, tensor in enumerate("qkv")
    for axis in range(4)
}
CASES |= {
    "documents × batch": lambda: far_argument(functools.partial(documents, 0), 0),
    "documents × row": lambda: far_argument(functools.partial(documents, 1), 2),
    "padding × batch": lambda: far_argument(functools.partial(lengths, tilewise.Padding, 0), 0),
    "prefix × batch": lambda: far_argument(functools.partial(lengths, tilewise.Prefix, 0), 0),
    "sink × head": lambda: far_argument(functools.partial(sink, 1), 1),
    "more than 65,535 heads": many_heads,
    "more than 2³¹ rows": many_rows,
    "more than 2³¹ pairs": many_pairs,
}


@pytest.fixture(scope="module")
def child() -> dict[str, str]:
    """What became of each case in the child process: "" where it passed."""
    roots = [Path(module.__file__).parents[1] for module in (tilewise, tilewise_reference)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots)), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-u", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    results: dict[str, str] = {}
    for line in done.stdout.splitlines():
        results |= json.loads(line)
    ending = f"the child ended with {done.returncode} before this case was done: {done.stderr[-2000:]}"
    return {name: ending for name in CASES} | results


@pytest.mark.parametrize("name", CASES)
def test_offsets_beyond_32_bits(name, child):
    assert child[name] == ""


def run_cases() -> None:
    for name, case in CASES.items():
        torch.manual_seed(0)
        try:
            case()
            result = ""
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        print(json.dumps({name: result}), flush=True)


if __name__ == "__main__":
    from harness.quick import quick_interpreter  # beside this file, where Python looks first

    with quick_interpreter():
        run_cases()
