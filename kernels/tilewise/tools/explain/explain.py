"""What will a call to `attention` do, and what bounds it? Answered without a GPU, and without running it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from ...parts.fp8 import FP8
from ...parts.numerics import INTERPRETED
from ...parts.plug import Plug
from ...parts.shape import Cache, ceil_div, computed_in
from ...plan import tiles
from ...plan.checks import OF_TENSORS, first_violation, violations
from ...plan.implementation import IMPLEMENTATIONS, implementation
from ...plan.names import CACHED_ARGUMENTS, NEW, PACKED_ARGUMENTS, refuse_unknown
from ...plan.request import Request, as_heads, as_packing, cached_request, make_request, without_drawing
from ...plan.rules import hopper as hopper_rules
from ...plan.rules.cache import new_misfits
from ...plan.rules.implementations import implementation_is_known
from ...plan.tiles import architecture, choose_tile, multiplies_fp8
from ...pytorch.nested import is_nested, unpack
from ...pytorch.plain import score_bytes
from ..chips import Chip, chip_of_target, find_chip
from .as_workload import as_workload, notes
from .coverage import has_contents, pairs_that_count
from .findings import Cached, Findings, Packed, Work
from .memory import memory_of
from .parts import Parts
from .splits import split_of
from .suggestions import Look, suggestions
from .text import plain_text
from .workload import Allocation, Kernel, Workload, kernels_of

Tensor = torch.Tensor


class Explanation(Findings):
    """What `explain` found: print it to read it; `to_dict` is for JSON."""

    def __str__(self) -> str:
        return plain_text(self)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor | None = None,
    kv_offsets: Tensor | None = None,
    kv_lens: Tensor | None = None,
    pages: Tensor | None = None,
    split_size: int | None = None,
    gpu: str | None = None,
    work: Work = "forward",
    **arguments: Any,
) -> Explanation:
    """What `attention(q, k, v, **arguments)` will do, and what bounds it on a GPU. Runs no attention.

    q, k, v:   as for `attention`; with offsets, as for `packed_attention`. Meta and fake tensors will do:
               their shapes, strides and dtypes are looked at. With meta ones the other tensors may be
               anywhere; masks and offsets are counted from their contents.
    q_offsets, kv_offsets: those of `packed_attention`, which is then what is explained. They are read, so the
               host waits for the GPU; without contents they stand for sequences of equal length.
    kv_lens, pages, split_size: those of `cached_attention`, which is then what is explained, with the caches
               for k and v. kv_lens is read too; without contents every sequence fills its part of the cache.
               new_k, new_v and rotary may be given, but what they add is not counted.
    gpu:       the chip to explain it for: "H200", "A100", "MI300X", ... None: the GPU of q, else the current
               one, else an H200, which the explanation calls assumed.
    work:      "forward", as in inference; "training": with the backward, for gradients of q, k, v and of
               those of the other tensors that require one.
    arguments: those of `attention`.

    Raises what `attention` raises for arguments that no implementation takes or knows, and ValueError for an
    unknown gpu or work, and for offsets that decrease or lead out of the tensors.
    """
    if work not in ("forward", "training"):
        raise ValueError(f"{work=} must be 'forward' or 'training'")
    refuse_unknown("explain", arguments, [*PACKED_ARGUMENTS, *CACHED_ARGUMENTS, "gpu", "work"])
    return_lse = bool(arguments.pop("return_lse", False))
    if kv_lens is not None:
        if kv_offsets is not None:
            refuse_unknown("cached_attention", ["kv_offsets"], CACHED_ARGUMENTS)
        return explain_cached(
            q, k, v, gpu, work, return_lse,
            dict(kv_lens=kv_lens, pages=pages, q_offsets=q_offsets, split_size=split_size, **arguments),
        )  # fmt: skip
    if pages is not None or split_size is not None or {*NEW} & {*arguments}:
        raise ValueError(f"pages, split_size, {', '.join(NEW)} go with kv_lens, as in cached_attention")
    if q_offsets is not None or kv_offsets is not None:
        q, k, v = as_heads(q, k, v)
        arguments["packing"] = as_packing(q_offsets, kv_offsets)
    elif is_nested(q, k, v):
        q, k, v, arguments["packing"] = unpack(q, k, v)
    if work == "training" and arguments.get("scales") is not None:
        raise ValueError("fp8 has a forward alone: explain a call with scales with work='forward'")
    if work == "training" and isinstance(q, Tensor) and q.is_floating_point():
        q = q.detach().requires_grad_()
    with torch.set_grad_enabled(work == "training"):
        request = make_request(q, k, v, **without_drawing(q, arguments))
        with unset_fake_temporarily():
            return explain_request(request, gpu, work, return_lse)


def explain_cached(
    q: Tensor, k: Tensor, v: Tensor, gpu: str | None, work: Work, return_lse: bool, arguments: dict[str, Any]
) -> Explanation:
    if work == "training":
        raise ValueError("cached_attention has no gradient: explain it with work='forward'")
    new = [arguments.pop(name, None) for name in NEW]
    with torch.no_grad():
        request = cached_request(q, k, v, **without_drawing(q, arguments))
        with unset_fake_temporarily():
            found = explain_request(request, gpu, work, return_lse)
    for reason in new_misfits(request, *new):
        raise ValueError(reason)
    if all(x is None for x in new):
        return found
    return replace(found, notes=(*found.notes, "what new_k, new_v and rotary add is not counted"))


def explain_request(request: Request, gpu: str | None, work: Work, return_lse: bool) -> Explanation:
    """`explain` of a request. The mode of gradients is that of `work`."""
    refuse_malformed(request)
    given = on_meta(request) if request.q.is_meta else request
    chip, gpu_because, on_its_gpu = chip_for(request.q, gpu)
    not_hopper = why_not_hopper(request, chip)
    refused = reasons(given, not_hopper)
    on_a_gpu = reasons(replace(on_meta(given), impl="portable", strict=False))
    on_a_gpu = on_a_gpu or why_no_fp8(request, chip)
    if refused and on_a_gpu:
        raise ValueError(refused[0])
    shape, answers = request.shape, implementation(request)
    on_gpu, on_gpu_note = forward_on(chip, request, not_hopper)
    is_hopper = on_gpu == "hopper"
    model = as_workload(request, chip, work == "training", return_lse, on_its_gpu, is_hopper)
    kernels: tuple[Kernel, ...] = ()
    if not on_a_gpu:
        try:
            kernels = kernels_of(model)
        except NotImplementedError as error:  # no tile fits the chip
            on_a_gpu = [str(error)]
    hopper_could = not not_hopper and not is_hopper and request.impl != "torch"
    of_parts = [part.shape for part in model.parts]
    of_scores = "fp64" if computed_in(request.q.dtype) == torch.float64 else "fp32"
    held = score_bytes(request, return_lse, of_parts) if answers == "torch" else 0
    others = {name: why_not_this(given, name) for name in IMPLEMENTATIONS if name != answers}
    if "hopper" in others:  # a word on the chip, not on this machine
        others["hopper"] = "; ".join(on_a_gpu or not_hopper) or why_hopper_waits(request, chip)
    return Explanation(
        work=work,
        device=str(request.q.device),
        implementation=answers,
        because=why_this(request),
        refused=tuple(refused),
        others=others,
        gpu=chip.name,
        gpu_because=gpu_because,
        no_kernels=on_a_gpu[0] if on_a_gpu else "",
        on_gpu=on_gpu,
        on_gpu_note=on_gpu_note,
        sizes={name: size for name, size in shape._asdict().items() if isinstance(size, int)},
        packed=None if shape.packing is None else packed(model.parts),
        cached=None if shape.cache is None else cached(model, shape.cache, bool(kernels)),
        dtype=str(request.q.dtype).removeprefix("torch."),
        pairs=model.parts.pairs,
        pairs_that_count=model.parts.counted(pairs_that_count),
        exact=not model.parts.unknown,
        notes=tuple(notes(request, model)),
        kernels=kernels,
        memory=memory_of(model) if kernels else (),
        memory_here=(Allocation(f"score matrices in {of_scores}, several of", held, "during the call"),)
        if held
        else (),
        suggestions=suggestions(Look(request, model, kernels, hopper_could)) if kernels else (),
    )


def packed(parts: Parts) -> Packed:
    """The sequences that these are."""
    shapes = [part.shape for part in parts]
    lengths = [(shape.q_len, shape.kv_len) for shape in shapes]
    tokens = [sum(shape.batch * each[i] for shape, each in zip(shapes, lengths, strict=True)) for i in (0, 1)]
    q_lens, kv_lens = zip(*lengths, strict=True)
    return Packed(
        sequences=sum(shape.batch for shape in shapes),
        tokens=(tokens[0], tokens[1]),
        shortest=(min(q_lens), min(kv_lens)),
        longest=(max(q_lens), max(kv_lens)),
        assumed=parts.assumed,
    )


def cached(model: Workload, cache: Cache, has_kernels: bool) -> Cached:
    """The cache that the model's parts are of. Without kernels nothing is split."""
    shapes = [part.shape for part in model.parts]
    lengths = [shape.kv_len for shape in shapes]
    split, split_keys = None, max(lengths, default=0)
    if has_kernels and (split := model.split()) is not None:
        tile, _ = model.choose(model.element_bytes, "forward")
        longest = [split_of(part, split, tile.tile_kv)[0] for part in model.parts]
        split_keys = min(split_keys, max(longest, default=0))
    size = None if cache.pages is None else cache.pages.page_size
    return Cached(
        sequences=model.shape.batch,
        capacity=model.shape.kv_len,
        keys=sum(shape.batch * shape.kv_len for shape in shapes),
        shortest=min(lengths, default=0),
        longest=max(lengths, default=0),
        assumed=not has_contents(cache.kv_lens),
        page_size=size,
        pages=None if cache.pages is None else cache.pages.page_count,
        pages_in_use=size and sum(shape.batch * ceil_div(shape.kv_len, size) for shape in shapes),
        rows=max((shape.q_len * shape.group for shape in shapes), default=0),
        splits=1 if split is None else split.programs,
        split_keys=split_keys,
    )


