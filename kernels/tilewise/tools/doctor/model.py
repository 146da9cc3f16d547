"""What becomes of the attention in a user's model, seen while it runs once.

    a call that tilewise answers        PyTorch's own among them: told by `tilewise.api.watchers`
    one that is passed on to PyTorch    by the switch `tilewise.sdpa`, whose report has the reasons
    attention that is written out       softmax(scores) @ v: a product whose left side comes from a softmax

Calls of other libraries' own kernels are not seen.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ... import api
from ...drop_in import answer as behind_pytorch
from ...drop_in.entry import ANSWERED_BY, PYTORCH, Entry
from ...drop_in.modules import calling_module
from ...drop_in.report import clear, report
from ...drop_in.switch import sdpa
from ...drop_in.text import folded, in_words
from ...plan.implementation import implementation
from ...plan.request import Request
from ..explain.explain import explain_request
from ..explain.findings import Work
from .maker import Made

Tensor = torch.Tensor
WRITTEN_OUT = "written out"
IN_TRANSFORMERS = (
    "call tilewise.integrations.transformers.register(), and give the model attn_implementation='tilewise'"
)
BY_HAND = "call torch.nn.functional.scaled_dot_product_attention there, or tilewise.attention"
SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax}
MARK = "tilewise_weights"  # an attribute of tensors that come from a softmax
TOLD_OF = {api.answer.__code__, behind_pytorch.multi_head.__code__}
PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, torch.einsum}


@dataclass(frozen=True)
class Seen:
    """Calls of attention that have all this in common. entry: as in the report of `tilewise.sdpa`;
    on_gpu: who answers on a GPU, and why; advice: what to change."""

    entry: Entry
    modules: int
    on_gpu: str
    advice: tuple[str, ...]

    @property
    def is_answered(self) -> bool:
        return self.entry.answered_by not in (PYTORCH, WRITTEN_OUT)


@dataclass(frozen=True)
class ModelDiagnosis:
    """What was seen in one run of a model."""

    model: str
    seen: tuple[Seen, ...]

    @property
    def answered(self) -> int:
        return sum(one.entry.calls for one in self.seen if one.is_answered)

    @property
    def calls(self) -> int:
        return sum(one.entry.calls for one in self.seen)

    def to_dict(self) -> dict[str, Any]:
        calls = [asdict(one) | {"entry": one.entry._asdict()} for one in self.seen]
        return {"model": self.model, "calls": self.calls, "answered": self.answered, "seen": calls}


def examine_model(made: Made, training: bool = False, gpu: str | None = None) -> ModelDiagnosis:
    """Run the model once, with tilewise behind PyTorch's own call, and say what becomes of its attention.

    training: with gradients, in training mode. gpu: the chip that advice is for, as in `explain`.
    """
    made.model.train(training)
    requests: dict[Entry, Request] = {}
    counts: Counter[Entry] = Counter()
    written = WrittenOut()

    def watch(request: Request) -> None:
        entry = entry_of(request)
        requests.setdefault(entry, request)
        counts[entry] += 1

    clear()
    with torch.set_grad_enabled(training), watching(watch), written, sdpa():
        made.run()
    work: Work = "training" if training else "forward"
    seen = []
    for one, modules in folded([entry._replace(calls=calls) for entry, calls in counts.items()]):
        request = next(r for e, r in requests.items() if is_among(e, one))
        with torch.set_grad_enabled(training):
            found = explain_request(request, gpu, work, False)
        advice = tuple(suggestion.text for suggestion in found.suggestions)
        on_gpu = found.no_kernels or f"{found.on_gpu} on an {found.gpu} ({found.gpu_because})"
        seen.append(Seen(one, modules, on_gpu, advice))
    passed_on = [entry for entry in report().entries if entry.answered_by == PYTORCH]
    seen += [Seen(one, modules, "", one.reasons) for one, modules in folded(passed_on)]
    by_hand = [entry._replace(calls=calls) for entry, calls in written.found.items()]
    seen += [Seen(one, modules, "", (what_instead(made.model),)) for one, modules in folded(by_hand)]
    return ModelDiagnosis(type(made.model).__name__, tuple(seen))


def is_among(entry: Entry, folded_one: Entry) -> bool:
    """Whether an entry is one of those that were folded into another: they differ in their path at most."""
    return entry._replace(module=None, calls=0) == folded_one._replace(module=None, calls=0)


@contextlib.contextmanager
def watching(watch: Callable[[Request], None]) -> Iterator[None]:
    api.watchers.append(watch)
    try:
        yield
    finally:
        api.watchers.remove(watch)


def entry_of(request: Request) -> Entry:
    """A request as the report of the switch has its calls."""
    dtype = str(request.q.dtype).removeprefix("torch.")
    mask = " & ".join(map(repr, request.masks)) or "no mask"
    scores = [repr(score) for score in request.scores]
    if request.sink is not None:
        scores.append("sink")
    if request.dropout is not None:
        scores.append(f"dropout_p={request.dropout.p}")
    if request.scale is not None:
        scores.append("scale" if isinstance(request.scale, Tensor) else f"scale={request.scale:g}")
    if request.scales is not None:
        each = "each head or all" if request.scales.rows is None else f"each {request.scales.rows} rows"
        scores.append(f"scales of {each}")
    if request.similarity != "scaled_dot":
        scores.append(f"similarity={request.similarity!r}")
    q, k, v = (tuple(x.shape) for x in (request.q, request.k, request.v))
    who = ANSWERED_BY[implementation(request)]
    return Entry(calling_module(), q, k, v, dtype, mask, ", ".join(scores), who, (), False)


def what_instead(model: nn.Module) -> str:
    """What to do about attention that is written out."""
    ways = {getattr(getattr(part, "config", None), "_attn_implementation", None) for part in model.modules()}
    return IN_TRANSFORMERS if ways & {"eager", "flex_attention", "sdpa"} else BY_HAND


class WrittenOut(TorchFunctionMode):
    """Notes products of weights and values where the weights come from a softmax, directly or by functions
    that change no sizes: dropout, a cast, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Entry] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, Tensor)]
        if not isinstance(result, Tensor) or not given:
            return result
        are_weights = hasattr(given[0], MARK)
        if func in SOFTMAX or (are_weights and given[0].numel() == result.numel()):
            setattr(result, MARK, True)
        elif func in PRODUCTS and are_weights and len(given) == 2 and not is_told_of():
            self.note(*given)
        return result

    def note(self, weights: Tensor, v: Tensor) -> None:
        dtype = str(weights.dtype).removeprefix("torch.")
        scores = f"scores {in_words(tuple(weights.shape))}"
        entry = Entry(calling_module(), None, None, tuple(v.shape), dtype, scores, "", WRITTEN_OUT, (), False)
        self.found[entry] += 1


def is_told_of() -> bool:
    """Whether this runs inside a call that is told of in another way."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in TOLD_OF:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
