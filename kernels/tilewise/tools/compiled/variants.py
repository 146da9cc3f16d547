"""Which launches are worth compiling? The plain calls, the calls of a named case, each as a Variant.

Tensors are on the device "meta": nothing is stored, and a compiler looks at no numbers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import triton

from tilewise_reference.cases import find_case

from ...kernels.tile import HopperTile, Tile
from ...parts.fp8 import FP8
from ...parts.masks.causal import Causal
from ...parts.scores.relative_position import RelativePosition
from ...parts.shape import Shape
from ...parts.stats import Stats
from ...plan import passes, statistics, tiles
from ...plan.derivatives import run_second, run_tangent
from ...plan.passes import parameter_slots, run_backward, run_forward
from ...plan.request import Request, request_of
from ...plan.rules import hopper as hopper_rules
from ...plan.tangent_tiles import arch_tangent_tile
from ..inputs import case_inputs, fp8_shapes
from .compiler import HOPPER_BACKWARD, ONE_WALK, Variant

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp8": FP8}
MASKS = {"causal": Causal(), "full": None}
SECOND = ("tangent_kernel", "sums_kernel", "rows_kernel", "keys_kernel", "second_parameter_kernel")
KERNELS = ("forward", "hopper", "dkv", "dq", "dqkv", "hopper_backward")
LENGTH, Q_HEADS, KV_HEADS = 512, 4, 2  # no kernel is another for longer sequences or other heads


def target_name() -> str:
    """The target that this process compiles for, by the name it has in the table of tiles."""
    arch = triton.runtime.driver.active.get_current_target().arch
    return arch if isinstance(arch, str) else f"sm_{arch}"


@contextlib.contextmanager
def target_tiles() -> Iterator[None]:
    """Every pass of a call gets the tile that it would get on the target, or that `tiles.use` gives."""

    def choose(q: torch.Tensor, shape: Shape, work: Any) -> Tile:
        return tiles.arch_choice(target_name(), tiles.row_bytes(q, work), shape, work)[0]

    def choose_tangent(q: torch.Tensor, shape: Shape, work: Any) -> Tile:
        return arch_tangent_tile(target_name(), q.element_size(), shape, work)

    with (
        mock.patch.object(passes, "choose_tile", choose),
        mock.patch.object(statistics, "choose_tile", choose),
        mock.patch("tilewise.plan.derivatives.choose_tangent_tile", choose_tangent),
    ):
        yield


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Inside, PyTorch's float32 matmul precision is this one."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, return_lse: bool = False, **given: Any) -> None:
    """What `attention` does on a GPU once a call has passed the checks."""
    with target_tiles():
        run_forward(request_of(q, k, v, **given), return_lse)


def launch_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, walks: int = 2, **given: Any) -> None:
    """What its backward does, with gradients of everything that has one, in so many walks."""
    launch_gradients(request_of(q, k, v, **given), walks)


def launch_gradients(request: Request, walks: int = 2, dtype: torch.dtype | None = None) -> None:
    """The same of a request, its gradients in their own dtypes or in this one."""
    q = request.q
    out = q.new_empty(*q.shape[:3], request.shape.value_dim)
    dlse = q.new_empty(q.shape[:3], dtype=torch.float32)
    slots = {slot for slot, _, _ in parameter_slots(request)}
    needs = [True] * 3 + [slot in slots for slot in range(len(request.other_tensors))]
    with target_tiles(), tiles.use_walks(walks):
        run_backward(request, out, dlse.expand(2, *dlse.shape), torch.empty_like(out), dlse, needs, dtype)


def launch_statistics(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stats: Stats, backward: bool, **given: Any
) -> None:
    """What a call with `return_stats` does, with a backward through all that has one, or without."""
    request = request_of(q, k, v, **given)
    with target_tiles():
        out, lse, found, kept = statistics.forward(request, stats, backward)
        if backward:
            arrived = statistics.Arrived(out, lse, found.max_logit, found.entropy, found.key_mass)
            slots = {slot for slot, _, _ in parameter_slots(request)}
            needs = [True] * 3 + [slot in slots for slot in range(len(request.other_tensors))]
            statistics.backward(request, stats, kept, arrived, needs)


def launch_second(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> None:
    """What a derivative of the backward does, along tangents of everything that has a gradient."""
    request = request_of(q, k, v, **given)
    out = q.new_empty(*q.shape[:3], request.shape.value_dim)
    dlse = q.new_empty(q.shape[:3], dtype=torch.float32)
    statistics, others = dlse.expand(2, *dlse.shape), [x for _, x in request.other_tensors]
    slots = {slot for slot, _, _ in parameter_slots(request)}
    needs = [True] * 3 + [slot in slots for slot in range(len(others))]
    tangents = [x if needed else None for x, needed in zip((q, k, v, *others), needs, strict=True)]
    with target_tiles():
        run_tangent(request, statistics, tangents)
        run_second(request, statistics, out, dlse, tangents, dlse, needs)


def plain_inputs(
    dtype: str, dim: int, q_len: int = LENGTH
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of a call that asks for nothing special; dtype: a key of DTYPES."""
    q = torch.empty(1, Q_HEADS, q_len, dim, dtype=DTYPES[dtype], device="meta")
    k = torch.empty(1, KV_HEADS, LENGTH, dim, dtype=DTYPES[dtype], device="meta")
    return q, k, torch.empty_like(k)


