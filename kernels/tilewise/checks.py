"""The contract: what a call must satisfy, one predicate a rule.

A rule looks at a `Request` and returns None, or what is wrong, in words that name the argument, the value
given and what was expected. `violations` runs them all; `attention` raises the first, `why_not` lists them.
Rules look at shapes, dtypes and devices alone, never at the contents of a tensor: reading those would make
the host wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .bounds import UNLIMITED
from .dropout import Dropout
from .hopper import rules as hopper_rules
from .masks import Mask
from .numerics import INTERPRETED
from .problem import FLOATS, Shape, ceil_div
from .quadratic import mebibytes, score_matrix_bytes, stored_pairs
from .scores import Score
from .similarity import Cosine, Similarity, similarity_scores

IMPLEMENTATIONS = ("portable", "hopper", "torch")
MAX_DIM = 256
FINITE = torch.finfo(torch.float32).max  # scores are fp32, and so is what multiplies them


@dataclass(eq=False)
class Request:
    """The arguments of one call to `attention`, with mask and score in their final form. What follows from
    them is worked out when first asked for; by hand, for torch.compile cannot trace `cached_property`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    masks: tuple[Mask, ...]
    scores: tuple[Score, ...]
    scale: float | torch.Tensor | None
    similarity: str | Cosine
    sink: torch.Tensor | None
    impl: str | None
    dropout: Dropout | None = None
    strict: bool = False
    _shape: Shape | None = field(default=None, init=False)
    _similarity_scores: Similarity | None = field(default=None, init=False)
    _other_tensors: list[tuple[str, torch.Tensor]] | None = field(default=None, init=False)

    @property
    def shape(self) -> Shape:
        if self._shape is None:
            (batch, q_heads, q_len, head_dim), (_, kv_heads, kv_len, _) = self.q.shape, self.k.shape
            self._shape = Shape(batch, q_heads, kv_heads, q_len, kv_len, head_dim, self.v.shape[3])
        return self._shape

    @property
    def implementation(self) -> str:
        """The implementation that answers: the one asked for, else a fused kernel wherever one can run."""
        if self.impl is not None:
            return self.impl
        if not INTERPRETED and self.q.device.type not in ("cuda", "meta"):
            return "torch"
        return "hopper" if hopper_rules.is_default(self) else "portable"

    @property
    def plugs(self) -> tuple[Mask | Score, ...]:
        return (*self.masks, *self.scores)

    @property
    def similarity_scores(self) -> Similarity:
        if self._similarity_scores is None:
            in_natural_units = bool(self.scores) or self.sink is not None
            self._similarity_scores = similarity_scores(
                self.q, self.k, self.similarity, self.scale, in_natural_units
            )
        return self._similarity_scores

    @property
    def chain(self) -> tuple[Score, ...]:
        """Every modifier that acts on the dot products, in order."""
        return (*self.similarity_scores.scores, *self.scores)

    def qkv(self) -> dict[str, torch.Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v}

    @property
    def other_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Every tensor besides q, k and v, with the name of its argument: first those of the call itself,
        then those of each part of `plugs`."""
        if self._other_tensors is not None:
            return self._other_tensors
        temperature = self.similarity.temperature if isinstance(self.similarity, Cosine) else None
        seed = None if self.dropout is None else self.dropout.seed
        given = (
            ("scale", self.scale),
            ("temperature", temperature),
            ("sink", self.sink),
            ("dropout_seed", seed),
        )
        found = [(name, value) for name, value in given if isinstance(value, torch.Tensor)]
        for part in self.plugs:
            found += [(f"{type(part).__name__}.{name}", t) for name, t in part.tensors().items()]
        self._other_tensors = found
        return found

    @property
    def needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and (
            self.q.requires_grad
            or self.k.requires_grad
            or self.v.requires_grad
            or any([tensor.requires_grad for _, tensor in self.other_tensors])
        )


# ---- Rules on q, k and v alone; all others may rely on them


def tensors_are_given(r: Request) -> str | None:
    for name, tensor in r.qkv().items():
        if not isinstance(tensor, torch.Tensor):
            return f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor"
        if tensor.layout != torch.strided:
            return f"{name}.layout={tensor.layout} must be torch.strided (a plain dense tensor)"
    return None


def ranks_are_four(r: Request) -> str | None:
    for name, tensor in r.qkv().items():
        if tensor.dim() != 4:
            return f"{name}.shape={tuple(tensor.shape)} must have 4 dimensions, [batch, heads, length, dim]"
    return None


def batches_agree(r: Request) -> str | None:
    q, k, v = r.q.shape[0], r.k.shape[0], r.v.shape[0]
    return None if q == k == v else f"batch sizes q: {q}, k: {k}, v: {v} must be equal"


def kv_heads_agree(r: Request) -> str | None:
    k, v = r.k.shape[1], r.v.shape[1]
    return None if k == v else f"head counts k: {k}, v: {v} must be equal"


def heads_have_a_whole_ratio(r: Request) -> str | None:
    q_heads, kv_heads = r.q.shape[1], r.k.shape[1]
    if q_heads >= 1 and kv_heads >= 1 and q_heads % kv_heads == 0:
        return None
    return f"{q_heads=} must be a multiple of {kv_heads=}, and neither may be 0"


def kv_lengths_agree(r: Request) -> str | None:
    k, v = r.k.shape[2], r.v.shape[2]
    return None if k == v else f"lengths k: {k}, v: {v} must be equal"


def lengths_are_indexable(r: Request) -> str | None:
    q_len, kv_len = r.q.shape[2], r.k.shape[2]
    return None if max(q_len, kv_len) < UNLIMITED else f"{q_len=} and {kv_len=} must be below {UNLIMITED}"


def grid_is_launchable(r: Request) -> str | None:
    batch, q_heads, q_len, _ = r.q.shape
    programs = batch * q_heads * ceil_div(q_len, 16)
    if programs < 1 << 31:
        return None
    return f"{batch=} · {q_heads=} · {q_len=} needs {programs} programs, above 2³¹ - 1: split the batch"


def head_dims_agree(r: Request) -> str | None:
    q, k = r.q.shape[3], r.k.shape[3]
    return None if q == k else f"head_dim of q: {q}, k: {k} must be equal"


def dims_are_supported(r: Request) -> str | None:
    head_dim, value_dim = r.q.shape[3], r.v.shape[3]
    if 1 <= head_dim <= MAX_DIM and 1 <= value_dim <= MAX_DIM:
        return None
    return f"{head_dim=} and {value_dim=} must be from 1 to {MAX_DIM}"


def dtypes_agree(r: Request) -> str | None:
    q, k, v = r.q.dtype, r.k.dtype, r.v.dtype
    return None if q == k == v else f"dtypes q: {q}, k: {k}, v: {v} must be equal; cast them to one"


def dtype_is_supported(r: Request) -> str | None:
    if r.q.dtype in FLOATS:
        return None
    return f"q.dtype={r.q.dtype} must be torch.float16, torch.bfloat16 or torch.float32"


def devices_agree(r: Request) -> str | None:
    q, k, v = r.q.device, r.k.device, r.v.device
    return None if q == k == v else f"devices q: {q}, k: {k}, v: {v} must be equal"


# ---- Rules on everything else


def scale_is_a_number(r: Request) -> str | None:
    if r.scale is None or (isinstance(r.scale, torch.Tensor) and r.scale.dim() == 0):
        return None
    if isinstance(r.scale, (int, float)) and abs(r.scale) <= FINITE:
        return None
    given = tuple(r.scale.shape) if isinstance(r.scale, torch.Tensor) else r.scale
    return f"scale={given} must be None, a finite number or a tensor without dimensions"


def similarity_is_known(r: Request) -> str | None:
    if isinstance(r.similarity, Cosine) or r.similarity in ("dot", "scaled_dot", "cosine"):
        return None
    return f"similarity={r.similarity!r} must be 'dot', 'scaled_dot', 'cosine' or Cosine(temperature)"


def temperature_fits(r: Request) -> str | None:
    if not isinstance(r.similarity, Cosine):
        return None
    given, q_heads = r.similarity.temperature, r.q.shape[1]
    if isinstance(given, torch.Tensor):
        if tuple(given.shape) == (q_heads,):
            return None
        return f"temperature.shape={tuple(given.shape)} must be [{q_heads}], one a query head"
    if isinstance(given, (int, float)) and abs(given) <= FINITE:
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
        if name in ("scale", "temperature", "sink") and tensor.dtype not in FLOATS:
            return f"{name}.dtype={tensor.dtype} must be torch.float16, torch.bfloat16 or torch.float32"
    return None


def other_devices_agree(r: Request) -> str | None:
    for name, tensor in r.other_tensors:
        if tensor.device != r.q.device:
            return f"{name} is on {tensor.device}, q on {r.q.device}: move it with .to(q.device)"
    return None


def masks_and_scores_fit(r: Request) -> str | None:
    return "; ".join(f"{type(p).__name__}: {why}" for p in r.plugs for why in p.misfits(r.shape)) or None


def implementation_is_known(r: Request) -> str | None:
    if r.impl is None or r.impl in IMPLEMENTATIONS:
        return None
    return f"impl={r.impl!r} must be None (choose for me) or one of {IMPLEMENTATIONS}"


def kernel_can_run(r: Request) -> str | None:
    device, impl = r.q.device.type, r.implementation
    if impl == "torch" or device in ("cuda", "meta") or (INTERPRETED and device == "cpu"):
        return None
    if device == "cpu":
        return (
            f"{impl=} on CPU tensors runs in Triton's interpreter: set TRITON_INTERPRET=1 in the "
            "environment before tilewise is imported, or leave impl=None for plain PyTorch"
        )
    return f"{impl=} cannot run on {r.q.device}: it needs a CUDA or ROCm GPU; give impl='torch'"


def hopper_can_answer(r: Request) -> str | None:
    if r.impl != "hopper":
        return None
    found = "; ".join(hopper_rules.reasons(r))
    return f"impl='hopper': {found}; leave impl=None for the portable kernel" if found else None


def twins_exist(r: Request) -> str | None:
    """The plain PyTorch path needs every user function in PyTorch too."""
    if r.implementation != "torch":
        return None
    for part in r.plugs:
        try:
            part.twin(r.shape)
        except ValueError as error:
            return str(error)
    return None


def memory_is_linear(r: Request) -> str | None:
    """strict=True refuses whatever holds a number for every pair of query and key."""
    if not r.strict:
        return None
    if r.implementation == "torch":
        size = mebibytes(score_matrix_bytes(r.shape))
        return (
            f"strict=True, and plain PyTorch (impl={r.impl!r} on {r.q.device.type}) holds a score matrix "
            f"{r.shape.scores} in fp32, {size}: use a GPU, or set TRITON_INTERPRET=1 in the environment "
            "before tilewise is imported, or leave strict out"
        )
    return stored_pairs(r.plugs, r.shape)


def gradients_exist(r: Request) -> str | None:
    """The plain PyTorch path differentiates what its twins compute; the kernels need the derivatives."""
    if r.implementation == "torch" or not r.needs_gradient:
        return None
    for part in r.masks:
        for name, tensor in part.tensors().items():
            if tensor.requires_grad:
                return f"{type(part).__name__}.{name} requires a gradient, and a mask has none: detach() it"
    for score in r.scores:
        why_not, trained = score.no_gradient(), score.parameters(r.shape)
        if why_not is not None:
            return why_not
        for name, tensor in score.tensors().items():
            if tensor.requires_grad and name not in trained:
                given = f"{type(score).__name__}.{name}"
                return (
                    f"{given} requires a gradient, and no derivative with respect to it is known: give "
                    "UserScore(..., parameters={position: (axes, derivative)}), or detach() it"
                )
    return None


def dropout_fits(r: Request) -> str | None:
    if r.dropout is None:
        return None
    p, seed = r.dropout
    if not (isinstance(p, (int, float)) and 0 <= p < 1):
        return f"dropout_p={p!r} must be a number from 0 to below 1"
    if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        given = f"{tuple(seed.shape)} of {seed.dtype}" if isinstance(seed, torch.Tensor) else repr(seed)
        return f"dropout_seed={given} must be a tensor of one torch.int64 number, on q's device"
    return None


Rule = Callable[[Request], "str | None"]
# In stages: a rule may rely on those of the stages before its own.
STAGES: tuple[tuple[Rule, ...], ...] = (
    (tensors_are_given,),
    (ranks_are_four,),
    (
        batches_agree,
        kv_heads_agree,
        heads_have_a_whole_ratio,
        kv_lengths_agree,
        lengths_are_indexable,
        grid_is_launchable,
        head_dims_agree,
        dims_are_supported,
        dtypes_agree,
        dtype_is_supported,
        devices_agree,
    ),
    (
        scale_is_a_number,
        similarity_is_known,
        temperature_fits,
        sink_fits,
        parameters_are_floating,
        other_devices_agree,
        masks_and_scores_fit,
        implementation_is_known,
        kernel_can_run,
        hopper_can_answer,
        twins_exist,
        dropout_fits,
        memory_is_linear,
    ),
    (gradients_exist,),
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
        r.impl == "hopper" and hopper_rules.looks(r),
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
