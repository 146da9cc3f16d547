"""A call as the Hopper kernel's arguments: descriptors for the copy engine, and programs that stay."""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...parts.numerics import INTERPRETED
from ...parts.shape import Shape, ceil_div
from ..call import Call, function_arguments
from ..copies import described_strides
from ..launch import cannot_repeat, launch
from ..room import has_out_buffer
from ..tile import HopperTile
from .forward import hopper_forward_kernel
from .limits import SWIZZLED_BYTES, WARPGROUP_ROWS, hopper_pieces

CACHED_BYTES = 24 << 20  # of keys and values that the L2 cache (50 MB) is trusted to hold
REGISTERS = {2: (240, 24), 3: (160, 32)}  # a thread's, of consumers and producer, by the number of warpgroups


def launch_forward(
    call: Call, out: torch.Tensor, lse: torch.Tensor | None, statistics: torch.Tensor | None, tile: HopperTile
) -> None:
    """As `launch_forward` of the portable kernel. On CPU tensors the kernel runs in an emulator."""
    if 0 in call.shape.scores:
        return
    grid, arguments = forward_launch(call, out, lse, statistics, tile)
    if INTERPRETED:
        from ...gluon_emulator import emulate

        cannot_repeat("the emulator runs it")
        emulate(hopper_forward_kernel, grid, arguments)
    else:
        launch(hopper_forward_kernel, grid, out, **arguments)


def forward_launch(
    call: Call, out: torch.Tensor, lse: torch.Tensor | None, statistics: torch.Tensor | None, tile: HopperTile
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the arguments with which `hopper_forward_kernel` answers `call`."""
    shape = call.shape
    tiles = ceil_div(shape.q_len, tile.tile_q) * shape.q_heads * shape.batch
    heads = shape.batch * shape.q_heads
    consumer_registers, producer_registers = REGISTERS[tile.warpgroups]
    arguments = dict(
        **descriptors("q_desc", call.q, WARPGROUP_ROWS),
        **descriptors("k_desc", call.k, tile.tile_kv),
        **descriptors("v_desc", call.v, tile.tile_kv),
        **descriptors("out_desc", out, WARPGROUP_ROWS),
        lse=() if lse is None else (lse,),
        statistics=() if statistics is None else tuple(statistics.unbind(0)),
        sink=() if call.sink is None else (call.sink, call.sink.stride(0)),
        order=(tiles, heads, heads_together(shape, out.element_size())),
        sizes=(shape.q_heads, shape.q_len, shape.kv_len),
        group=shape.group,
        unit=() if call.unit is None else (call.unit,),
        **function_arguments(call),
        WARPGROUPS=tile.warpgroups,
        TILE_KV=tile.tile_kv,
        STAGES=tile.num_stages,
        HAS_TURNS=tile.has_turns,
        HAS_OUT_BUFFER=has_out_buffer(tile, shape.head_dim, shape.value_dim),
        IS_Q_IN_REGISTERS=tile.is_q_in_registers,
        PRODUCER_WARPS=tile.producer_warps,
        CONSUMER_REGISTERS=consumer_registers,
        PRODUCER_REGISTERS=producer_registers,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return (min(tiles, resident_programs(out.device)),), arguments


def descriptors(name: str, x: torch.Tensor, rows: int) -> dict[str, TensorDescriptor | None]:
    """One for each of at most two pieces of x's columns, by the names of the kernel's arguments."""
    found = [descriptor(x, rows, columns) for columns in hopper_pieces(x.shape[3])]
    return dict(zip((name, f"{name}_2"), (*found, None), strict=False))


@functools.cache
def swizzled(columns: int, element_bytes: int) -> gl.NVMMASharedLayout:
    """How a tile's rows lie in shared memory: swizzled over their width, as far as the hardware goes."""
    width = min(SWIZZLED_BYTES, columns * element_bytes)
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * element_bytes, rank=4)


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [batch, heads, length, dim] for the copy engine, in pieces of [1, 1, rows, columns]. What a piece has
    beyond x reads as 0, and is not written."""
    layout = swizzled(columns, x.element_size())
    return TensorDescriptor(x, list(x.shape), described_strides(x), [1, 1, rows, columns], layout)


def heads_together(shape: Shape, element_bytes: int) -> int:
    """Query heads whose keys and values fit the cache together; whole groups, one at least."""
    bytes_a_head = shape.kv_len * (shape.head_dim + shape.value_dim) * element_bytes
    return max(1, CACHED_BYTES // bytes_a_head) * shape.group


@functools.cache
def resident_programs(device: torch.device) -> int:
    """How many programs the GPU holds at once: one on each multiprocessor. Without a GPU, a few."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
