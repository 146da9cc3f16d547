"""Which comparisons are there? Named groups of (case, work), for pytest, evidence runs and smoke tests.

    comparisons(name, quick=False, tiny=None) -> [(Case, Work), ...]

Without a GPU (or with tiny=True) every case is shrunk, and those that no longer differ are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from tilewise.tools.shrink import shrunk
from tilewise.tools.shrink import smoke as smoke
from tilewise_reference.cases import (
    CACHED_CASES,
    CASES,
    FEATURE_CASES,
    PACKED_CASES,
    SHORT_CASES,
    Case,
    Features,
    paper_grid,
)

from .results import Work

Comparison = tuple[Case, Work]

# In the order in which a run that may be cut measures them.
GROUPS: tuple[str, ...] = (
    "forward grid",
    "backward grid",
    "short forward",
    "models forward",
    "models backward",
    "packed forward",
    "packed backward",
    "decode",
    "features forward",
    "features backward",
    "host",
    "cold start",
    "second derivatives",
    "statistics",
    "fp8",
    "quantize",
)
HEAD_DIMS = (128, 64, 256)  # the most used first
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
QUICK_LENGTHS = (1024, 4096, 16384)
SQUARED_LENGTHS = (1024, 4096)  # of groups in which all beside tilewise, or most, hold all scores
QUICK_PACKED = "packed-llama3-8b-"
QUICK_CACHED = ("cached-llama3-8b-", "cached-narrow-decode-1x128k")
QUICK_MODELS = (
    "llama3-8b-prefill",
    "llama3-8b-decode",
    "llama3-8b-training",
    "gemma2-2b-local",
    "gpt-oss-20b-local",
    "minilm-l6-encoder",
    "vit-l16-encoder",
    "swinv2-b-window16",
    "t5-base-decoder",
    "dit-xl2-training",
    "alphafold2-triangle",
)

_HOST = "tensors so small that a call is the host's work alone"


def _host_case(name: str, trained: bool, **features: object) -> Case:
    asks: Features = {**features}  # type: ignore[typeddict-item]
    return Case(
        name=f"host-{name}{'-training' if trained else ''}", batch=1, q_heads=2, kv_heads=2, q_len=4,
        kv_len=4, head_dim=16, value_dim=16, dtype="bfloat16", phase="training" if trained else "encoder",
        provenance=_HOST, features=asks,
    )  # fmt: skip


def host_cases() -> list[Comparison]:
    """Inference, a forward that records for the backward, and both passes; a mask and a bias cost arguments.
    What a case of phase "training" computes is differentiated."""
    found: list[Comparison] = []
    kinds: dict[str, dict[str, object]] = {
        "plain": {},
        "causal": dict(causal="bottom_right"),
        "documents-bias": dict(documents=2, bias=(1, 1, 4, 4)),
    }
    for name, features in kinds.items():
        inference, training = (_host_case(name, trained, **features) for trained in (False, True))
        found += [
            (inference, "host forward"),
            (training, "host forward"),
            (training, "host forward and backward"),
        ]
    return found


def cold_cases() -> list[Case]:
    """What a first call may meet: the plain kernel, and one with most features."""
    plain = next(paper_grid(head_dims=(128,), lengths=(1024,), dtype="bfloat16"))
    features = next(case for case in CASES if case.name == "gpt-oss-20b-local")
    return [plain, features]


def comparisons(name: str, quick: bool = False, tiny: bool | None = None) -> list[Comparison]:
    """What the group compares, in order. quick: fewer lengths and models; tiny and quick, fewer head_dims.
    tiny: shrunk; by default, without a GPU. Raises ValueError for a name that is not in GROUPS."""
    tiny = not torch.cuda.is_available() if tiny is None else tiny
    found = _full(name, quick, HEAD_DIMS[1:2] if quick and tiny else HEAD_DIMS)
    if not tiny or name == "host":
        return found
    small = smallest if name in ("second derivatives", "statistics", "fp8", "quantize") else smoke
    return _distinct((small(case), work) for case, work in found)


def smallest(case: Case) -> Case:
    """For what takes the interpreter longer than a forward."""
    return shrunk(case, batch=1, kv_heads=1, group=1, length=24, suffix="-tiny")


def _full(name: str, quick: bool, head_dims: tuple[int, ...]) -> list[Comparison]:
    grid = paper_grid(head_dims, QUICK_LENGTHS if quick else LENGTHS, "bfloat16")
    packed = [case for case in PACKED_CASES if not quick or case.name.startswith(QUICK_PACKED)]
    cached = [case for case in CACHED_CASES if not quick or case.name.startswith(QUICK_CACHED)]
    models = [case for case in CASES if not quick or case.name in QUICK_MODELS]
    if name == "forward grid":
        return [(case, "forward") for case in grid]
    if name == "backward grid":
        return [(case, "backward") for case in grid]
    if name == "short forward":
        return [(case, "forward") for case in SHORT_CASES if not quick or case.q_len != 128]
    if name == "models forward":
        return [(case, "forward") for case in models]
    if name == "models backward":
        return [(case, "backward") for case in models if case.phase == "training"]
    if name == "packed forward":
        return [(case, "forward") for case in packed]
    if name == "packed backward":
        return [(case, "backward") for case in packed]
    if name == "decode":
        return [(case, "forward") for case in cached]
    if name == "features forward":
        return [(case, "forward") for case in FEATURE_CASES]
    if name == "features backward":
        return [(case, "backward") for case in FEATURE_CASES]
    if name == "host":
        return [pair for pair in host_cases() if not quick or "causal" not in pair[0].features]
    if name == "second derivatives":
        return _squared(head_dims, quick, ("double backward", "forward mode"))
    if name == "statistics":
        return _squared(head_dims, quick, ("max logit", "statistics"))
    if name == "fp8":
        return [(case, "fp8") for case in paper_grid(head_dims, QUICK_LENGTHS, "bfloat16")]
    if name == "quantize":  # which no mask concerns
        grid = paper_grid(head_dims, (QUICK_LENGTHS[1],), "bfloat16")
        return [(case, "quantize") for case in grid if "causal" not in case.features]
    if name == "cold start":
        return [(case, "cold start") for case in cold_cases()[: 1 if quick else None]]
    raise ValueError(f"group={name!r} must be one of {', '.join(GROUPS)}")


def _squared(head_dims: tuple[int, ...], quick: bool, works: tuple[Work, ...]) -> list[Comparison]:
    """Each of these works on that part of the papers' grid whose matrix of scores fits into memory."""
    grid = paper_grid(head_dims[:2], (1024,) if quick else SQUARED_LENGTHS, "bfloat16")
    return [(case, work) for case in grid if not quick or "causal" in case.features for work in works]


def _distinct(found: Iterable[Comparison]) -> list[Comparison]:
    """Those that differ in more than their names and the number of sequences."""
    kept: dict[str, Comparison] = {}
    for case, work in found:
        batch = 1 if case.sequences is None else case.batch
        alike = replace(case, name="", provenance="", phase="encoder", batch=batch)
        kept.setdefault(repr((alike, work)), (case, work))
    return list(kept.values())
