"""Calls as the replay sees them: the same shapes, strides and dtypes, other numbers at other addresses."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from tilewise.api import answer
from tilewise.kernels.forward import forward_kernel
from tilewise.kernels.launch import ALIGNMENT, Launched, told
from tilewise.parts.fp8 import FP8
from tilewise.plan import repeated
from tilewise.plan.request import Request, request_of
from tilewise.plan.tape import Asked, Results, record
from tilewise.pytorch import append, replayed
from tilewise.pytorch.encoding import decode, encode

from .features import build

Tensor = torch.Tensor


@contextlib.contextmanager
def replays(device: torch.device) -> Iterator[dict[Any, repeated.Repeated]]:
    """Calls in the block are repeated, in the interpreter too; none is known before, or after. Yields those
    that are known."""
    with mock.patch.dict(repeated.known, clear=True), repeating(device.type):
        yield repeated.known


@contextlib.contextmanager
def repeating(*types: str) -> Iterator[None]:
    """Calls of tensors on these types of devices are repeated."""
    with mock.patch.multiple(repeated.Where, cuda="cuda" in types, cpu="cpu" in types):
        yield


@contextlib.contextmanager
def no_long_way() -> Iterator[None]:
    """Whatever is not a replay fails."""
    reached = mock.Mock(side_effect=AssertionError("the long way was gone"))
    with contextlib.ExitStack() as stack:
        for name in ("run_forward", "run_backward"):
            stack.enter_context(mock.patch.object(replayed, name, reached))
        for name in ("launch_append", "launch_turn"):
            stack.enter_context(mock.patch.object(append, name, reached))
        for place in ("dispatch", "autograd"):
            stack.enter_context(mock.patch(f"tilewise.pytorch.{place}.run_forward", reached))
        yield


def drawn(device: torch.device, *features: Any, seed: object = 0, **sizes: int) -> Request:
    """The request of a problem with these features."""
    sizes = dict(q_len=5, kv_len=7) | sizes
    problem = build(device, random.Random(str((features, seed))), features, **sizes)
    return request_of(*problem.tensors(), **problem.keywords(), impl="portable")


def elsewhere(x: Tensor, factor: float, trained: bool = False) -> Tensor:
    """x in memory of its own, its floating point numbers times `factor`."""
    held = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage().clone())
    if x.dtype.is_floating_point:
        held.copy_(held.float() * factor if x.dtype == FP8 else held * factor)
    view = held.as_strided(x.shape, x.stride(), x.storage_offset())
    return view.requires_grad_(trained and x.dtype.is_floating_point)


def like(request: Request, factor: float, trained: bool = False) -> Request:
    """A request that looks the same."""
    encoded = encode(request)
    q, k, v, *others = (
        elsewhere(x, factor, trained) for x in (request.q, request.k, request.v, *encoded.tensors)
    )
    return decode(q, k, v, encoded._replace(tensors=others))


def results(request: Request) -> list[Tensor]:
    """out, lse, and all gradients where there are some."""
    out, lse = answer(request, return_lse=True)
    leaves = [x for x in (request.q, request.k, request.v) if x.requires_grad]
    leaves += [x for _, x in request.other_tensors if x.requires_grad]
    if not leaves:
        return [out, lse]
    # A gradient of lse as well, where it is a number.
    total = (out.float() * 0.5).sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
    return [out, lse, *torch.autograd.grad(total, leaves)]


def same(some: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """Assert the same bits in the same layout."""
    for one, other in zip(some, others, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def qkv(device: torch.device, trained: bool = False) -> list[Tensor]:
    return [torch.randn(1, 2, 5, 8, device=device, requires_grad=trained) for _ in range(3)]


def attend(q: Any, k: Any, v: Any, **given: Any) -> Any:
    return tilewise.attention(q, k, v, impl="portable", **given)


def long_way(*tensors: Tensor, **given: Any) -> Any:
    """The same, where nothing is repeated."""
    with repeating():
        return attend(*tensors, **given)


class Watching(TorchDispatchMode):
    """A mode that looks at what PyTorch does, and changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = True
        return func(*args, **(kwargs or {}))


def alive(*tensors: Tensor) -> Callable[[], int]:
    """What counts how many tensors are left, of any form, in the memory of these."""
    starts = {x.untyped_storage().data_ptr() for x in tensors}

    def count() -> int:
        gc.collect()
        found = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
        # What a function transform of another test left behind has no storage.
        found = [x for x in found if not torch._C._functorch.is_functorch_wrapped_tensor(x)]
        return sum(x.untyped_storage().data_ptr() in starts for x in found)

    return count


class Heard:
    """The launches of a block, which do nothing; what each was given, but for tensors, which are named by
    dtype and by whether an aligned kernel will do."""

    def __init__(self) -> None:
        self.launches: list[Any] = []
        self.obstacle: str | None = None

    def launched(self, launch: Launched) -> None:
        given = (launch.args, tuple(launch.arguments.items()))
        self.launches.append((launch.kernel.__name__, launch.grid, described(given)))

    @contextlib.contextmanager
    def unheard(self) -> Iterator[None]:
        yield


def described(thing: Any) -> Any:
    """1, 1.0 and True are not one, and a function is itself."""
    if isinstance(thing, Tensor):
        return "tensor", thing.dtype, thing.data_ptr() % ALIGNMENT == 0
    if isinstance(thing, (tuple, list)):
        return type(thing), [described(each) for each in thing]
    return type(thing), repr(thing) if isinstance(thing, float) else thing


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Kernels do nothing when they are launched."""
    kind = type(forward_kernel)
    with mock.patch.object(kind, "run", lambda *_, **__: None):
        yield


def launches_of(request: Request) -> list[Any]:
    """What is launched for a request, and for its gradients where it has some."""
    heard = Heard()
    with repeating(), nothing_runs(), told(heard):
        results(request)
    return heard.launches


def work_of(step: Callable[..., Results], inputs: Sequence[Tensor]) -> list[Any]:
    """What a step does, the long way: its launches, the tensors it makes and looks at, its operators."""
    with repeating(), nothing_runs():
        tape = record(step, inputs)[1]
    heard, found = Heard(), []
    for each in tape.steps:
        if isinstance(each, Launched):
            heard.launched(each)
            found.append(heard.launches[-1])
        elif isinstance(each, Asked):
            found.append((each.operator, described((each.args, tuple(each.arguments.items())))))
        else:
            x = each.value.tensor
            found.append((type(each), x.shape, x.stride(), x.dtype, each.value.distance))
    return found
