"""The kernel variants that ship, as launches for `harness.compiled` to compile without a GPU."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton

import tilewise
from tilewise.api import make_request
from tilewise.autograd import parameter_slots, run_backward, run_forward
from tilewise.problem import Shape
from tilewise.tiles import Tile, gpu_tile

from .compiled import Variant
from .features import build

DIMS = (64, 128, 256)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def target_name() -> str:
    """The target that this process compiles for, by the name it has in the table of tiles."""
    arch = triton.runtime.driver.active.get_current_target().arch
    return arch if isinstance(arch, str) else f"sm_{arch}"


@contextlib.contextmanager
def target_tiles() -> Iterator[None]:
    """Every pass of a call gets the tile that it would get on the target."""

    def choose(q: torch.Tensor, shape: Shape, work: str) -> Tile:
        return gpu_tile(target_name(), q.element_size(), shape, work)

    with mock.patch("tilewise.autograd.choose_tile", choose):
        yield


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, return_lse: bool = False, **given: Any) -> None:
    """What `attention` does on a GPU once a call has passed the checks."""
    with target_tiles():
        run_forward(make_request(q, k, v, **given), return_lse)


def launch_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> None:
    """What its backward does, with gradients of everything that has one."""
    request = make_request(q, k, v, **given)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    dlse = q.new_empty(q.shape[:3], dtype=torch.float32)
    slots = {slot for slot, _, _ in parameter_slots(request)}
    needs = [True] * 3 + [slot in slots for slot in range(len(request.other_tensors))]
    with target_tiles():
        run_backward(request, out, dlse.expand(2, *dlse.shape), torch.empty_like(out), dlse, needs)


def main_tile(
    dtype: str, dim: int, mask: Any, q_len: int = 512, float32_precision: str = "highest"
) -> Variant:
    """A tile of the table under the plainest calls; with few queries, the tile cut down for them."""

    def run() -> None:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(float32_precision)
        q = torch.empty(1, 4, q_len, dim, dtype=DTYPES[dtype])
        k = torch.empty(1, 2, 512, dim, dtype=DTYPES[dtype])
        launch(q, k, torch.empty_like(k), return_lse=True, mask=mask)
        torch.set_float32_matmul_precision(precision)

    name = "full" if mask is None else "causal"
    precision = " tf32" if float32_precision == "high" else ""
    return Variant(f"{dtype}{precision} {dim} {name}{'' if q_len == 512 else f' q_len {q_len}'}", run)


def main_variants() -> list[Variant]:
    """Every row of the table, causal, and the tiles that short queries get."""
    causal = tilewise.Causal()
    return [
        *(main_tile(dtype, dim, causal) for dtype in ("bf16", "fp32") for dim in DIMS),
        main_tile("bf16", 128, None),
        main_tile("fp16", 128, causal),
        main_tile("fp32", 64, causal, float32_precision="high"),
        *(main_tile("bf16", dim, None, q_len=1) for dim in DIMS),
        main_tile("bf16", 128, causal, q_len=50),
    ]


# Every mask, score modifier and other feature that changes a kernel; what excludes each other stands apart.
COMBINATIONS = (
    ("causal", "window", "prefix", "softcap", "alibi", "sink", "cosine_with_temperature"),
    ("documents", "right_padding", "left_padding", "relative_position", "tensor_scale", "dropout"),
    ("bool_mask", "intervals", "user_mask", "user_interval", "user_score", "bias_modifier", "bias"),
    ("causal_top_left", "scattered_documents", "strided_bias", "other_scale"),
    ("cosine",),
)
KINDS_AND_DIMS = (("bf16", (64, 64)), ("fp16", (40, 24)), ("bf16", (20, 80)))


def feature_variant(features: tuple[str, ...], i: int, launched: Callable[..., None]) -> Variant:
    """These features in one call; `launched` is `launch` or `launch_backward`."""
    dtype, dims = KINDS_AND_DIMS[i % len(KINDS_AND_DIMS)]

    def run() -> None:
        sizes = dict(q_heads=4, kv_heads=2, q_len=300, kv_len=300, head_dim=dims[0], value_dim=dims[1])
        cpu = torch.device("cpu")
        problem = build(cpu, random.Random(0), features, dtype=DTYPES[dtype], **sizes)
        launched(*problem.tensors(), **problem.keywords())

    return Variant(" & ".join((*features, dtype, "x".join(map(str, dims)))), run)


def feature_variants() -> list[Variant]:
    """Every feature in the forward, and what is not a feature: integers that are 1."""
    found = [feature_variant(features, i, launch) for i, features in enumerate(COMBINATIONS)]
    return [*found, ones_variant()]


def backward_feature_variants() -> list[Variant]:
    """Every feature in the backward and in its parameters' gradients; the last two add nothing new there."""
    return [feature_variant(features, i, launch_backward) for i, features in enumerate(COMBINATIONS[:3])]


def backward_tile(dtype: str, dim: int, mask: Any) -> Variant:
    """The backward's tiles of the table under the plainest calls."""

    def run() -> None:
        q = torch.empty(1, 4, 512, dim, dtype=DTYPES[dtype])
        k = torch.empty(1, 2, 512, dim, dtype=DTYPES[dtype])
        launch_backward(q, k, torch.empty_like(k), mask=mask)

    return Variant(f"{dtype} {dim} {'full' if mask is None else 'causal'}", run)


def backward_variants() -> list[Variant]:
    """Every row of the table for the backward."""
    causal = tilewise.Causal()
    return [backward_tile(dtype, dim, causal) for dtype in ("bf16", "fp32") for dim in DIMS] + [
        backward_tile("bf16", 128, None)
    ]


def ones_variant() -> Variant:
    """Triton compiles a run-time integer that is 1 into the code; here every one of them is."""

    def run() -> None:
        q = k = v = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16)
        one = torch.ones(1, dtype=torch.int32)
        masks = tilewise.Causal() & tilewise.Window(1, 1) & tilewise.Prefix(1) & tilewise.Padding(one)
        masks = masks & tilewise.Padding(1, side="left") & tilewise.Documents(one) & torch.ones(1, 1).bool()
        scores = [tilewise.ALiBi(torch.ones(1)), tilewise.Softcap(1.0)]
        given = dict(mask=masks, score=scores, similarity="cosine", sink=torch.ones(1), bias=torch.ones(1))
        launch(q, k, v, return_lse=True, **given)

    return Variant("all ones", run)


def oldest_variants() -> list[Variant]:
    """A few variants for the oldest supported Triton."""
    causal = tilewise.Causal()
    return [main_tile("bf16", 128, causal), feature_variants()[0], backward_tile("bf16", 64, causal)]
