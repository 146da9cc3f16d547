"""The kernel variants that ship, as launches for `tilewise.tools.compiled` to compile without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from filelock import FileLock
from packaging.version import Version

import tilewise
from tilewise.kernels.append import launch_append, launch_turn
from tilewise.kernels.quantize import launch_quantize
from tilewise.kernels.tile import CopiedTile, HopperBackwardTile, HopperTile
from tilewise.parts.fp8 import FP8, empty_numbers
from tilewise.parts.place import Place
from tilewise.parts.rotary import RotaryTable
from tilewise.parts.shape import Cache, Pages
from tilewise.plan.passes import run_forward
from tilewise.plan.request import request_of
from tilewise.tools.compiled.compiler import (
    HOPPER_BACKWARD,
    TARGETS,
    Compiled,
    CompileError,
    Variant,
    compile_variants,
)
from tilewise.tools.compiled.variants import (
    DTYPES,
    LENGTH,
    SECOND,
    backward_variant,
    forward_variant,
    hopper_backward_variant,
    hopper_variant,
    launch,
    launch_backward,
    launch_gradients,
    launch_second,
    launch_statistics,
    one_walk_variant,
    plain_inputs,
    second_variant,
    target_tiles,
)
from tilewise.tools.inputs import fp8_shapes
from tilewise.tools.inspect.inspect import DIMS

from .features import build
from .turns import has_its_turn

WIDE_FP32_TARGETS = ("sm_80", "sm_90", "sm_100")  # AMD's shared memory has no room for that backward
COPYING_TARGETS = ("sm_90", "sm_100")  # with a copy engine
FP8_TARGETS = ("sm_90", "sm_100")  # with tensor cores for e4m3
OLDEST_TARGETS = ("sm_80", "sm_90")
TRITONS = ("oldest", "newest")  # that CI has


def shared_folder(folders: pytest.TempPathFactory) -> Path:
    """A folder that the workers of a run have in common."""
    folder: Path = folders.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


class ByTarget(dict[str, Any]):
    """What was compiled for each target. Where that failed it is the compiler's message, and asking for the
    target raises it: the tests of the others have their verdict."""

    def __getitem__(self, target: str) -> Any:
        found = super().__getitem__(target)
        if isinstance(found, str):
            raise CompileError(found)
        return found

    def keyed(self, key: Callable[[Compiled], Any]) -> ByTarget:
        """By target, and then by `key` of what was compiled."""
        return ByTarget(
            (target, found if isinstance(found, str) else {key(each): each for each in found})
            for target, found in self.items()
        )


def compiled_once(
    variants: str,
    folders: pytest.TempPathFactory,
    targets: Sequence[str] = TARGETS,
    parts: Sequence[dict[str, Any]] = ({},),
    is_by_target: bool = False,
    **options: Any,
) -> ByTarget:
    """The variants for these targets. It takes minutes, so the workers of a run share one file of results.

    parts: arguments of the function of variants, for a process each; is_by_target: it takes the target, too;
    options: of `compile_variants`.
    """

    def compiled(work: tuple[str, dict[str, Any]]) -> list[Compiled] | str:
        target, part = work
        part = part | dict(target=target) if is_by_target else part
        try:
            return compile_variants(f"harness.variants:{variants}", [target], part, **options)[target]
        except CompileError as error:
            return str(error)

    file = shared_folder(folders) / f"{variants}.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            with ThreadPoolExecutor(2) as pool:
                done = list(pool.map(compiled, ((target, part) for part in parts for target in targets)))
            found = {target: joined(done[i :: len(targets)]) for i, target in enumerate(targets)}
            file.write_text(json.dumps(found, default=dataclasses.asdict))
    found = json.loads(file.read_text())
    return ByTarget(
        (target, each if isinstance(each, str) else [Compiled.from_json(kernel) for kernel in each])
        for target, each in found.items()
    )


def joined(parts: Iterable[list[Compiled] | str]) -> list[Compiled] | str:
    """The kernels of all parts, or the messages of those that failed."""
    parts = list(parts)
    failures = [part for part in parts if isinstance(part, str)]
    return "\n\n".join(failures) if failures else [each for part in parts for each in part]


# Lists of variants, and the targets that they are for. One process a target compiles them all: each process
# imports PyTorch and Triton for as long as two of the kernels take. Which of them a run compiles: turns.py.
SHIPPED = {
    "main_variants": TARGETS,
    "backward_variants": TARGETS,
    "tf32_variants": TARGETS,
    "cache_variants": TARGETS,
    "pieces_variants": TARGETS,
    "wide_fp32_variants": WIDE_FP32_TARGETS,
    "copied_variants": COPYING_TARGETS,
    "feature_variants": TARGETS,
    "backward_feature_variants": TARGETS,
    "statistics_variants": TARGETS,
    "second_variants": TARGETS,
    "fp8_variants": FP8_TARGETS,
    "wide_second_variants": WIDE_FP32_TARGETS,
}
# What every run compiles for every target, and what it always compiles for Hopper: the rows that most calls
# take, and one of each kind that a test has something to say of. The backward at 64 is among the oldest's.
EVERYWHERE = ("main_variants: bf16 64 causal", "main_variants: bf16 128 causal",
              "backward_variants: bf16 128 causal")  # fmt: skip
ON_HOPPER = ("main_variants: bf16 256 causal", "main_variants: fp32 tf32 64 causal",
             "tf32_variants: fp32 tf32 64 causal",
             "pieces_variants: bf16 80x80 causal", "pieces_variants: bf16 576x512 causal")  # fmt: skip


def shipped_variants(target: str) -> list[Variant]:
    """The lists' variants that this run compiles for a target, each name after its list's."""
    always = (*EVERYWHERE, *ON_HOPPER) if target == "sm_90" else EVERYWHERE
    found = []
    for name, targets in SHIPPED.items():
        for place, each in enumerate(globals()[name]()):
            named = dataclasses.replace(each, name=f"{name}: {each.name}")
            if named.name in always or has_its_turn(place, target, targets):
                found.append(named)
    return found


def shipped(variants: str, folders: pytest.TempPathFactory) -> ByTarget:
    """The kernels of one list, by the targets that it is compiled for."""
    prefix = f"{variants}: "

    def of_list(kernels: list[Compiled] | str) -> list[Compiled] | str:
        if isinstance(kernels, str):
            return kernels
        named = [each for each in kernels if each.variant.startswith(prefix)]
        return [dataclasses.replace(each, variant=each.variant.removeprefix(prefix)) for each in named]

    found = compiled_once("shipped_variants", folders, is_by_target=True)
    return ByTarget(
        (target, of_list(kernels)) for target, kernels in found.items() if target in SHIPPED[variants]
    )


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


def copied_variants() -> list[Variant]:
    """K and V by the copy engine, in one piece of columns and in two."""

    def run(plain: Variant) -> None:
        with tilewise.tiles.use(CopiedTile(128, 64, 8, 2), ["forward"]):
            plain.launch()

    plain = [forward_variant("bf16", dim, "causal") for dim in (128, 80)]
    return [Variant(each.name, functools.partial(run, each)) for each in plain]


# Every mask, score modifier and other feature that changes a kernel; what excludes each other stands apart.
COMBINATIONS = (
    ("causal", "window", "prefix", "softcap", "alibi", "sink", "cosine_with_temperature"),
    ("documents", "right_padding", "left_padding", "relative_position", "tensor_scale", "dropout"),
    ("bool_mask", "intervals", "blocks", "user_mask", "user_interval", "user_score", "bias_modifier", "bias"),
    ("packed_apart", "causal", "relative_position", "intervals"),
    ("causal_top_left", "causal_from_a_position", "scattered_documents", "strided_bias", "other_scale"),
    ("cosine", "packed_rows", "left_padding", "bool_mask", "sink"),
    ("neighborhood", "block_causal", "either", "opposite"),
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
    return [*found, ones_variant(), part_variant(False), listed_variant(launch), listed_decode_variant()]


def listed_variant(launched: Callable[..., None]) -> Variant:
    """Lists of tiles of packed sequences. Nothing else of such a call is another for them."""
    return dataclasses.replace(
        feature_variant(("packed_apart", "causal", "blocks"), 0, launched),
        kernels=("list_keys_kernel", "list_rows_kernel"),
    )


def listed_decode_variant() -> Variant:
    """A list dealt to the programs that share the keys of a sequence."""

    def run() -> None:
        q, cache = (
            torch.empty(2, n, m, 128, dtype=torch.bfloat16, device="meta") for n, m in ((32, 1), (8, 4096))
        )
        kv_lens = torch.empty(2, dtype=torch.int32, device="meta")
        mask = tilewise.Blocks(torch.empty(2, 1, 1, 64, dtype=torch.bool, device="meta"), 64)
        launch(q, cache, cache, return_lse=True, kv_lens=kv_lens, mask=mask)

    return Variant("bf16 128 decode, blocks", run)


def part_variant(backward: bool) -> Variant:
    """A part of a larger call, as ranks along a sequence make it: results in fp32, positions of the whole."""

    def run() -> None:
        features = ("causal", "window", "user_interval", "user_score", "relative_position", "dropout")
        sizes = dict(q_heads=4, kv_heads=2, q_len=600, kv_len=600, head_dim=64, value_dim=64)
        problem = build(torch.device("cpu"), random.Random(0), features, dtype=torch.bfloat16, **sizes)
        whole = request_of(*problem.tensors(), **problem.keywords())
        rows = dict(q=whole.q[:, :, 300:], k=whole.k[:, :, :300], v=whole.v[:, :, :300])
        request = dataclasses.replace(whole, **rows, place=Place(*whole.shape[:5], first_row=300))
        if backward:
            launch_gradients(request, dtype=torch.float32)
            return
        out = request.q.new_empty(*request.q.shape[:3], 64, dtype=torch.float32)
        with target_tiles():
            run_forward(request, return_lse=False, for_backward=True, out=out)

    return Variant("bf16 64 part of a call", run)


def backward_feature_variants() -> list[Variant]:
    """Every feature in the backward and in its parameters' gradients; two rows add nothing new there. In one
    walk the first and the packed one: what they are told of is the same, and so is the code."""
    found = [feature_variant(COMBINATIONS[i], i, launch_backward) for i in (0, 1, 2, 3)]
    # Of the masks of space those that stand for the others: all four took as long as the rest together.
    found.append(feature_variant(("neighborhood", "either"), 6, launch_backward))
    in_one = functools.partial(launch_backward, walks=1)
    for i in (0, 3):
        variant = feature_variant(COMBINATIONS[i], i, in_one)
        found.append(dataclasses.replace(variant, kernels=("dqkv_kernel", "finish_dq_kernel")))
    return [*found, part_variant(True), listed_variant(launch_backward)]


def second_variants() -> list[Variant]:
    """Tangents of forward and backward: where the tiles change, and with features."""
    return [second_variant("bf16", 128, "causal"), feature_variant(COMBINATIONS[1], 1, launch_second)]


def wide_second_variants() -> list[Variant]:
    """Of the widest rows, for which AMD's shared memory has no room."""
    return [pieces_second_variant(576, 512)]


