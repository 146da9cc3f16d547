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
from .request import Request
from .rules import hopper, implementations, options, tensors

Rule = Callable[[Request], "str | None"]


# In stages: a rule may rely on those of the stages before its own.
STAGES: tuple[tuple[Rule, ...], ...] = (
    (tensors.tensors_are_given,),
    (tensors.ranks_are_four,),
    (
        tensors.batches_agree,
        tensors.kv_heads_agree,
        tensors.heads_have_a_whole_ratio,
        tensors.kv_lengths_agree,
        tensors.lengths_are_indexable,
        tensors.grid_is_launchable,
        tensors.head_dims_agree,
        tensors.dims_are_supported,
        tensors.dtypes_agree,
        tensors.dtype_is_supported,
        tensors.devices_agree,
    ),
    (
        options.scale_is_a_number,
        options.similarity_is_known,
        options.temperature_fits,
        options.sink_fits,
        options.parameters_are_floating,
        options.other_devices_agree,
        options.masks_and_scores_fit,
        implementations.implementation_is_known,
        implementations.kernel_can_run,
        implementations.hopper_can_answer,
        implementations.twins_exist,
        options.dropout_fits,
        implementations.memory_is_linear,
    ),
    (implementations.gradients_exist,),
)


def check(request: Request) -> None:
    """Raise the first thing that is wrong. A request that looks like one that has passed is not looked at
    again: rules read shapes, dtypes, devices and options, and so does `looks`."""
    if torch.compiler.is_compiling():
        for violation in violations(request):
            raise violation
        return
    try:
        key = looks(request)
        if key in _passed:
            return
    except (AttributeError, TypeError):  # an argument of a wrong type: the rules know which
        key = None
    for violation in violations(request):
        raise violation
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
        r.strict and tuple([t.stride() for _, t in r.other_tensors]),
        r.impl == "hopper" and hopper.looks(r),
    )  # fmt: skip


def violations(request: Request) -> Iterator[ValueError]:
    """An exception for every rule that the request breaks, up to the first stage with a broken one: what
    comes after it cannot be judged."""
    broken = False
    for rules in STAGES:
        for rule in rules:
            reason = rule(request)
            if reason is not None:
                broken = True
                yield ValueError(reason)
        if broken:
            return
