"""9. Warp roles in Gluon: one role fetches tiles, another computes, and a ring of buffers lies between them.

What changed   Until now all warps of a program did the same: load a tile, wait for it, compute. On a
               Hopper GPU two roles run side by side. The producer, one warp, asks the copy engine for
               tiles of K and V; the consumer, four warps, multiplies. Each of the STAGES buffers has two
               barriers: full, on which the engine counts the bytes that have landed, and free, at which
               the consumer arrives when it has read. A phase bit tells one round through the ring from
               the next.
Why            Memory answers after hundreds of clocks. The producer runs ahead by as many tiles as there
               are buffers, so the tensor cores find theirs waiting.
What it saves  Waiting. Bytes and FLOPs are those of rung 6; copies are under way beside most products.
Source         FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608). Gluon comes with Triton; without a
               Hopper GPU its kernels run in tilewise's emulator, which knows the machine's rules.
The real one   kernels/tilewise/kernels/hopper/, explained in docs/hopper.md.
Exercise       A ring with two consumers: one adds the tiles of a matrix up, one takes their maximum. When
               is a buffer free, and how many arrive there?
               python -m tilewise.ladder check 9
"""

import ladder
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewise.gluon_emulator import RandomSchedule, Schedule, emulate
from tilewise.kernels.hopper.instructions import load_async  # whose name differs between versions of Triton

TILE, D = gl.constexpr(64), gl.constexpr(64)
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # who holds what of a product
LEFT = gl.constexpr(gl.DotOperandLayout(0, SUMS, 2))  # and of a left operand
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def producer(q_tiles, k_tiles, v_tiles, q, ring_k, ring_v, q_full, full, free, steps, STAGES: gl.constexpr):
    """Ask for Q, and for K and V as soon as a buffer is free."""
    mbarrier.expect(q_full, q_tiles.block_type.nbytes)
    load_async(q_tiles, [gl.program_id(0) * TILE, 0], q_full, q)
    for step in range(steps):
        stage, phase = step % STAGES, step // STAGES % 2
        mbarrier.wait(free.index(stage), phase ^ 1)  # in the first round nobody has used it: this passes
        mbarrier.expect(full.index(stage), k_tiles.block_type.nbytes + v_tiles.block_type.nbytes)
        load_async(k_tiles, [step * TILE, 0], full.index(stage), ring_k.index(stage))
        load_async(v_tiles, [step * TILE, 0], full.index(stage), ring_v.index(stage))


@gluon.jit
def consumer(out_ptr, q, ring_k, ring_v, q_full, full, free, steps, factor, STAGES: gl.constexpr):
    """The loop of rung 6, which waits for a buffer and gives it back."""
    row_max = gl.full([TILE], float("-inf"), gl.float32, gl.SliceLayout(1, SUMS))
    row_sum = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, SUMS))
    o = gl.zeros([TILE, D], gl.float32, SUMS)
    mbarrier.wait(q_full, 0)
    for step in range(steps):
        stage, phase = step % STAGES, step // STAGES % 2
        mbarrier.wait(full.index(stage), phase)
        # S = Q Kᵀ
        s = gl.zeros([TILE, TILE], gl.float32, SUMS)
        s = warpgroup_mma(q, ring_k.index(stage).permute((1, 0)), s, use_acc=False)  # [TILE, TILE]
        # P = 2^(S · log2 e / √D - row_max)
        new_max = gl.maximum(row_max, gl.max(s, 1) * factor)
        p = gl.exp2(s * factor - new_max[:, None])  # [TILE, TILE]
        rescale = gl.exp2(row_max - new_max)
        row_max, row_sum = new_max, row_sum * rescale + gl.sum(p, 1)
        # O = O · rescale + P V
        p = gl.convert_layout(p.to(gl.float16), LEFT)
        o = warpgroup_mma(p, ring_v.index(stage), o * rescale[:, None])  # [TILE, D]
        mbarrier.arrive(free.index(stage), count=1)
    rows = gl.program_id(0) * TILE + gl.arange(0, TILE, gl.SliceLayout(1, SUMS))
    at = rows[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, SUMS))[None, :]
    gl.store(out_ptr + at, (o / row_sum[:, None]).to(gl.float16))


@gluon.jit
def attention_kernel(q_tiles, k_tiles, v_tiles, out_ptr, steps, factor, STAGES: gl.constexpr):
    """One tile of rows of O. Every role gets the buffers and the barriers."""
    q = gl.allocate_shared_memory(gl.float16, [TILE, D], q_tiles.layout)
    ring_k = gl.allocate_shared_memory(gl.float16, [STAGES, TILE, D], k_tiles.layout)
    ring_v = gl.allocate_shared_memory(gl.float16, [STAGES, TILE, D], v_tiles.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    consumes = (out_ptr, q, ring_k, ring_v, q_full, full, free, steps, factor, STAGES)
    produces = (q_tiles, k_tiles, v_tiles, q, ring_k, ring_v, q_full, full, free, steps, STAGES)
    gl.warp_specialize([(consumer, consumes), (producer, produces)], [1], [24])


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stages: int = 2, schedule: Schedule | None = None
) -> torch.Tensor:
    """q [N, 64], k [N, 64], v [N, 64], N a multiple of TILE -> O [N, 64]. schedule: whose turn it is."""
    n, out, tile = len(q), torch.empty_like(q), TILE.value
    q_tiles, k_tiles, v_tiles = (TensorDescriptor.from_tensor(x, [tile, tile], SHARED) for x in (q, k, v))
    arguments = dict(
        q_tiles=q_tiles, k_tiles=k_tiles, v_tiles=v_tiles, out_ptr=out,
        steps=n // tile, factor=ladder.LOG2E * tile**-0.5, STAGES=stages, num_warps=4,
    )  # fmt: skip
    if ladder.INTERPRETED:
        emulate(attention_kernel, (n // tile,), arguments, schedule)
    else:
        attention_kernel[(n // tile,)](**arguments)
    return out


def exercise(x_tiles, sum_ptr, max_ptr, steps, STAGES):
    """A kernel, so begin with @gluon.jit, and annotate `STAGES: gl.constexpr`. x_tiles describes a matrix
    [16 · steps, 64] in fp16 by tiles [16, 64]. Store the sum of the tiles and their maximum, element by
    element, [16, 64] in fp32. Any order of the roles must do."""
    raise NotImplementedError


def main() -> list[ladder.Counts]:
    """Count it for two lengths, beside rung 6; then let the roles take turns in other orders."""
    found, before = [ladder.count(attention, n, n, n) for n in ladder.SIZES], ladder.counts_of(6)
    for n, counts, six in zip(ladder.SIZES, found, before, strict=True):
        assert (counts.matmul, counts.asked) == (six.matmul, six.asked)
        assert counts.memory == six.memory - 4 * n  # no lse
        assert counts.most_in_flight == 2 * 2 + 1  # K and V, two buffers each, and Q
    given = ladder.problem(256, 256, 256)
    for seed in range(4):
        assert torch.equal(attention(*given, schedule=RandomSchedule(seed)), attention(*given))
    ladder.show(__doc__, {"6 base two": before, "9 warp roles": found})
    beside = sum(copies > 0 for copies in counts.in_flight)
    print(f"copies under way beside {beside} of {len(counts.in_flight)} products; any order: the same bits")
    return found


if __name__ == "__main__":
    ways = {"6 base two": ladder.rung(6).forward, "9 warp roles": attention}
    ladder.climb(__file__, main, ways, is_for_hopper=True)