def pieces_second_variant(dim: int, value_dim: int) -> Variant:
    def run() -> None:
        q, k, v = plain_inputs("bf16", dim)
        launch_second(q, k, v[..., :value_dim])

    return Variant(f"bf16 {dim}x{value_dim}", run, SECOND)


def backward_variants() -> list[Variant]:
    """Every row of the table for the backward."""
    dtypes = ("bf16", "fp32")
    found = [backward_variant(dtype, dim, "causal") for dtype in dtypes for dim in DIMS]
    kinds = ((dtype, dim) for dtype in dtypes for dim in DIMS)
    found += [one_walk_variant(*kind, "causal") for kind in kinds if kind != ("fp32", 256)]  # it has no tile
    return [*found, backward_variant("bf16", 128, "full")]


def cache_variants() -> list[Variant]:
    """Decoding from a cache, in one piece and in pages, split and merged, and what writes into it."""

    def decode(dim: int, page_size: int | None, q_len: int, **given: Any) -> None:
        q = torch.empty(2, 32, q_len, dim, dtype=torch.bfloat16, device="meta")
        kv_lens = torch.empty(2, dtype=torch.int32, device="meta")
        cache = torch.empty(2, 8, 4096, dim, dtype=torch.bfloat16, device="meta")
        pages = None
        if page_size is not None:
            cache = torch.empty(64, page_size, 8, dim, dtype=torch.bfloat16, device="meta")
            pages = torch.empty(2, 4096 // page_size, dtype=torch.int32, device="meta")
        launch(q, cache, cache, return_lse=True, kv_lens=kv_lens, pages=pages, **given)

    def write() -> None:
        new = torch.empty(2, 8, 3, 80, dtype=torch.bfloat16, device="meta")
        pool = torch.empty(64, 8, 16, 80, dtype=torch.bfloat16, device="meta")
        cos = torch.empty(1024, 32, device="meta")
        table = torch.empty(2, 64, dtype=torch.int32, device="meta")
        cache = Cache(torch.empty(2, dtype=torch.int32, device="meta"), Pages(table, 16, 64))
        rotary = RotaryTable(cos, cos)
        launch_append(new, new, pool, pool, None, cache, rotary)
        launch_turn(new, new, pool, None, cache, rotary._replace(is_interleaved=True))

    return [
        *(Variant(f"bf16 {dim} decode", functools.partial(decode, dim, None, 1)) for dim in (64, 128, 256)),
        Variant("bf16 128 decode, pages of 16, split", functools.partial(decode, 128, 16, 1, split_size=512)),
        Variant("bf16 128 prefill", functools.partial(decode, 128, 64, 512, mask=tilewise.Causal())),
        Variant("bf16 80 append and turn", write),
    ]


def statistics_variants() -> list[Variant]:
    """What the softmax knows beside its result, and the way back through it: two walks and one, features,
    packed, and a cache in pages whose keys are split."""
    rows = torch.empty(20, dtype=torch.int64, device="meta")
    stats = tilewise.Stats(max_logit=True, entropy=True, key_mass=True, rows=rows, top_k=4)

    def run(backward: bool, q: Any, k: Any, v: Any, walks: int = 2, **given: Any) -> None:
        with tilewise.tiles.use_walks(walks):
            launch_statistics(q, k, v, stats, backward, **given)

    def features(i: int) -> None:
        sizes = dict(q_heads=4, kv_heads=2, q_len=300, kv_len=300, head_dim=64, value_dim=64)
        kind = (torch.bfloat16, torch.float16)[i % 2]
        problem = build(torch.device("cpu"), random.Random(0), COMBINATIONS[i], dtype=kind, **sizes)
        on_cpu = dataclasses.replace(stats, rows=rows.new_zeros(20, device="cpu"))
        launch_statistics(*problem.tensors(), on_cpu, True, **problem.keywords())

    def decode() -> None:
        q = torch.empty(2, 32, 1, 128, dtype=torch.bfloat16, device="meta")
        cache = torch.empty(64, 16, 8, 128, dtype=torch.bfloat16, device="meta")
        kv_lens = torch.empty(2, dtype=torch.int32, device="meta")
        pages = torch.empty(2, 256, dtype=torch.int32, device="meta")
        run(False, q, cache, cache, kv_lens=kv_lens, pages=pages, split_size=512)

    def plain(dtype: str, dim: int, walks: int) -> None:
        run(True, *plain_inputs(dtype, dim), walks, mask=tilewise.Causal())

    return [
        Variant("bf16 128 causal", functools.partial(plain, "bf16", 128, 2)),
        Variant("bf16 64 causal in one walk", functools.partial(plain, "bf16", 64, 1)),
        Variant("fp16 64 packed features", functools.partial(features, 3)),
        Variant("bf16 128 decode, pages of 16, split", decode),
    ]


def fp8_inputs(
    dim: int, rows: int | None, q_len: int = LENGTH, along_keys: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tilewise.Scales]:
    """q, k and v as `quantize` makes them, or v as it came; and scales of heads, or of tiles of rows."""
    q, k, v, scales = fp8_shapes(*plain_inputs("bf16", dim, q_len))
    if rows is not None:
        q_scale, k_scale = (torch.empty(*x.shape[:2], -(-x.shape[2] // rows), device="meta") for x in (q, k))
        scales = tilewise.Scales(q_scale, k_scale, k_scale, rows)
    return q, k, v if along_keys else v.contiguous(), scales


def fp8_variants() -> list[Variant]:
    """The forward of fp8: each row of the table, tiles of fewer rows, scales of both kinds, features, packed,
    and a cache in pages; what statistics walk again; and what makes such numbers."""

    def plain(dim: int, rows: int | None, stats: tilewise.Stats | None = None, **sizes: Any) -> None:
        q, k, v, scales = fp8_inputs(dim, rows, **sizes)
        given = dict(mask=tilewise.Causal(), scales=scales)
        if stats is None:
            launch(q, k, v, return_lse=True, **given)
        else:
            launch_statistics(q, k, v, stats, False, **given)

    def features(i: int) -> None:
        sizes = dict(q_heads=4, kv_heads=2, q_len=300, kv_len=300, head_dim=64, value_dim=64)
        names = [name for name in COMBINATIONS[i] if not name.startswith("cosine")]
        problem = build(torch.device("cpu"), random.Random(0), ["fp8_of_rows", *names], **sizes)
        launch(*problem.tensors(), return_lse=True, **problem.keywords())

    def decode() -> None:
        q = torch.empty(2, 32, 1, 128, dtype=FP8, device="meta")
        cache = torch.empty(64, 16, 8, 128, dtype=FP8, device="meta")
        kv_lens = torch.empty(2, dtype=torch.int32, device="meta")
        pages = torch.empty(2, 256, dtype=torch.int32, device="meta")
        scales = tilewise.Scales(*(torch.empty(1, device="meta") for _ in range(3)))
        launch(q, cache, cache, kv_lens=kv_lens, pages=pages, split_size=512, scales=scales)

    def quantized(dtype: str, dim: int, rows: int, is_rotated: bool) -> None:
        x = plain_inputs(dtype, dim)[0]
        x8, scale = empty_numbers(x, rows, along_rows=True)
        launch_quantize(x, x8, scale, rows, is_rotated, is_measured=False)

    asked = tilewise.Stats(True, True, True, torch.empty(20, dtype=torch.int64, device="meta"), 4)
    dims = (64, 128, 192, 256, 576)
    return [
        *(Variant(f"fp8 {dim} causal", functools.partial(plain, dim, None)) for dim in dims),
        *(Variant(f"fp8 {dim} causal, of rows", functools.partial(plain, dim, 64)) for dim in (64, 128, 256)),
        Variant("fp8 128 causal, v as it came", functools.partial(plain, 128, None, along_keys=False)),
        Variant("fp8 80 causal, of rows", functools.partial(plain, 80, 64)),
        Variant("fp8 128 few rows", functools.partial(plain, 128, 64, q_len=20)),
        Variant("fp8 128 statistics", functools.partial(plain, 128, 64, asked)),
        *(Variant(f"fp8 64 features {i}", functools.partial(features, i)) for i in (0, 2, 3)),
        Variant("fp8 128 decode, pages of 16, split", decode),
        Variant("fp8 quantize bf16 128, rotated", functools.partial(quantized, "bf16", 128, 64, True)),
        Variant("fp8 quantize fp32 80, rotated", functools.partial(quantized, "fp32", 80, 128, True)),
        Variant("fp8 quantize fp16 576", functools.partial(quantized, "fp16", 576, 64, False)),
    ]


PIECES = (("bf16", 80, 80), ("bf16", 192, 192), ("bf16", 576, 512), ("fp32", 576, 512))


def pieces_variant(backward: bool, dtype: str, dim: int, value_dim: int) -> Variant:
    def run() -> None:
        q, k, v = plain_inputs(dtype, dim)
        launched = launch_backward if backward else launch
        launched(q, k, v.new_empty(*v.shape[:3], value_dim), mask=tilewise.Causal())

    return Variant(
        f"{dtype} {dim}x{value_dim} causal", run, ("dkv_kernel", "dq_kernel") if backward else None
    )


def pieces_variants() -> list[Variant]:
    """Rows in two pieces, and the widest, forward and backward, but for the backward of wide fp32 rows."""
    forward = [pieces_variant(False, *given) for given in PIECES]
    return [*forward, *(pieces_variant(True, *given) for given in PIECES[:-1])]


def wide_fp32_variants() -> list[Variant]:
    """That backward."""
    return [pieces_variant(True, *PIECES[-1])]


def tf32_variants() -> list[Variant]:
    """The backward where PyTorch asks for tf32; the forward is among the main variants."""
    return [backward_variant("fp32", 64, "causal", ("dkv", "dq"), precision="high")]


# What `tilewise tune` may choose beside the table's tiles of Hopper's forward, at head_dim 64 and 128.
HOPPER_TILES = {
    "three warpgroups": (64, HopperTile(192, 64, 12, 2)),
    "no turns": (128, HopperTile(128, 128, 8, 2, has_turns=False)),
    "Q in registers": (128, HopperTile(128, 128, 8, 2, is_q_in_registers=True)),
    "four producer warps": (128, HopperTile(128, 128, 8, 2, producer_warps=4)),
    "three warpgroups, four producer warps": (64, HopperTile(192, 64, 12, 2, producer_warps=4)),
}


def by_this_triton(variants: list[Variant], always: Sequence[str]) -> list[Variant]:
    """Of Hopper's variants, these and those whose turn it is: each is compiled by one of the two Tritons that
    CI has, the oldest or the newest, by the other one the next day."""
    this = TRITONS[Version(triton.__version__) >= Version("3.7")]
    return [v for i, v in enumerate(variants) if v.name in always or has_its_turn(i, this, TRITONS)]


def hopper_variants(part: int | None = None, in_turns: bool = False) -> list[Variant]:
    """Hopper's forward: every row of the table, the dimensions of multi-head latent attention, other tiles,
    and a call with features. They take a minute, so that two processes may have a part each, 0 or 1."""

    def features() -> None:
        lengths = torch.empty(1, dtype=torch.int32, device="meta")
        mask = tilewise.Causal() & tilewise.Window(100, 0) & tilewise.Padding(lengths)
        sink = torch.empty(4, device="meta")
        inputs = plain_inputs("bf16", 64)
        launch(*inputs, return_lse=True, mask=mask, score=tilewise.Softcap(30.0), sink=sink, impl="hopper")

    def latent() -> None:
        q, k, v = plain_inputs("bf16", 192)
        launch(q, k, v[..., :128], return_lse=True, mask=tilewise.Causal(), impl="hopper")

    found = [hopper_variant("bf16", dim, mask) for mask in ("causal", "full") for dim in DIMS]
    found += [hopper_variant("fp16", 128, "causal"), Variant("bf16 64 features", features)]
    found += [hopper_variant("bf16", 160, "causal"), Variant("bf16 192x128 causal", latent)]
    for name, (dim, tile) in HOPPER_TILES.items():
        found.append(hopper_variant("bf16", dim, "causal", tile, f"bf16 {dim} causal, {name}"))
    found = by_this_triton(found, ["bf16 64 full", "bf16 128 causal"]) if in_turns else found
    return found if part is None else found[part::2]


def hopper_backward_variants(in_turns: bool = False) -> list[Variant]:
    """Hopper's backward at every dimension, and with features."""

    def features() -> None:
        lengths = torch.empty(1, dtype=torch.int32, device="meta")
        mask = tilewise.Causal() & tilewise.Window(100, 0) & tilewise.Padding(lengths)
        bias = torch.empty(1, 4, 512, 512, device="meta")
        inputs = plain_inputs("bf16", 64)
        launch_backward(*inputs, mask=mask, score=tilewise.Softcap(30.0), bias=bias, impl="hopper")

    found = [hopper_backward_variant("bf16", dim, mask) for mask in ("causal", "full") for dim in (64, 128)]
    found.append(hopper_backward_variant("fp16", 128, "causal"))

    def fewer_rows() -> None:
        with tilewise.tiles.use(HopperBackwardTile(64, 128, 8, 3), ["hopper_backward"]):
            launch_backward(*plain_inputs("bf16", 64), mask=tilewise.Causal(), impl="hopper")

    found.append(Variant("bf16 64 causal, 64 rows", fewer_rows, (HOPPER_BACKWARD,)))
    found.append(Variant("bf16 64 features", features, (HOPPER_BACKWARD,)))
    return by_this_triton(found, ["bf16 128 full"]) if in_turns else found


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
        one_walk_variant("bf16", 64, "causal"),
    ]


def oldest(folders: pytest.TempPathFactory) -> tuple[ByTarget, Path]:
    """What these become, and the folder that has their machine code."""
    folder = shared_folder(folders) / "oldest"
    return compiled_once("oldest_variants", folders, OLDEST_TARGETS, assembly=folder), folder
