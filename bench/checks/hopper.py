"""Are Hopper's forward and backward right, in every kind of call that they take, and always the same?

No GPU has run them yet, so nothing that they do is taken for granted. Each check is a job of its own, in a
process that can be replaced: a barrier that waits for ever costs one check. Without a GPU they run in the
emulator, on tiny problems.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import tilewise
from harness.oracle import check
from harness.problem import run
from tilewise.kernels.tile import HopperTile
from tilewise.plan.tile_table import DIMS as DIMS_OF_ROWS
from tilewise.plan.tiles import architecture

from .large import enough_memory
from .trial import NotApplicable, Trial

Tensor = torch.Tensor

# Neither length is a multiple of a tile; in the emulator they are two tiles of rows, and several of keys.
ON_GPU: dict[str, Any] = {"batch": 2, "q_heads": 4, "kv_heads": 2, "q_len": 900, "kv_len": 1100}
TINY: dict[str, Any] = {"batch": 1, "q_heads": 2, "kv_heads": 1, "q_len": 150, "kv_len": 70}
DIMS = (128, 64, 256, 80, 192)
DTYPES = ("bfloat16", "float16")
LENGTHS = ((1, 1), (1000, 1000), (17, 129), (127, 128), (128, 127), (129, 17), (1, 1000), (1000, 1))
TILES = {
    "three warpgroups": (128, HopperTile(192, 64, 12, 2)),
    "three warpgroups out of turn": (64, HopperTile(192, 64, 12, 2, has_turns=False)),
    "out of turn": (128, HopperTile(128, 128, 8, 2, has_turns=False)),
    "Q in registers": (64, HopperTile(128, 128, 8, 2, is_q_in_registers=True)),
    "three stages": (128, HopperTile(128, 64, 8, 3)),
}
# What its rules take, by the names of the tests' features; what most models use comes first.
TAKEN = (
    "causal_top_left", "window", "prefix", "right_padding", "left_padding", "softcap", "sink", "one_kv_head",
    "fewer_queries", "fewer_keys", "one_query", "one_key", "transposed_layout", "alibi", "relative_position",
    "bias", "cosine_with_temperature", "tensor_scale", "other_scale", "multi_head",
)  # fmt: skip
TOGETHER = (
    ("causal", "window", "softcap", "sink", "grouped_heads"),
    ("right_padding", "prefix", "alibi", "one_kv_head"),
    ("causal", "fewer_keys", "sink"),  # whole tiles of rows see no key
)


def on_hopper(function: Callable[..., str], device: torch.device, seed: int) -> str:
    """The check on a Hopper GPU or in the emulator; elsewhere it does not apply."""
    if device.type == "cuda" and architecture(device) != "sm_90":
        raise NotApplicable(f"it needs a Hopper GPU (sm_90), and this one is {architecture(device)}")
    return function(device, seed)


def judged(
    features: tuple[str, ...], dim: int, backward: bool, device: torch.device, seed: int, **sizes: int
) -> str:
    """out, lse and, where asked for, all gradients of a call with these features."""
    sizes = {**(ON_GPU if device.type == "cuda" else TINY), "head_dim": dim, "value_dim": dim, **sizes}
    asked: dict[str, Any] = {"arguments": {"impl": "hopper"}, "tile": None}
    run(device, *features, seed=seed, backward=backward, **sizes, **asked)
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def with_tile(name: str, device: torch.device, seed: int) -> str:
    """A call with another tile than the table's."""
    dim, tile = TILES[name]
    if device.type != "cuda":
        tile = replace(tile, tile_kv=32)
    with tilewise.tiles.use(tile, ("hopper",)):
        judged(("causal", "bfloat16"), dim, False, device, seed)
        return judged(("right_padding", "sink", "float16"), dim, False, device, seed)


