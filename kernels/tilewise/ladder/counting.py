"""What does a call really do? Bytes and FLOPs, counted while it runs on the CPU.

    with counted() as counts:
        out = attention(q, k, v)
    counts.memory, counts.matmul, ...

Kernels are counted in Triton's interpreter and in the Gluon emulator, load by load and product by product:
only elements that their mask lets through. PyTorch's operations are counted as they are dispatched: each
reads its inputs and writes its outputs, views do neither.

There are two ways to count bytes, and both matter. `asked` is what the loads of a kernel ask for; most of it
is answered by a cache. `read` and `written` count each byte once in a launch, as if the cache held all: so
much must come from memory and go there, whatever the chip.

An exponential counts as one multiplication more than one in base 2: GPUs have an instruction for 2^x, and
Triton computes exp(x) as 2^(x · log2 e) (`ExpOpConversionApprox` in its sources).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from ..gluon_emulator import copies
from ..gluon_emulator.matmul import Product

NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "detach"}  # of PyTorch's
# Multiplications and exponentials for each number of the output; a softmax divides too.
OPERATIONS = {"mul": (1, 0), "mul_": (1, 0), "div": (1, 0), "div_": (1, 0), "exp": (1, 1), "_softmax": (2, 1)}


@dataclass
class Counts:
    asked: int = 0  # bytes that loads ask for, however often
    read: int = 0  # bytes, each once in a launch
    written: int = 0  # bytes, each once in a launch
    matmul: int = 0  # FLOPs of products of matrices, two for a multiplication and its addition
    multiplications: int = 0  # of single numbers, divisions included
    exponentials: int = 0
    programs: int = 0  # of all launches
    longest: int = 0  # FLOPs in products of the program that has the most
    products: int = 0  # how many products of tiles
    selects: int = 0  # how many tiles went through `tl.where`
    in_flight: list[int] = field(default_factory=list)  # copies under way at each product, in the emulator
    most_in_flight: int = 0  # at once

    @property
    def memory(self) -> int:
        """Bytes that memory must give and take."""
        return self.read + self.written


@contextmanager
def counted() -> Iterator[Counts]:
    """Inside, kernels and PyTorch's operations are counted.

    Raises:
        RuntimeError: Triton's interpreter is off, so what kernels do cannot be seen.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("kernels can be counted only with TRITON_INTERPRET=1 in the environment")
    counter = Counter()
    with ExitStack() as stack:
        for owner, name, note in (
            (InterpreterBuilder, "set_grid_dim", counter.on_launch),
            (InterpreterBuilder, "set_grid_idx", counter.on_program),
            (InterpreterBuilder, "create_masked_load", counter.on_load),
            (InterpreterBuilder, "create_masked_store", counter.on_store),
            (InterpreterBuilder, "create_dot", counter.on_dot),
            (InterpreterBuilder, "create_fmul", counter.on_multiplication),
            (InterpreterBuilder, "create_fdiv", counter.on_multiplication),
            (InterpreterBuilder, "create_exp", counter.on_exp),
            (InterpreterBuilder, "create_exp2", counter.on_exp2),
            (InterpreterBuilder, "create_select", counter.on_select),
            (copies.Load, "__init__", counter.on_copy),
            (copies.Load, "happen", counter.on_copy_in),
            (copies.Store, "happen", counter.on_copy_out),
            (Product, "complete", counter.on_wgmma),
        ):
            stack.enter_context(mock.patch.object(owner, name, noted(getattr(owner, name), note)))
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", counter.launching(GridExecutor)))
        stack.enter_context(Operations(counter))
        yield counter.counts
        counter.end_launch()


