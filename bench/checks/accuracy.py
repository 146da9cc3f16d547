"""Are out, lse and all gradients as near to float64 as they must be, for every feature?"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from harness.features import FEATURES
from harness.problem import run

from .trial import Trial, from_tests

# On a GPU. Neither length is a multiple of a tile; float64 scores of the longer pair take 130 MB a copy.
LONG: dict[str, Any] = {"batch": 1, "q_heads": 4, "kv_heads": 2, "q_len": 2000, "kv_len": 2100, "tile": None}
MIDDLE: dict[str, Any] = {"batch": 2, "q_heads": 4, "kv_heads": 2, "q_len": 900, "kv_len": 1100, "tile": None}

SHAPES = (
    ("bfloat16", 128, "causal"),
    ("bfloat16", 128, ""),
    ("bfloat16", 64, "causal"),
    ("bfloat16", 256, "causal"),
    ("float16", 128, "causal"),
    ("float16", 64, ""),
    ("bfloat16", 256, ""),
    ("float32", 64, "causal"),
    ("float32", 128, ""),
    ("bfloat16", 192, "causal"),  # rows in two pieces
    ("bfloat16", 512, "causal"),  # wide ones, dK and dV apart
)

TOGETHER = (
    ("causal", "window", "softcap", "sink", "grouped_heads", "bfloat16"),
    ("right_padding", "documents", "alibi", "dropout", "float16"),
    ("bool_mask", "bias", "cosine_with_temperature", "transposed_layout", "bfloat16"),
    ("prefix", "relative_position", "strided_bias", "tensor_scale", "float16"),
    ("intervals", "user_score", "value_dim_differs", "sliced_layout", "float32"),
)


def judged(features: tuple[str, ...], sizes: dict[str, Any], device: torch.device, seed: int) -> str:
    """Forward and backward of a call with these features, at these sizes where they leave them open; in the
    interpreter, which takes milliseconds for every tile, at the tests' own."""
    if device.type == "cuda":
        run(device, *features, seed=seed, backward=True, **sizes)
        return ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None)
    run(device, *features, seed=seed, backward=True)
    return "tiny"


def _shape(dtype: str, dim: int, mask: str) -> Trial:
    features = (dtype, mask) if mask else (dtype,)
    sizes = {**LONG, "head_dim": dim, "value_dim": dim}
    name = f"{dtype}, width {dim}, {mask or 'full'}"
    return Trial(name, functools.partial(judged, features, sizes))


def _feature(number: int, name: str) -> Trial:
    """One feature; the dtypes and dimensions take turns where it leaves them open."""
    dtype = () if FEATURES[name].kind == "dtype" else (("bfloat16", "float16")[number % 2],)
    dim = (64, 128)[number // 2 % 2]
    sizes = {**MIDDLE, "head_dim": dim, "value_dim": dim}
    return Trial(f"feature {name}", functools.partial(judged, (name, *dtype), sizes))


# Calls that are parts of larger ones, as several GPUs share one: each index that a kernel moves there.
IN_PARTS = (
    ("causal_from_a_position", "dropout", "sink"),
    ("prefix", "relative_position"),
    ("scattered_documents", "bias"),
    ("user_interval", "tensor_scale"),
    ("intervals", "user_score"),
)

# Derived once more: tangents of the forward and of the backward.
TWICE = (
    ("second_order", "causal", "grouped_heads", "bfloat16"),
    ("second_order", "softcap", "bias", "sink", "dropout", "float16"),
    ("second_order", "cosine_with_temperature", "relative_position", "tensor_scale", "float32"),
    ("second_order", "blocks", "alibi", "value_dim_differs", "bfloat16"),
)

# What most models use comes first; forced tiles are for tests, and the table's are used everywhere here.
KINDS = (
    "mask",
    "score",
    "bias",
    "sink",
    "heads",
    "dropout",
    "similarity",
    "layout",
    "scale",
    "lengths",
    "rows",
    "dims",
    "order",
)
ORDERED = [name for kind in KINDS for name, entry in FEATURES.items() if entry.kind == kind]

ACCURACY: list[Trial] = [
    *(_shape(*shape) for shape in SHAPES),
    *(Trial(", ".join(names), functools.partial(judged, names, MIDDLE)) for names in (*TOGETHER, *TWICE)),
    *(_feature(number, name) for number, name in enumerate(ORDERED)),
]


def _parts(features: tuple[str, ...], device: torch.device, seed: int) -> str:
    """A call in sixteen parts, as ranks along sequences and heads have them: tests/test_place.py."""
    importlib.import_module("test_place").judge_parts(features, "portable", device, 100 * seed)
    return "small"


ACCURACY += [
    Trial(f"in parts: {', '.join(features)}", functools.partial(_parts, features)) for features in IN_PARTS
]


def _statistics(kind: str, device: torch.device, seed: int) -> str:
    """What the softmax knows, and its gradients: tests/test_statistics.py."""
    tests = importlib.import_module("test_statistics")
    tests.test_gradients_through_all_of_them(device, tests.FEATURES[kind])
    return "small"


STATISTICS = ("masks, softcap, sink", "stored mask, slopes, bias", "packed")
ACCURACY += [Trial(f"statistics: {kind}", functools.partial(_statistics, kind)) for kind in STATISTICS]


def _dropout(test: str, device: torch.device, seed: int) -> str | None:
    return from_tests("test_dropout", test, device, None)(device, seed)


ACCURACY += [
    Trial(
        f"dropout drops the same pairs in the {work} as in the reference", functools.partial(_dropout, test)
    )
    for work, test in (
        ("forward", "test_forward_drops_the_pairs_of_the_mask"),
        ("backward", "test_backward_drops_the_pairs_of_the_mask"),
    )
]
