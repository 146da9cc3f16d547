"""What is a packed case, or one with a cache, to whoever knows dense tensors alone, as the oracle does? Its
sequences, one by one.

A dense case is one piece, which is all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilewise.tools.inputs import Inputs
from tilewise_reference.cases import Case

Tensor = torch.Tensor


def split(case: Case, x: Tensor) -> tuple[Tensor, ...]:
    """[tokens, heads, dim] as a view [1, heads, length, dim] of each sequence."""
    if case.lengths is None:
        return (x,)
    return tuple(rows.transpose(0, 1)[None] for rows in x.split(case.lengths))


def join(case: Case, pieces: Sequence[Tensor]) -> Tensor:
    """What `split` splits."""
    if case.lengths is None:
        return pieces[0]
    return torch.cat([piece[0].transpose(0, 1) for piece in pieces])


def by_sequence(case: Case, inputs: Inputs) -> list[Inputs]:
    """The dense inputs of each piece, which share what is learned."""
    given = {name: value for name, value in inputs.arguments.items() if name != "q_offsets"}
    pieces = (split(case, x) for x in inputs[:3])
    return [Inputs(q, k, v, given, inputs.learned) for q, k, v in zip(*pieces, strict=True)]


def in_cache(case: Case, inputs: Inputs, sequence: int) -> Inputs:
    """The dense inputs of one sequence: its queries, and what the cache holds of it."""
    assert case.cache is not None
    rows, which = case.cache[sequence], slice(sequence, sequence + 1)
    given = {name: x for name, x in inputs.arguments.items() if name not in ("kv_lens", "pages")}

    def own(x: Tensor) -> Tensor:
        if case.page_size is None:
            return x[which, :, :rows]
        used = inputs.arguments["pages"][sequence, : -(-rows // case.page_size)]
        return x[used.long()].flatten(0, 1)[:rows].transpose(0, 1)[None]

    return Inputs(inputs.q[which], own(inputs.k), own(inputs.v), given, inputs.learned)


def shape_of_out(case: Case) -> tuple[int, ...]:
    if case.lengths is None:
        return case.batch, case.q_heads, case.q_len, case.value_dim
    return case.tokens, case.q_heads, case.value_dim