def noted(method: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    """The method, after which `note` is told its result and its arguments."""

    def run(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        note(result, *args, **kwargs)
        return result

    return run


class Counter:
    """What the interpreter, the emulator and PyTorch report, added up."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.launches = False  # a kernel is under way
        self._program = 0  # FLOPs of the products of the one that runs
        self._read: dict[int, list[Any]] = {}  # by the size of an element: addresses of this launch
        self._written: dict[int, list[Any]] = {}

    # ---- Launches and programs

    def launching(self, executor: Any) -> Callable[..., Any]:
        """A launch during which PyTorch's operations are the interpreter's own: it hands tensors over."""
        launch = executor.__call__

        def run(*args: Any, **kwargs: Any) -> Any:
            self.launches = True
            try:
                return launch(*args, **kwargs)
            finally:
                self.launches = False

        return run

    def on_launch(self, _result: Any, _builder: Any, *grid: int) -> None:
        self.end_launch()
        self.counts.programs += grid[0] * grid[1] * grid[2]

    def on_program(self, *_: Any) -> None:
        self._program = 0

    def end_launch(self) -> None:
        """A byte that the next launch touches counts again."""
        self.counts.read += distinct(self._read)
        self.counts.written += distinct(self._written)
        self._read, self._written = {}, {}

    # ---- Memory

    def on_load(self, result: Any, _builder: Any, pointers: Any, mask: Any, *_: Any, **__: Any) -> None:
        self._note_read(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)], result.data.itemsize)

    def on_store(
        self, _result: Any, _builder: Any, pointers: Any, value: Any, mask: Any, *_: Any, **__: Any
    ) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        self._written.setdefault(value.data.itemsize, []).append(addresses)

    def on_copy(self, _result: Any, _load: Any, memory: Any, *_: Any) -> None:
        self.counts.most_in_flight = max(self.counts.most_in_flight, len(memory.filling))

    def on_copy_in(self, _result: Any, load: Any) -> None:
        source = load._source.data[load._source.window(load._corner)[0]]
        self._note_read(addresses_of(source), source.itemsize)

    def on_copy_out(self, _result: Any, store: Any) -> None:
        target = store._to.data[store._to.window(store._corner)[0]]
        self._written.setdefault(target.itemsize, []).append(addresses_of(target))

    def _note_read(self, addresses: Any, size: int) -> None:
        self.counts.asked += addresses.size * size
        self._read.setdefault(size, []).append(addresses)

    # ---- Arithmetic

    def on_dot(self, result: Any, _builder: Any, a: Any, *_: Any, **__: Any) -> None:
        self._note_product(result.data.size, a.data.shape[-1])

    def on_wgmma(self, result: Any, product: Any) -> None:
        self._note_product(result.handle.data.size, int(product._a.shape[1]))
        self.counts.in_flight.append(len(product._memory.roles.copies))

    def _note_product(self, size: int, inner: int) -> None:
        flops = 2 * size * inner
        self._program += flops
        self.counts.matmul += flops
        self.counts.products += 1
        self.counts.longest = max(self.counts.longest, self._program)

    def on_multiplication(self, result: Any, *_: Any) -> None:
        self.counts.multiplications += result.data.size

    def on_exp2(self, result: Any, *_: Any) -> None:
        self.counts.exponentials += result.data.size

    def on_exp(self, result: Any, *_: Any) -> None:
        self.counts.exponentials += result.data.size
        self.counts.multiplications += result.data.size

    def on_select(self, result: Any, *_: Any) -> None:
        self.counts.selects += result.data.ndim == 2


class Operations(TorchDispatchMode):
    """PyTorch's operations, as they are dispatched."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter, self._counts = counter, counter.counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in NO_WORK or self._counter.launches:
            return out
        outputs = [x for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x)]
        inputs = {id(x): x for x in (*args, *kwargs.values()) if torch.is_tensor(x)}.values()
        self._counts.asked += sum(x.nbytes for x in inputs)
        self._counts.read += sum(x.nbytes for x in inputs)
        self._counts.written += sum(x.nbytes for x in outputs)
        multiplications, exponentials = OPERATIONS.get(name, (0, 0))
        self._counts.multiplications += multiplications * sum(x.numel() for x in outputs)
        self._counts.exponentials += exponentials * sum(x.numel() for x in outputs)
        if func.overloadpacket in flop_registry:
            self._counts.matmul += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            self._counts.products += 1
        return out


def addresses_of(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of every element, in bytes."""
    start = data.__array_interface__["data"][0]
    offsets = [
        (np.arange(size) * step).reshape([-1 if i == axis else 1 for i in range(data.ndim)])
        for axis, (size, step) in enumerate(zip(data.shape, data.strides, strict=True))
    ]
    return (start + sum(offsets)).reshape(-1) if data.size else np.empty(0, np.int64)


def distinct(addresses: dict[int, list[Any]]) -> int:
    """How many bytes lie at these addresses, each once."""
    return sum(
        size * len(np.unique(np.concatenate([*map(np.ravel, each)]))) for size, each in addresses.items()
    )
