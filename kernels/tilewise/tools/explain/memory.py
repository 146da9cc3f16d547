"""What memory does a call ask for, besides its inputs?"""

from __future__ import annotations

from ...kernels import turns
from ...kernels.call import programs, tile_count
from ...kernels.forward import rows_programs
from ...kernels.hopper.limits import FIRST_COUNTER
from ...kernels.tile import Pass
from ...parts.shape import ceil_div
from .workload import (
    Allocation,
    Workload,
    all_keys_bytes,
    parameters_tile,
    rows_bytes,
    statistics_bytes,
    sums_bytes,
)


def memory_of(work: Workload) -> tuple[Allocation, ...]:
    """What the kernels' launchers allocate."""
    shape = work.shape
    found = [Allocation("out", work.out_bytes, "result"), *work.computed]
    if work.return_lse or work.training:
        kept = "result" if work.return_lse else "for the backward"
        found.append(Allocation("lse", statistics_bytes(work, 1), kept))
    if (split := work.split()) is not None:
        of_splits = split.programs * statistics_bytes(work, 1)
        found += [
            Allocation("out of each split", of_splits * shape.value_dim, "during the call"),
            Allocation("lse of each split", of_splits, "during the call"),
        ]
    if work.has_holes and (split is None or split.size == 0):
        found.append(Allocation("lists of tiles", lists_bytes(work, "forward"), "during the call"))
    if work.training:
        tile, _ = work.choose(work.element_bytes, work.over_rows)
        ranges = shape.blocks * shape.q_heads * tile_count(shape, shape.q_len, tile.tile_q)
        if work.is_hopper_backward or work.walks == 1:
            before = FIRST_COUNTER if work.is_hopper_backward else turns.FIRST_COUNTER.value
            found.append(Allocation("sums of dq", sums_bytes(work), "during the backward"))
            found.append(Allocation("turns", 4 * (before + ranges), "during the backward"))
        found += [
            Allocation("row statistics", statistics_bytes(work, 2), "for the backward"),
            Allocation("delta", statistics_bytes(work, 1), "during the backward"),
            Allocation("ranges", 16 * ranges, "during the backward"),
            Allocation("dq", rows_bytes(work, shape.head_dim), "result"),
            Allocation("dk and dv", all_keys_bytes(work), "result"),
        ]
        if work.has_holes and work.walks == 2:
            in_backward = lists_bytes(work, "dq"), lists_bytes(work, "dkv")  # one after the other
            found.append(Allocation("lists of tiles", max(in_backward), "during the backward"))
        tile, _ = parameters_tile(work)
        for parameter in work.parameters:
            written, is_gradient = parameter.sums(tile.tile_q)
            if not is_gradient:
                found.append(Allocation(f"sums of {parameter.name}", written, "during the backward"))
            found.append(Allocation(f"gradient of {parameter.name}", parameter.bytes, "result"))
    return tuple(found)


def lists_bytes(work: Workload, walk: Pass) -> int:
    """Of the lists that a pass walks over: a line for each program, or of keys for each query head."""
    shape, (tile, _) = work.shape, work.choose(work.element_bytes, walk)
    if walk == "dkv":
        lines, room = (
            programs(shape, shape.kv_len, tile.tile_kv, shape.q_heads),
            ceil_div(shape.q_len, tile.tile_q),
        )
    else:
        lines, room = (
            rows_programs(shape, shape.cache is not None, tile.tile_q),
            ceil_div(shape.kv_len, tile.tile_kv),
        )
    return 4 * lines * (2 + room)
