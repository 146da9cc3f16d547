"""The tensors and arguments of a named case: what benchmarks, tuning and `explain` call `attention` with,
`packed_attention` where the case packs sequences, and `cached_attention` where it has a cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from tilewise_reference import Case

from ..parts.fp8 import Scales, empty_numbers
from ..parts.masks.causal import Causal
from ..parts.masks.dense import Dense
from ..parts.masks.documents import Documents
from ..parts.masks.mask import Mask
from ..parts.masks.window import Window
from ..parts.scores.alibi import ALiBi, alibi_slopes
from ..parts.scores.relative_position import RelativePosition
from ..parts.scores.softcap import Softcap
from ..parts.similarity import Cosine

Tensor = torch.Tensor


class Inputs(NamedTuple):
    """q [batch, q_heads, q_len, head_dim], k, v [batch, kv_heads, kv_len, ...], the keyword arguments of
    `attention`, and by name what is learned besides q, k and v: bias, sink, temperature, slopes, table.

    Where the case packs sequences: q [tokens, q_heads, head_dim], k, v [tokens, kv_heads, ...], and the
    arguments of `packed_attention`, q_offsets among them.

    Where it has a cache: that for k and v, [batch, kv_heads, kv_len, ...] or [pages, page_size, kv_heads,
    ...], and the arguments of `cached_attention`, kv_lens among them."""

    q: Tensor
    k: Tensor
    v: Tensor
    arguments: dict[str, Any]
    learned: dict[str, Tensor]

    def differentiable(self) -> list[Tensor]:
        """The tensors that get a gradient, in order: those that require one."""
        return [x for x in (self.q, self.k, self.v, *self.learned.values()) if x.requires_grad]


# What reads a tensor along queries or keys, or draws anew: no case asks for it of packed sequences.
NOT_PACKED = ("documents", "bool_mask", "bias", "dropout")
WITH_CACHE = ("cache", "page_size", "causal", "window", "softcap", "scale")  # no case asks for more of one


def refuse_sequences(case: Case, what: str) -> None:
    """Raise ValueError where the case packs sequences or has a cache, which `what` does not look at."""
    if case.lengths is not None:
        raise ValueError(f"case {case.name} packs sequences of many lengths, and {what} dense tensors alone")
    if case.cache is not None:
        raise ValueError(f"case {case.name} reads keys and values of a cache, and {what} dense tensors alone")


def packed_offsets(lengths: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Where sequences of these lengths start, one behind the other, int32 [batch + 1]."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


def cached_inputs(
    case: Case, device: torch.device, normal: Callable[..., Tensor], generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """q, the cache, and which of its rows are whose: the pages of all sequences stand in it in no order.

    What lies beyond a sequence's rows is random too.
    """
    assert case.cache is not None
    if other := sorted({*case.features} - {*WITH_CACHE}):
        raise ValueError(f"case {case.name} has a cache, which no case does with {', '.join(other)}")
    q = normal(case.batch, case.q_heads, case.q_len, case.head_dim)
    if q.requires_grad:
        raise ValueError(f"case {case.name} has a cache, and cached_attention has no gradient")
    arguments: dict[str, Any] = {"kv_lens": torch.tensor(case.cache, dtype=torch.int32).to(device)}
    size = case.page_size
    if size is None:
        shape: tuple[int, ...] = (case.batch, case.kv_heads, case.kv_len)
    else:
        used = [-(-rows // size) for rows in case.cache]
        order = torch.randperm(sum(used), generator=generator, device=device).to(torch.int32)
        arguments["pages"] = pad_sequence(order.split(used), batch_first=True)
        shape = (sum(used), size, case.kv_heads)
    return q, normal(*shape, case.head_dim), normal(*shape, case.value_dim), arguments


def fp8_shapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Scales]:
    """What `quantize` makes of these [batch, heads, length, dim], without contents, and so of meta tensors
    too: sizes, strides, dtypes, and a scale for each head. Columns of v lie in one piece, and begin at
    multiples of 16 bytes."""
    (q8, q_scale), (k8, k_scale) = (empty_numbers(x, 0, along_rows=False) for x in (q, k))
    v8, v_scale = empty_numbers(v, 0, along_rows=True)
    return q8, k8, v8, Scales(q_scale, k_scale, v_scale, dtype=q.dtype)


def case_inputs(case: Case, device: torch.device | str, seed: int = 0, gradients: bool = False) -> Inputs:
    """Random normal tensors for `case`, the same for the same seed and device; with `gradients`, q, k and v
    require one, and so does what is learned where the case says that it is trained.

    On the device "meta" nothing is drawn, and nothing is stored. Raises ValueError for a case that asks of
    packed sequences or of a cache what none does here, and for gradients of a cache, which has none.
    """
    device = torch.device(device)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    asks, dtype = case.features, case.torch_dtype
    trained = gradients and asks.get("trained", False)

    def normal(*shape: int, requires_grad: bool = gradients, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return x.requires_grad_(requires_grad)

    learned: dict[str, Tensor] = {}
    arguments: dict[str, Any] = {}
    if case.cache is not None:
        q, k, v, arguments = cached_inputs(case, device, normal, generator)
    elif case.lengths is None:
        q = normal(case.batch, case.q_heads, case.q_len, case.head_dim)
        k = normal(case.batch, case.kv_heads, case.kv_len, case.head_dim)
        v = normal(case.batch, case.kv_heads, case.kv_len, case.value_dim)
    else:
        if other := [name for name in NOT_PACKED if asks.get(name)]:
            raise ValueError(f"case {case.name} packs sequences, which no case does with {', '.join(other)}")
        q = normal(case.tokens, case.q_heads, case.head_dim)
        k = normal(case.tokens, case.kv_heads, case.head_dim)
        v = normal(case.tokens, case.kv_heads, case.value_dim)
        arguments["q_offsets"] = packed_offsets(case.lengths, device)
    masks: list[Mask] = []
    scores: list[Any] = []
    align = asks.get("causal")
    if align is not None:
        masks.append(Causal(align))
    if "window" in asks:
        masks.append(Window(*asks["window"], align=align or "bottom_right"))
    if "documents" in asks:
        masks.append(Documents(case.document_ids().to(device)))
    if asks.get("bool_mask"):
        kept = torch.rand(case.q_len, case.kv_len, generator=generator, device=device) < 0.5
        masks.append(Dense(kept))
    if "relative_position" in asks:
        buckets, most, both = asks["relative_position"]
        learned["table"] = normal(case.q_heads, buckets, requires_grad=trained)
        scores.append(RelativePosition(learned["table"], most, both))
    if asks.get("alibi"):
        slopes = alibi_slopes(case.q_heads, None if device.type == "meta" else device).to(device)
        learned["slopes"] = slopes.requires_grad_(trained)
        scores.append(ALiBi(slopes))
    if "softcap" in asks:
        scores.append(Softcap(asks["softcap"]))
    if "bias" in asks:
        arguments["bias"] = learned["bias"] = normal(*asks["bias"], requires_grad=trained)
    if asks.get("sink"):
        arguments["sink"] = learned["sink"] = normal(case.q_heads, requires_grad=trained)
    if asks.get("temperature"):
        factors = torch.full((case.q_heads,), 10.0, device=device, dtype=torch.float32)
        learned["temperature"] = factors.requires_grad_(trained)
        arguments["similarity"] = Cosine(learned["temperature"])
    elif "similarity" in asks:
        arguments["similarity"] = asks["similarity"]
    if "scale" in asks:
        arguments["scale"] = asks["scale"]
    if "dropout" in asks:
        seed_tensor = torch.full((1,), seed, device=device, dtype=torch.int64)
        arguments |= dict(dropout_p=asks["dropout"], dropout_seed=seed_tensor)
    if scores:
        arguments["score"] = tuple(scores)
    for mask in masks:
        arguments["mask"] = arguments["mask"] & mask if "mask" in arguments else mask
    return Inputs(q, k, v, arguments, learned)
