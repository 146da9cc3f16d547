"""Rules on what makes scores: scale, similarity, sink, masks and modifiers; and on dropout."""

from __future__ import annotations

import torch

from ...parts.aligned import Aligned
from ...parts.hints import nearest, with_hint
from ...parts.masks.documents import Documents
from ...parts.masks.padding import Padding
from ...parts.scores.user import UserScore
from ...parts.shape import PARAMETERS, computed_in
from ...parts.similarity import Cosine
from ..request import Request

# What a similarity is called elsewhere, and here.
SIMILARITIES = {
    "dot": "dot", "dot_product": "dot", "inner": "dot", "inner_product": "dot", "unscaled": "dot",
    "scaled": "scaled_dot", "scaled_dot": "scaled_dot", "scaled_dot_product": "scaled_dot",
    "cos": "cosine", "cosine": "cosine", "cosine_similarity": "cosine", "normalized": "cosine",
}  # fmt: skip


def scale_is_a_number(r: Request) -> str | None:
    if r.scale is None or (isinstance(r.scale, torch.Tensor) and r.scale.dim() == 0):
        return None
    if isinstance(r.scale, (int, float)) and abs(r.scale) <= largest(r):
        return None
    given = tuple(r.scale.shape) if isinstance(r.scale, torch.Tensor) else r.scale
    return f"scale={given} must be None, a finite number or a tensor without dimensions"


def largest(r: Request) -> float:
    """The largest number of the scores' dtype, which is that of what multiplies them."""
    dtype = r.q.dtype if isinstance(r.q, torch.Tensor) else torch.float32
    return torch.finfo(computed_in(dtype)).max


def similarity_is_known(r: Request) -> str | None:
    if isinstance(r.similarity, Cosine) or r.similarity in ("dot", "scaled_dot", "cosine"):
        return None
    wanted = f"similarity={r.similarity!r} must be 'dot', 'scaled_dot', 'cosine' or Cosine(temperature)"
    if isinstance(r.similarity, str):
        near = nearest(r.similarity, SIMILARITIES)
        return with_hint(wanted, f"did you mean {SIMILARITIES[near]!r}?" if near else "")
    return with_hint(wanted, "give tilewise.Cosine() with its brackets" if r.similarity is Cosine else "")


def temperature_fits(r: Request) -> str | None:
    if not isinstance(r.similarity, Cosine):
        return None
    given, q_heads = r.similarity.temperature, r.q.shape[1]
    if isinstance(given, torch.Tensor):
        if tuple(given.shape) == (q_heads,):
            return None
        return f"temperature.shape={tuple(given.shape)} must be [{q_heads}], one a query head"
    if isinstance(given, (int, float)) and abs(given) <= largest(r):
        return None
    return f"temperature={given!r} must be a finite number or a tensor [{q_heads}]"


def sink_fits(r: Request) -> str | None:
    if r.sink is None:
        return None
    q_heads = r.q.shape[1]
    if isinstance(r.sink, torch.Tensor) and tuple(r.sink.shape) == (q_heads,):
        return None
    given = tuple(r.sink.shape) if isinstance(r.sink, torch.Tensor) else r.sink
    return f"sink={given} must be a tensor [{q_heads}], one logit a query head"


def parameters_are_floating(r: Request) -> str | None:
    """scale, temperature and sink enter scores, so they come in a dtype that scores may have."""
    for name, tensor in r.other_tensors:
        if name in ("scale", "temperature", "sink") and tensor.dtype not in PARAMETERS:
            return f"{name}.dtype={tensor.dtype} must be torch.float16, torch.bfloat16 or torch.float32"
    return None


def float64_is_of_one_piece(r: Request) -> str | None:
    """What scores are made of comes in fp64 only where q, k and v do; a user's function may read any."""
    if r.q.dtype == torch.float64:
        return None
    of_users = {s.called(name) for s in r.scores if isinstance(s, UserScore) for name in s.tensors()}
    # Those of fp8 have a rule of their own.
    of_users |= {f"scales.{name}" for name in "qkv"}
    of_masks = {mask.called(name) for mask in r.masks for name in mask.tensors()}
    for name, tensor in r.other_tensors:
        if tensor.dtype == torch.float64 and name not in of_users | of_masks:
            return (
                f"{name}.dtype=torch.float64 goes with q, k and v in torch.float64, and q is {r.q.dtype}: "
                "give it in torch.float16, torch.bfloat16 or torch.float32"
            )
    return None


def other_devices_agree(r: Request) -> str | None:
    for name, tensor in r.other_tensors:
        if tensor.device != r.q.device:
            return f"{name} is on {tensor.device}, q on {r.q.device}: move it with .to(q.device)"
    return None


def masks_and_scores_fit(r: Request) -> str | None:
    return "; ".join(f"{p.called()}: {why}" for p in r.plugs for why in p.misfits(r.whole)) or None


def corners_are_clear(r: Request) -> str | None:
    """Where a sequence's last key need not be the last key there is, a part that counts positions must say
    which it means. Packed sequences and those of a cache have lengths, and corners, of their own."""
    leaves = [leaf for part in r.plugs for leaf in part.leaves()]
    parts = [p for p in leaves if isinstance(p, Aligned) and p.follows_the_default()]
    if not r.shape.is_dense or not parts:
        return None
    named = " and ".join([p.called() for p in parts])
    q_len, kv_len = r.whole.q_len, r.whole.kv_len
    for mask in leaves:
        if isinstance(mask, Padding) and mask.side == "right" and q_len != kv_len:
            return (
                f"{named} beside Padding, with {q_len=} and {kv_len=}: the last query may stand at the last "
                "real key, which is align=kv_lens - q_len, or at the last of all, which is "
                "align='bottom_right'; say which"
            )
        if isinstance(mask, Documents) and not mask.are_alike:
            return (
                f"{named} beside Documents with kv_ids: the last query of a document may stand at its last "
                "key, which is what packed_attention does, or the last of all at the last of all, which is "
                "align='bottom_right'; or give the key position of query 0 as align"
            )
    return None


def deterministic_is_a_bool(r: Request) -> str | None:
    if isinstance(r.deterministic, bool):
        return None
    return f"deterministic={r.deterministic!r} must be True or False"


PARTED = ("sequences", "query heads", "queries", "keys")  # a call may be a part of a larger one's


def part_lies_inside(r: Request) -> str | None:
    """Such a part ends where the whole does, and drops its pairs four keys at a time."""
    if r.place is None:
        return None
    sizes = r.shape.batch, r.shape.q_heads, r.shape.q_len, r.shape.kv_len
    for name, first, size, full in zip(PARTED, r.place.origin, sizes, r.whole.scores, strict=True):
        if first < 0 or first + size > full:
            return f"the part's {name} {first} to {first + size} must lie in the whole call's 0 to {full}"
    if r.dropout is not None and r.place.first_key % 4:
        return (
            f"dropout_p={r.dropout.p} draws for four keys at once, and a part begins at key "
            f"{r.place.first_key}: cut the sequence at multiples of 4"
        )
    return None


def dropout_fits(r: Request) -> str | None:
    if r.dropout is None:
        return None
    p, seed = r.dropout
    if not (isinstance(p, (int, float)) and 0 <= p <= 1):
        return f"dropout_p={p!r} must be a number from 0 to 1"
    if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        given = f"{tuple(seed.shape)} of {seed.dtype}" if isinstance(seed, torch.Tensor) else repr(seed)
        return f"dropout_seed={given} must be a tensor of one torch.int64 number, on q's device"
    return None