def refuse_malformed(request: Request) -> None:
    """Raise the first thing that is wrong with q, k, v or impl: then there is nothing to explain."""
    first_violation(request, (*OF_TENSORS, (implementation_is_known, ())))


def reasons(request: Request, not_hopper: Iterable[str] = ()) -> list[str]:
    """Every rule that the request breaks; of fake tensors, within their own mode. Those have no GPU that
    Hopper's forward could look at: its own rules have been asked before, and say `not_hopper`."""
    if not isinstance(request.q, FakeTensor):
        return [str(violation) for violation in violations(request)]
    is_hopper = request.impl == "hopper"
    with request.q.fake_mode:
        asked = replace(request, impl="portable") if is_hopper else request
        found = [str(violation) for violation in violations(asked)]
    return found or [f"impl='hopper': {reason}" for reason in not_hopper if is_hopper]


def on_meta(request: Request) -> Request:
    """The request with every tensor on the meta device, where all rules but those on devices say the same."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to("meta").requires_grad_(value.requires_grad)
        if isinstance(value, tuple):
            return type(value)(*map(moved, value)) if hasattr(value, "_fields") else tuple(map(moved, value))
        return part_moved(value) if isinstance(value, Plug) else value

    def part_moved(part: Any) -> Any:
        clone = copy.copy(part)
        for name, value in vars(part).items():
            setattr(clone, name, moved(value))
        return clone

    changed: dict[str, Any] = {
        name: moved(getattr(request, name))
        for name in ("q", "k", "v", "scale", "similarity", "sink", "dropout", "packing", "cache", "scales")
    }
    for name in ("masks", "scores"):
        changed[name] = tuple(map(part_moved, getattr(request, name)))
    return replace(request, **changed)


def why_no_fp8(request: Request, chip: Chip) -> list[str]:
    """Why the chip multiplies no such numbers, where the call has them."""
    if request.scales is None or multiplies_fp8(chip.arch):
        return []
    return [f"{FP8} needs an NVIDIA GPU of sm_90 or newer, and {chip.name} is {chip.arch}"]


# ---- Hopper's forward


def why_not_hopper(request: Request, chip: Chip) -> list[str]:
    """The rules of Hopper's forward that the request breaks; the one on GPUs is asked about the chip."""
    if chip.arch != "sm_90":
        return [f"it needs a Hopper GPU (sm_90), and {chip.name} is {chip.arch}"]
    broken = [rule(request) for rule in hopper_rules.RULES if rule is not hopper_rules.chip_is_hopper]
    return [reason for reason in broken if reason is not None]


