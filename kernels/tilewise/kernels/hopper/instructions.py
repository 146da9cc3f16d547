"""What Gluon calls differently from version to version, and the instructions that it has no name for.

Named barriers. The chip has 16 of them in each multiprocessor. `arrive` counts a warp in and goes on; `sync`
counts it in and waits until `threads` threads have been counted. An mbarrier would do as well, but to arrive
there Triton first makes all warps of the role wait for one another.

Pairs. P is carried round the loop in 16 bits. The compiler would keep each number in a register of its own,
so two of them are carried as one 32-bit number: packing is the rounding itself (one instruction a pair),
and unpacking costs nothing.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core

aggregate = getattr(triton, "aggregate", None) or triton.language.core._aggregate  # the latter in 3.6
NEWER = hasattr(tma, "async_load")
load_async = tma.async_load if NEWER else tma.async_copy_global_to_shared  # (descriptor, corner, barrier, to)
store_async = tma.async_store if NEWER else tma.async_copy_shared_to_global  # (descriptor, corner, from)
wait_for_role = gl.barrier if NEWER else gl.thread_barrier  # all warps of a role wait for one another

if NEWER:
    add_async = tma.async_atomic_add  # (descriptor, corner, from): added to what is there
else:  # the compiler has it, the language has no name for it

    @core.builtin
    def add_async(descriptor, corner, source, _semantic=None):
        from triton._C.libtriton import ir

        builder = _semantic.builder
        corner = _semantic._convert_to_ir_values(corner, require_i64=False)
        builder.create_async_tma_reduce(
            ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, corner, source.handle
        )


@gluon.constexpr_function
def barrier_text(instruction, threads):
    return f"{instruction} $1, {threads}; mov.b32 $0, $1;"


@gluon.jit
def at_barrier(barrier, TEXT: gl.constexpr):
    """Every thread of the role executes TEXT with the number of a named barrier."""
    WARPS: gl.constexpr = gl.num_warps()
    number = gl.full([32 * WARPS], barrier, gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.inline_asm_elementwise(TEXT, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def sync(barrier, THREADS: gl.constexpr):
    """Wait at a named barrier until THREADS threads, these included, have come."""
    at_barrier(barrier, barrier_text("bar.sync", THREADS))


@gluon.jit
def arrive(barrier, THREADS: gl.constexpr):
    """Be counted at a named barrier, and go on."""
    at_barrier(barrier, barrier_text("bar.arrive", THREADS))


@gluon.jit
def wait_added():
    """Until global memory has what this warp has had added; `tma.store_wait` waits until it has been read."""
    at_barrier(0, "cp.async.bulk.wait_group 0; mov.b32 $0, $1;")


@gluon.jit
def fence_async():
    """Global memory as threads see it, and as the copy engine does, are the same here."""
    at_barrier(0, "fence.proxy.async.global; mov.b32 $0, $1;")


@gluon.constexpr_function
def rounding_text(dtype):
    return f"cvt.rn.{'bf16x2' if dtype == gl.bfloat16 else 'f16x2'}.f32 $0, $2, $1;"


@gluon.jit
def pack_pairs(p, DTYPE: gl.constexpr):
    """p [rows, n] in fp32, rounded to DTYPE, two neighbours in one int32: [rows, n / 2]."""
    low, high = p.reshape([p.shape[0], p.shape[1] // 2, 2]).split()
    TEXT: gl.constexpr = rounding_text(DTYPE)
    return gl.inline_asm_elementwise(TEXT, "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack_pairs(pairs, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """What `pack_pairs` packed, [rows, n], in the layout of a matmul's left operand."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    p = gl.join(low, high).reshape([pairs.shape[0], pairs.shape[1] * 2]).to(DTYPE, bitcast=True)
    return gl.convert_layout(p, LAYOUT, assert_trivial=True)
