"""What is a rival to the bench? It says what it cannot do, and prepares a call of what it can."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tilewise.quantized import Quantized
from tilewise.tools.inputs import Inputs
from tilewise.tools.words import in_a_line
from tilewise_reference.cases import Case

from ..results import Work

Tensor = torch.Tensor
View = Callable[[Tensor], Tensor]
# What a work asks of the softmax beside out, by the names of tilewise's Stats.
STATISTICS: dict[Work, tuple[str, ...]] = {
    "max logit": ("max_logit",),
    "statistics": ("max_logit", "entropy", "key_mass"),
}


class UnsupportedError(Exception):
    """What a rival says only when it is asked to run: the reason why this case is not for it."""


def same(x: Tensor) -> Tensor:
    return x


def length_first(x: Tensor) -> Tensor:
    """[batch, heads, length, dim] as [batch, length, heads, dim], and back: a view."""
    return x.transpose(1, 2)


class Known(NamedTuple):
    """What a call gives where statistics of the softmax are asked for: None for those that are not."""

    out: Tensor  # [batch, q_heads, q_len, value_dim]
    max_logit: Tensor | None = None  # [batch, q_heads, q_len]
    entropy: Tensor | None = None  # [batch, q_heads, q_len], in nats
    key_mass: Tensor | None = None  # [batch, kv_heads, kv_len]


@dataclass
class Prepared:
    """A case made ready for one rival, its tensors in the memory layout that it likes best.

    call: the forward; what is timed. For a work of STATISTICS it returns `Known`. leaves: what a gradient is
    taken of, by name: "q", "k", "v" and what is learned. standard: out, or a gradient of q, k or v, as
    [batch, heads, length, dim]; native: the way back. during: what must hold while the call is timed.
    extra_bytes: of what was made ready for the call and the case does not hold, such as a mask written out.
    numbers: of 8 bits, which the call multiplies in place of q, k and v.
    """

    call: Callable[[], Any]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    standard: View = same
    native: View = same
    during: Callable[[], AbstractContextManager[Any]] = nullcontext
    extra_bytes: int = 0
    numbers: Quantized | None = None

    def out(self) -> Tensor:
        return self.standard(self.call())

    def backward(self, do: Tensor) -> Callable[[], Any]:
        """The backward alone, for the gradient `do` of out: the forward is behind it, once."""
        out, do, leaves = self.call(), self.native(do), list(self.leaves.values())
        return lambda: torch.autograd.grad(out, leaves, do, retain_graph=True)

    def double_backward(self, do: Tensor, moves: Sequence[Tensor]) -> Callable[[], Any]:
        """The derivative of the gradients along `moves`, one for each of them in the layout of the case: the
        forward and the backward are behind it, once."""
        leaves = list(self.leaves.values())
        grads = torch.autograd.grad(self.call(), leaves, self.native(do), create_graph=True)
        arriving = [self.native(x) for x in moves]
        return lambda: torch.autograd.grad(grads, leaves, arriving, retain_graph=True)

    def gradients(self, got: Iterable[Tensor]) -> dict[str, Tensor]:
        """What `backward` returned, by name, in the layout of the case."""
        named = zip(self.leaves, got, strict=True)
        return {name: self.standard(x) if name in ("q", "k", "v") else x for name, x in named}


class Implementation(ABC):
    """One way to compute attention."""

    name: str
    module = ""  # what must be importable
    needs_gpu = True
    seeded = False  # drops the pairs that the case's dropout_seed says
    differentiates_once = ""  # why it has no second derivative and no forward mode; empty where it has both
    statistics: tuple[str, ...] = ()  # of its softmax that it returns, as STATISTICS names them
    dtype = ""  # of what it multiplies, if not the case's
    only: tuple[Work, ...] = ()  # what it is for, if not for whatever has no one of its own

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run here at all; None if it can."""
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        if self.module:
            return cannot_import(self.module)
        return None

    @abstractmethod
    def unsupported(self, case: Case, work: Work) -> str | None:
        """Why it cannot do this; None if it can, as far as is known without asking it."""

    def refuses(self, case: Case, work: Work) -> str | None:
        """`unsupported`, and what it says of any case to derivatives that nobody has built for it, to
        statistics that it does not return, and to what it is not for."""
        if self.only and work not in self.only:
            return f"{self.name} is for {' and '.join(self.only)} alone"
        if work == "quantize" and work not in self.only:
            return f"{self.name} makes no fp8 numbers"
        if work in ("double backward", "forward mode") and self.differentiates_once:
            return self.differentiates_once
        missing = [name for name in STATISTICS.get(work, ()) if name not in self.statistics]
        if missing:
            return f"{self.name} returns no {' and no '.join(missing)} of its softmax"
        return self.unsupported(case, work)

    @abstractmethod
    def prepare(self, case: Case, inputs: Inputs, work: Work) -> Prepared:
        """Make the case ready. Raises UnsupportedError where the library turns it down."""

    def __repr__(self) -> str:
        return self.name


