"""The weights of chosen rows in chosen layers, for `output_attentions=True`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

Tensor = torch.Tensor
Asked = tuple["Tensor | None", "frozenset[int] | None"]
_asked: Asked | None = None  # a plain name, which compilers can read


@contextlib.contextmanager
def attention_rows(
    rows: Tensor | Sequence[int] | None = None, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Inside, a model with attn_implementation="tilewise" takes `output_attentions=True`, and returns as its
    attentions the weights of these rows alone, [batch, heads, rows, kv_len].

    rows: numbers of queries in the call, ints or an integer tensor [rows]; -1 and others that are not there
        give zeros. None: all of them, which takes memory quadratic in length.
    layers: the layers that return weights, by their `layer_idx`; None: all of them. Transformers leaves the
        others out of the attentions.

    The weights are those before dropout, and no gradient flows through them. It holds for all threads of the
    process.
    """
    numbers = None if rows is None else torch.as_tensor(rows, dtype=torch.int64)
    global _asked
    before, _asked = _asked, (numbers, None if layers is None else frozenset(layers))
    try:
        yield
    finally:
        _asked = before


def rows_for(module: torch.nn.Module, query: Tensor) -> Tensor | None:
    """The rows whose weights this layer is asked for; None where it is not."""
    if _asked is None:
        return None
    rows, layers = _asked
    if layers is not None and getattr(module, "layer_idx", None) not in layers:
        return None
    return torch.arange(query.shape[2], device=query.device) if rows is None else rows.to(query.device)


def is_asked() -> bool:
    """Whether an `attention_rows` block is entered."""
    return _asked is not None
