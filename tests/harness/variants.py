"""The kernel variants that ship, as launches for `tilewise.tools.compiled` to compile without a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import tilewise
from tilewise.tile_table import HopperTile
from tilewise.tools.compiled import TARGETS, Compiled, Variant, compile_variants
from tilewise.tools.inspect import DIMS
from tilewise.tools.variants import (
    DTYPES,
    backward_variant,
    forward_variant,
    hopper_variant,
    launch,
    launch_backward,
    plain_inputs,
)

from .features import build


def shared_folder(folders: pytest.TempPathFactory) -> Path:
    """A folder that the workers of a run have in common."""
    folder: Path = folders.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def compiled_once(
    variants: str,
    folders: pytest.TempPathFactory,
    targets: Sequence[str] = TARGETS,
    parts: Sequence[dict[str, Any]] = ({},),
    **options: Any,
) -> dict[str, list[Compiled]]:
    """The variants for these targets. It takes minutes, so the workers of a run share one file of results.

    parts: arguments of the function of variants, for a process each; options: of `compile_variants`.
    """

    def compiled(part: dict[str, Any]) -> dict[str, list[Compiled]]:
        return compile_variants(f"harness.variants:{variants}", targets, part, **options)

    file = shared_folder(folders) / f"{variants}.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            with ThreadPoolExecutor() as pool:
                done = list(pool.map(compiled, parts))
            found = {target: [each for part in done for each in part[target]] for target in targets}
            file.write_text(json.dumps(found, default=dataclasses.asdict))
    found = json.loads(file.read_text())
    return {target: [Compiled.from_json(each) for each in kernels] for target, kernels in found.items()}


def main_variants() -> list[Variant]:
    """Every row of the table, causal, and the tiles that short queries get."""
    return [
        *(forward_variant(dtype, dim, "causal") for dtype in ("bf16", "fp32") for dim in DIMS),
        forward_variant("bf16", 128, "full"),
        forward_variant("fp16", 128, "causal"),
        forward_variant("fp32", 64, "causal", precision="high"),
        *(forward_variant("bf16", dim, "full", q_len=1) for dim in DIMS),
        forward_variant("bf16", 128, "causal", q_len=50),
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


def backward_variants() -> list[Variant]:
    """Every row of the table for the backward."""
    dtypes = ("bf16", "fp32")
    found = [backward_variant(dtype, dim, "causal") for dtype in dtypes for dim in DIMS]
    return [*found, backward_variant("bf16", 128, "full")]


def tf32_variants() -> list[Variant]:
    """Forward and backward where PyTorch asks for tf32."""
    forward = forward_variant("fp32", 64, "causal", precision="high")
    return [forward, backward_variant("fp32", 64, "causal", ("dkv", "dq"), precision="high")]


# What `tilewise tune` may choose beside the table's tiles of Hopper's forward, at head_dim 64 and 128.
HOPPER_TILES = {
    "three warpgroups": (64, HopperTile(192, 64, 12, 2)),
    "no turns": (128, HopperTile(128, 128, 8, 2, has_turns=False)),
    "Q in registers": (128, HopperTile(128, 128, 8, 2, is_q_in_registers=True)),
    "four producer warps": (128, HopperTile(128, 128, 8, 2, producer_warps=4)),
    "three warpgroups, four producer warps": (64, HopperTile(192, 64, 12, 2, producer_warps=4)),
}


def hopper_variants(part: int | None = None) -> list[Variant]:
    """Hopper's forward: every row of the table, other tiles, and a call with features. They take a minute, so
    that two processes may have a part each, 0 or 1."""

    def features() -> None:
        lengths = torch.empty(1, dtype=torch.int32, device="meta")
        mask = tilewise.Causal() & tilewise.Window(100, 0) & tilewise.Padding(lengths)
        sink = torch.empty(4, device="meta")
        inputs = plain_inputs("bf16", 64)
        launch(*inputs, return_lse=True, mask=mask, score=tilewise.Softcap(30.0), sink=sink, impl="hopper")

    found = [hopper_variant("bf16", dim, mask) for mask in ("causal", "full") for dim in DIMS]
    found += [hopper_variant("fp16", 128, "causal"), Variant("bf16 64 features", features)]
    for name, (dim, tile) in HOPPER_TILES.items():
        found.append(hopper_variant("bf16", dim, "causal", tile, f"bf16 {dim} causal, {name}"))
    return found if part is None else found[part::2]


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
    return [
        forward_variant("bf16", 128, "causal"),
        feature_variants()[0],
        backward_variant("bf16", 64, "causal"),
    ]