def forward_on(chip: Chip, request: Request, not_hopper: list[str]) -> tuple[str, str]:
    """Whose forward the chip runs, where one of the kernels answers there, and what to know of it."""
    if request.impl == "hopper" and not_hopper:
        return "portable", f"impl='hopper' cannot answer there: {'; '.join(not_hopper)}"
    if request.impl == "hopper":
        return "hopper", "" if is_proven(request, chip) else "Hopper's forward has not run on a GPU yet"
    if request.impl is None and not not_hopper and is_proven(request, chip):
        return "hopper", "Hopper's forward answers there: a GPU has shown that it is right and faster"
    return "portable", ""


def is_proven(request: Request, chip: Chip) -> bool:
    """Whether Hopper's forward answers such calls on the chip without being asked for."""
    return tiles.is_hopper_proven(chip.arch, request.q.element_size(), request.shape)


def why_hopper_waits(request: Request, chip: Chip) -> str:
    """Why it does not answer a call that it could answer on the chip."""
    if not is_proven(request, chip):
        return "it must be asked for, impl='hopper': no GPU has shown yet that it is right and faster"
    if request.impl is not None:
        return f"it could; impl={request.impl!r} asks for another"
    return f"it does on an {chip.name}"


# ---- Why this one, and why no other


def why_this(request: Request) -> str:
    """Why this implementation is the one that answers."""
    device = request.q.device
    if request.impl is not None:
        return f"impl={request.impl!r} asks for it"
    if request.q.dtype == torch.float64:
        return "q is in float64, in which no kernel computes"
    if implementation(request) == "torch":
        return "q is on the CPU, and Triton's interpreter is off"
    if INTERPRETED and not request.q.is_meta:
        tile = choose_tile(request.q, request.shape, "forward")
        return (
            f"Triton's interpreter is on, and runs the kernels on the CPU, with tiles of {tile.tile_q} × "
            f"{tile.tile_kv}"
        )
    if request.q.is_meta:
        return "q is a meta tensor, which gets the shapes that the kernels give"
    return f"q is on {device}, where the fused kernels run"


def why_not_this(request: Request, name: str) -> str:
    """Why another implementation does not answer: it cannot, or the one that does goes first."""
    against = reasons(replace(request, impl=name))
    if against:
        return "; ".join(against)
    if request.impl is not None:
        return f"it could; impl={request.impl!r} asks for another"
    return "it could; its scores all go through memory, so it serves only where no kernel can run"


def chip_for(q: Tensor, gpu: str | None) -> tuple[Chip, str, bool]:
    """The chip to explain a call for, why this one, and whether q is on it."""
    if gpu is not None:
        return find_chip(gpu), "as asked for", False
    if torch.cuda.is_available():
        own = q.is_cuda and has_contents(q)
        device = q.device if own else torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
        where = "the GPU that q is on" if own else "this machine's GPU"
        try:
            return find_chip(name), where, own
        except ValueError:
            chip = chip_of_target(architecture(device))
            return chip, f"{where} is {name}, whose figures are not known: those of {chip.name} stand in", own
    return find_chip("H200"), "assumed, for there is no GPU here and none was named", False