def qkv(device: torch.device, *shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def odd_lengths(mask: tilewise.Mask | None, q_len: int, kv_len: int, device: torch.device, seed: int) -> str:
    """Lengths around those of its tiles. A check each: to the compiler 1, sixteens and others are three."""
    most = 1000 if device.type == "cuda" else 140
    q_len, kv_len = min(q_len, most), min(kv_len, most)
    q, k, v = qkv(device, (1, 2, q_len, 64), (1, 1, kv_len, 64), (1, 1, kv_len, 64))
    check(q, k, v, mask=mask, impl="hopper")
    return f"{q_len} queries, {kv_len} keys"


def nan_beyond(device: torch.device, seed: int) -> str:
    """NaN in K and V where no query looks is nobody's business."""
    length = 1100 if device.type == "cuda" else 100
    q, k, v = qkv(device, (3, 2, 150, 128), (3, 2, length, 128), (3, 2, length, 128))
    lengths = torch.tensor([length - 5, 0, length // 3], device=device)
    for side in ("right", "left"):
        mask = tilewise.Padding(lengths, side)
        want = check(q, k, v, mask=mask, impl="hopper")
        dirty = [x.clone() for x in (k, v)]
        for x, (b, kept) in itertools.product(dirty, enumerate(lengths.tolist())):
            x[b, :, kept:] = torch.nan if side == "right" else x[b, :, kept:]
            x[b, :, : length - kept] = torch.nan if side == "left" else x[b, :, : length - kept]
        got = check(q, *dirty, mask=mask, impl="hopper")
        for name, clean, now in zip(("out", "lse"), want, got, strict=True):
            assert torch.equal(clean, now), f"{name} changes with what lies beyond the lengths, {side}"
    return f"up to {length} keys"


def more_tiles_than_programs(device: torch.device, seed: int) -> str:
    """Programs that stay take several tiles of rows, of other heads and sequences."""
    shape = (8, 16, 500, 128) if device.type == "cuda" else (2, 3, 140, 64)
    if device.type == "cuda":
        enough_memory(device, gigabytes=4)
    q, k, v = qkv(device, shape, shape, shape)
    check(q, k, v, mask=tilewise.Causal(), impl="hopper")
    return f"{shape[0] * shape[1] * -(-shape[2] // 128)} tiles of rows"


def same_bits(causal: bool, device: torch.device, seed: int) -> str:
    """200 times the same call; in the emulator, twice and tiny."""
    times, shape = (200, (2, 16, 4096, 128)) if device.type == "cuda" else (2, (1, 2, 140, 64))
    q, k, v = qkv(device, shape, shape, shape)
    options: dict[str, Any] = dict(mask=tilewise.Causal() if causal else None, return_lse=True, impl="hopper")
    first = tilewise.attention(q, k, v, **options)
    differ = torch.zeros(2, dtype=torch.int64, device=device)
    for _ in range(times):
        again = tilewise.attention(q, k, v, **options)
        differ += torch.stack([(one != other).any() for one, other in zip(first, again, strict=True)])
    assert all(bool(x.isfinite().all()) and bool(x.any()) for x in first), "no value, or values without end"
    found = dict(zip(("out", "lse"), differ.tolist(), strict=True))
    assert not any(found.values()), f"of {times} repeats so many differed: {found}"
    return f"{times} repeats, length {shape[2]}"


def same_gradients(causal: bool, device: torch.device, seed: int) -> str:
    """50 times the same backward: its programs add to dQ in turns. In the emulator, twice and tiny."""
    times, shape = (50, (2, 16, 4096, 128)) if device.type == "cuda" else (2, (1, 2, 140, 64))
    leaves = [x.requires_grad_() for x in qkv(device, shape, shape, shape)]
    mask = tilewise.Causal() if causal else None
    out = tilewise.attention(*leaves, mask=mask, impl="hopper")
    do = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, do, retain_graph=True)
    differ = torch.zeros(3, dtype=torch.int64, device=device)
    for _ in range(times):
        again = torch.autograd.grad(out, leaves, do, retain_graph=True)
        differ += torch.stack([(one != other).any() for one, other in zip(first, again, strict=True)])
    assert all(bool(x.isfinite().all()) and bool(x.any()) for x in first), "no value, or values without end"
    found = dict(zip(("dq", "dk", "dv"), differ.tolist(), strict=True))
    assert not any(found.values()), f"of {times} repeats so many differed: {found}"
    return f"{times} repeats, length {shape[2]}"


# ---- The checks, in order: first what its canary leaves open


def _trial(name: str, dim: int, function: Callable[..., str], *given: Any, **sizes: int) -> Trial:
    """dim: the widest that it calls with."""
    return Trial(
        f"hopper: {name}",
        functools.partial(on_hopper, functools.partial(function, *given, **sizes)),
        width=next(width for width in DIMS_OF_ROWS if width >= dim),
    )


def _shape(dim: int, mask: str, dtype: str) -> Trial:
    features = (mask, dtype) if mask else (dtype,)
    return _trial(f"{dtype}, width {dim}, {mask or 'full'}", dim, judged, features, dim, False)


def _feature(number: int, name: str) -> Trial:
    """One feature; dtypes and dimensions take turns."""
    dim = (64, 128)[number // 2 % 2]
    return _trial(name, dim, judged, (name, DTYPES[number % 2]), dim, False)


HOPPER: list[Trial] = [
    _trial("the same bits again, causal", 128, same_bits, True),
    _trial("NaN beyond the lengths", 128, nan_beyond),
    *(_trial(f"{q} x {kv}, causal", 64, odd_lengths, tilewise.Causal(), q, kv) for q, kv in LENGTHS),
    *(_trial(name, dim, with_tile, name) for name, (dim, _) in TILES.items()),
    _trial("more tiles than programs", 128, more_tiles_than_programs),
    _trial("the same bits again, full", 128, same_bits, False),
    *(_trial(f"{q} x {kv}, full", 64, odd_lengths, None, q, kv) for q, kv in LENGTHS),
    *(_shape(*shape) for shape in itertools.product(DIMS, ("", "causal"), DTYPES)),
    *(_trial(", ".join(names), 128, judged, (*names, "bfloat16"), 128, False) for names in TOGETHER),
    *(_feature(number, name) for number, name in enumerate(TAKEN)),
    _trial("values wider than heads", 128, judged, ("causal", "float16"), 64, False, value_dim=128),
    _trial("values narrower than heads", 192, judged, ("causal", "bfloat16"), 192, False, value_dim=128),
    _trial("gradients, causal", 128, judged, ("causal", "bfloat16"), 128, True),
    _trial("gradients, full", 128, judged, ("float16",), 128, True),
    _trial("gradients, full, width 64", 64, judged, ("bfloat16",), 64, True),
    _trial("gradients, grouped and padded", 64, judged, ("right_padding", "alibi", "float16"), 64, True),
    _trial("gradients, window, width 80", 128, judged, ("window", "bfloat16"), 80, True),
    _trial("the same gradients again, causal", 128, same_gradients, True),
    _trial("the same gradients again, full", 128, same_gradients, False),
    _trial("gradients, sink and softcap", 64, judged, ("sink", "softcap", "float16"), 64, True),
    _trial("gradients, width 256", 256, judged, ("window", "bfloat16"), 256, True),
]
