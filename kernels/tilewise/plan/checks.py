"""The contract: what a call must satisfy, one predicate a rule.

A rule looks at a `Request` and returns None, or what is wrong, in words that name the argument, the value
given and what was expected. `violations` runs them all; `attention` raises the first, `why_not` lists them.
Rules look at shapes, dtypes and devices alone, never at the contents of a tensor: reading those would make
the host wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..parts.numerics import INTERPRETED
from ..parts.similarity import Cosine
from .implementation import is_watched
from .request import Request
from .rules import cache, fp8, hopper, implementations, options, sharding, tensors

Rule = Callable[[Request], "str | None"]

GIVEN = (tensors.tensors_are_given,)
RANKS = (*GIVEN, tensors.ranks_are_four)
PACKED = (*RANKS, tensors.offsets_fit)
SIZES = (*PACKED, tensors.batches_agree, tensors.kv_lengths_agree)
KNOWN = (*RANKS, implementations.implementation_is_known)
OF_TENSORS: tuple[tuple[Rule, tuple[Rule, ...]], ...] = (
    (tensors.tensors_are_given, ()),
    (tensors.ranks_are_four, GIVEN),
    (tensors.offsets_fit, ()),
    (tensors.tokens_agree, PACKED),
    (cache.lengths_fit, PACKED),
    (cache.pages_fit, PACKED),
    (cache.split_size_fits, ()),
    (tensors.batches_agree, RANKS),
    (tensors.kv_heads_agree, RANKS),
    (tensors.heads_have_a_whole_ratio, RANKS),
    (tensors.kv_lengths_agree, RANKS),
    (tensors.lengths_are_indexable, RANKS),
    (tensors.grid_is_launchable, PACKED),
    (tensors.head_dims_agree, RANKS),
    (tensors.dims_are_supported, RANKS),
    (tensors.dtypes_agree, GIVEN),
    (tensors.dtype_is_supported, GIVEN),
    (tensors.devices_agree, GIVEN),
    (fp8.scales_are_given, GIVEN),
)
TENSORS = tuple(rule for rule, _ in OF_TENSORS)
FITTING_PARTS = (*SIZES, options.masks_and_scores_fit)
FITTING = (*TENSORS, options.masks_and_scores_fit, implementations.implementation_is_known)
# Each rule with those that it relies on: it is asked only where none of these is broken.
RULES: tuple[tuple[Rule, tuple[Rule, ...]], ...] = (
    *OF_TENSORS,
    (options.scale_is_a_number, ()),
    (options.similarity_is_known, ()),
    (options.temperature_fits, RANKS),
    (options.sink_fits, RANKS),
    (options.parameters_are_floating, ()),
    (options.float64_is_of_one_piece, GIVEN),
    (options.other_devices_agree, GIVEN),
    (options.part_lies_inside, SIZES),
    (options.masks_and_scores_fit, SIZES),
    (options.corners_are_clear, FITTING_PARTS),
    (implementations.implementation_is_known, ()),
    (implementations.kernel_can_run, KNOWN),
    (implementations.hopper_can_answer, FITTING),
    (implementations.twins_exist, FITTING),
    (options.dropout_fits, ()),
    (options.deterministic_is_a_bool, ()),
    (implementations.memory_is_linear, FITTING),
)
RULES += ((cache.cache_has_no_gradient, SIZES), (sharding.sharding_fits, SIZES))
RULES += (
    (fp8.scales_fit, (*SIZES, cache.pages_fit)),
    (fp8.chip_multiplies_fp8, KNOWN),
    (fp8.fp8_has_no_gradient, SIZES),
    (fp8.fp8_is_plain, SIZES),
)
RULES += ((implementations.gradients_exist, tuple(rule for rule, _ in RULES)),)


def check(request: Request) -> None:
    """Raise the first thing that is wrong. A request that looks like one that has passed is not looked at
    again: rules read shapes, dtypes, devices and options, and so does `looks`."""
    if torch.compiler.is_compiling():
        first_violation(request)
        return
    try:
        key = looks(request)
        if key in _passed:
            return
    except (AttributeError, TypeError):  # an argument of a wrong type: the rules know which
        key = None
    first_violation(request)
    if len(_passed) >= 4096:
        _passed.clear()
    _passed.add(key)


_passed: set[Any] = set()


def looks(r: Request) -> tuple[Any, ...]:
    """Everything that rules look at; hashable."""
    q, k, v = r.q, r.k, r.v
    of_parts = [part.looks() for part in r.plugs]
    if r.other_tensors:
        of_parts.append(tuple([(t.shape, t.dtype, t.device, t.requires_grad) for _, t in r.other_tensors]))
    scale = None if isinstance(r.scale, torch.Tensor) else r.scale
    temperature = r.similarity[0] if isinstance(r.similarity, Cosine) else r.similarity
    return (
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        q.layout, k.layout, v.layout, r.needs_gradient, scale, type(r.scale), type(r.similarity),
        temperature if not isinstance(temperature, torch.Tensor) else None, type(r.sink),
        r.impl, None if r.dropout is None else r.dropout.p, bool(INTERPRETED), *of_parts,
        r.packing is not None and (len(r.packing), r.packing.kv_offsets is None),
        r.cache is not None and (r.cache.split_size, r.cache.pages is not None and r.cache.pages[1:]),
        r.deterministic is True or r.deterministic is False,
        r.strict and (is_watched(), *[t.stride() for _, t in r.other_tensors]),
        r.impl == "hopper" and hopper.looks(r), r.place, sharding.looks(r),
        r.scales is not None and (r.scales[3:], fp8.is_transformed()),
    )  # fmt: skip


def first_violation(request: Request, rules: tuple[tuple[Rule, tuple[Rule, ...]], ...] = RULES) -> None:
    """Raise it, if there is one. No rule relies on one behind it, so the first broken one is sure."""
    for rule, _ in rules:
        reason = rule(request)
        if reason is not None:
            raise ValueError(reason)


def violations(request: Request) -> Iterator[ValueError]:
    """An exception for every rule that the request breaks and that can be judged. Of tensors with too few
    dimensions the others are judged as if the missing ones were there, of size 1."""
    unsure: set[Rule] = set()  # broken, or not asked
    for rule, needs in RULES:
        if not unsure.isdisjoint(needs):
            unsure.add(rule)
            continue
        reason = rule(request)
        if reason is None:
            continue
        yield ValueError(reason)
        widened = tensors.with_four_dimensions(request) if rule is tensors.ranks_are_four else None
        if widened is None:
            unsure.add(rule)
        else:
            request = widened