def plain_call(dtype: str, dim: int, q_len: int = LENGTH) -> dict[str, Any]:
    """The arguments of that call: in fp8 what `quantize` makes of bf16, a scale for each head."""
    inputs = (
        fp8_shapes(*plain_inputs("bf16", dim, q_len)) if dtype == "fp8" else plain_inputs(dtype, dim, q_len)
    )
    return dict(zip(("q", "k", "v", "scales"), inputs, strict=False))


def forward_variant(
    dtype: str, dim: int, mask: str, q_len: int = LENGTH, precision: str = "highest"
) -> Variant:
    """A tile of the table under the plainest call; with few queries, the tile cut down for them.

    mask: a key of MASKS. precision: PyTorch's float32 matmul precision.
    """

    def run() -> None:
        with float32_precision(precision):
            launch(**plain_call(dtype, dim, q_len), return_lse=True, mask=MASKS[mask])

    tf32 = " tf32" if precision == "high" else ""
    return Variant(f"{dtype}{tf32} {dim} {mask}{'' if q_len == LENGTH else f' q_len {q_len}'}", run)


def hopper_variant(
    dtype: str, dim: int, mask: str, tile: HopperTile | None = None, name: str = ""
) -> Variant:
    """Hopper's forward under the plainest call, with the table's tile or another."""

    def run() -> None:
        with contextlib.nullcontext() if tile is None else tiles.use(tile, ["hopper"]):
            launch(*plain_inputs(dtype, dim), return_lse=True, mask=MASKS[mask], impl="hopper")

    return Variant(name or f"{dtype} {dim} {mask}", run)


def hopper_backward_variant(dtype: str, dim: int, mask: str) -> Variant:
    """Hopper's backward under the plainest call."""

    def run() -> None:
        launch_backward(*plain_inputs(dtype, dim), mask=MASKS[mask], impl="hopper")

    return Variant(f"{dtype} {dim} {mask}", run, (HOPPER_BACKWARD,))


def backward_variant(
    dtype: str, dim: int, mask: str, kernels: Sequence[str] | None = None, precision: str = "highest"
) -> Variant:
    """The backward's tiles of the table under the plainest call; kernels: of "prepare", "dkv" and "dq"."""

    def run() -> None:
        with float32_precision(precision):
            launch_backward(*plain_inputs(dtype, dim), mask=MASKS[mask])

    only = None if kernels is None else tuple(f"{name}_kernel" for name in kernels)
    return Variant(f"{dtype}{' tf32' if precision == 'high' else ''} {dim} {mask}", run, only)


def second_variant(dtype: str, dim: int, mask: str, kernels: Sequence[str] | None = None) -> Variant:
    """The tangents of forward and backward under the plainest call; kernels: of SECOND."""

    def run() -> None:
        launch_second(*plain_inputs(dtype, dim), mask=MASKS[mask])

    return Variant(f"{dtype} {dim} {mask}", run, SECOND if kernels is None else tuple(kernels))


def one_walk_variant(
    dtype: str, dim: int, mask: str, kernels: Sequence[str] = (ONE_WALK,), **given: Any
) -> Variant:
    """The backward in one walk under the plainest call."""

    def run() -> None:
        launch_backward(*plain_inputs(dtype, dim), walks=1, mask=MASKS[mask], **given)

    return Variant(f"{dtype} {dim} {mask}", run, tuple(kernels))


def parameter_variants(dtype: str, dim: int, mask: str) -> list[Variant]:
    """The gradient of one learned parameter for each of the ways in which its kernel walks the pairs."""

    def variant(walk: str, **given: Any) -> Variant:
        inputs = plain_inputs(dtype, dim)
        run = functools.partial(launch_backward, *inputs, mask=MASKS[mask], **given)
        return Variant(f"{dtype} {dim} {mask} {walk}", run, ("parameter_kernel",))

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    return [
        variant("bias", bias=empty(1, Q_HEADS, LENGTH, LENGTH)),
        variant("bias of keys", bias=empty(1, Q_HEADS, 1, LENGTH)),
        variant("bias of rows", bias=empty(1, Q_HEADS, LENGTH, 1)),
        variant("position table", score=RelativePosition(empty(Q_HEADS, 32), 128, True)),
    ]