def cannot_import(module: str) -> str | None:
    """Why the module cannot be imported. It is only looked for, not imported, where it is missing."""
    top = module.split(".")[0]
    if importlib.util.find_spec(top) is None:
        return f"{top} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a package of another CUDA, or of another torch, fails in its own way
        return f"import {module} fails: {in_a_line(error)}"
    return None


def written_out(x: Any, inputs: Inputs) -> int:
    """Bytes of a tensor, unless it is one of the case's own."""
    if not isinstance(x, Tensor):
        return 0
    masks = inputs.arguments["mask"].parts() if "mask" in inputs.arguments else ()
    given = [*inputs.learned.values(), *(t for mask in masks for t in mask.tensors().values())]
    size = x.untyped_storage().nbytes()
    return 0 if any(x.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in given) else size


def is_backward(work: Work) -> bool:
    return work in ("backward", "double backward", "host forward and backward")


def refusal(case: Case, reasons: dict[str, str]) -> str | None:
    """The reason for the first of the case's features that `reasons` names."""
    found = [reasons[name] for name, asked in case.features.items() if asked and name in reasons]
    return found[0] if found else None


def learns(case: Case, work: Work) -> bool:
    """Whether something besides q, k and v gets a gradient."""
    return is_backward(work) and bool(case.features.get("trained"))


def is_cosine(case: Case) -> bool:
    return case.features.get("similarity") == "cosine"


def scale_of(case: Case) -> float:
    """What multiplies the scores, the temperature aside."""
    by_default = case.head_dim**-0.5 if case.features.get("similarity", "scaled_dot") == "scaled_dot" else 1.0
    return case.features.get("scale", by_default)


def normalized(q: Tensor, k: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and k as a rival without a cosine of its own must be given them: rows of length 1, q times the
    temperature of its head. [batch, heads, length, dim]."""
    unit_q, unit_k = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (q, k))
    if temperature is not None:
        unit_q = unit_q * temperature.float().reshape(-1, 1, 1)
    return unit_q.to(q.dtype), unit_k.to(k.dtype)


def kept_pairs(case: Case, inputs: Inputs) -> Tensor | None:
    """The pairs that the masks keep, bool [q_len, kv_len]; None for all. Written out beside tilewise's own
    masks, so that a mistake in one shows in the other."""
    asks, device = case.features, inputs.q.device
    align = asks.get("causal", "bottom_right")
    moved = case.kv_len - case.q_len if align == "bottom_right" else 0
    position = torch.arange(case.q_len, device=device)[:, None] + moved
    key = torch.arange(case.kv_len, device=device)
    left, right = asks.get("window", (None, None))
    rules: list[Tensor] = []
    if "causal" in asks:
        rules.append(key <= position)
    if left is not None:
        rules.append(key >= position - left)
    if right is not None:
        rules.append(key <= position + right)
    if "documents" in asks:
        ids = case.document_ids().to(device)
        rules.append(ids[:, None] == ids)
    if asks.get("bool_mask"):
        rules.append(dense_mask(inputs))
    if not rules:
        return None
    keep = rules[0]
    for rule in rules[1:]:
        keep = keep & rule
    return None if bool(keep.all()) else keep


def dense_mask(inputs: Inputs) -> Tensor:
    """The bool tensor [q_len, kv_len] that the inputs' mask holds."""
    found = [x for part in inputs.arguments["mask"].parts() for x in part.tensors().values()]
    return next(x for x in found if x.dtype == torch.bool and x.dim() == 2)


def relative_buckets(inputs: Inputs) -> tuple[Tensor, int]:
    """T5's bucket of each distance from -m to m, and m; beyond, the bucket stays the same."""
    score = next(score for score in inputs.arguments["score"] if hasattr(score, "buckets"))
    return score.buckets, score.max_distance