def plain_variants(
    dtypes: Sequence[str], dims: Sequence[int], masks: Sequence[str], kernels: Sequence[str]
) -> list[Variant]:
    """The plain calls of each dtype, dimension and mask; kernels: of KERNELS, "prepare" and "parameter". Of
    Hopper's those that it takes."""
    found = []
    backward = [name for name in kernels if name in ("prepare", "dkv", "dq")]
    for dtype, dim, mask in itertools.product(dtypes, dims, masks):
        if "forward" in kernels:
            found.append(forward_variant(dtype, dim, mask))
        if "hopper" in kernels and not refused("hopper", *plain_inputs(dtype, dim)):
            found.append(hopper_variant(dtype, dim, mask))
        if backward:
            found.append(backward_variant(dtype, dim, mask, backward))
        if "dqkv" in kernels:
            found.append(one_walk_variant(dtype, dim, mask))
        if "hopper_backward" in kernels and not refused("hopper_backward", *plain_inputs(dtype, dim)):
            found.append(hopper_backward_variant(dtype, dim, mask))
        if "parameter" in kernels:
            found += parameter_variants(dtype, dim, mask)
    return found


def why_not_fp8(kernel: str, archs: Sequence[str], dtypes: Sequence[str]) -> str | None:
    """Why the plain calls of a kernel cannot be compiled for all of this; None where fp8 is not among the
    dtypes, or can."""
    if "fp8" not in dtypes:
        return None
    if kernel != "forward":
        return "fp8 has a forward alone, of the portable kernels: take kernel='forward', or another dtype"
    lacking = [arch for arch in archs if not tiles.multiplies_fp8(arch)]
    return f"fp8 is multiplied on sm_90 and sm_100, and arch={lacking[0]!r}" if lacking else None


def why_not_hopper(
    kernel: str, archs: Sequence[str], dtypes: Sequence[str], dims: Sequence[int], cases: Sequence[str]
) -> str | None:
    """Why "hopper" or "hopper_backward" cannot be compiled for all of this; None where it can. dtypes and
    dims are those of the plain calls, where there are no cases; of the dims it need not take all."""
    for arch in archs:
        if arch != "sm_90":
            return f"it is for sm_90, and {arch=}"
    if cases:
        for case in cases:
            q, k, v, given, _ = case_inputs(find_case(case), "meta")
            if reason := refused(kernel, q, k, v, **given):
                return f"{case=}: {reason}"
        return None
    for dtype in dtypes:
        if dtype == "fp32":
            return f"it is for fp16 and bf16, and {dtype=}"
        found = [(dim, refused(kernel, *plain_inputs(dtype, dim))) for dim in dims]
        if found and all(reason for _, reason in found):
            dim, reason = found[0]
            return f"{dim=}: {reason}"
    return None


def refused(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> str | None:
    """Why Hopper's kernel of this name cannot answer the call; None where it can."""
    rules = {"hopper": hopper_rules.reasons, "hopper_backward": hopper_rules.backward_reasons}
    return next(rules[kernel](request_of(q, k, v, impl="hopper", **given)), None)


def case_variants(names: Sequence[str], kernels: Sequence[str]) -> list[Variant]:
    """The calls of these named cases with all that they ask for; kernels as for `plain_variants`."""
    found = []
    others = ("forward", "hopper", "dqkv", "hopper_backward")
    backward = tuple(f"{name}_kernel" for name in kernels if name not in others)
    for name in names:
        q, k, v, given, _ = case_inputs(find_case(name), "meta")
        if "forward" in kernels:
            found.append(Variant(name, functools.partial(launch, q, k, v, return_lse=True, **given)))
        if "hopper" in kernels:
            run = functools.partial(launch, q, k, v, return_lse=True, impl="hopper", **given)
            found.append(Variant(name, run))
        if backward:
            found.append(Variant(name, functools.partial(launch_backward, q, k, v, **given), backward))
        if "dqkv" in kernels:
            run = functools.partial(launch_backward, q, k, v, walks=1, **given)
            found.append(Variant(name, run, (ONE_WALK,)))
        if "hopper_backward" in kernels:
            run = functools.partial(launch_backward, q, k, v, impl="hopper", **given)
            found.append(Variant(name, run, (HOPPER_BACKWARD,)))
    return found
