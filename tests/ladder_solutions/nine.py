from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tilewise.kernels.hopper.instructions import load_async

LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def produce(x_tiles, ring, full, free, steps, STAGES: gl.constexpr):
    for step in range(steps):
        stage, phase = step % STAGES, step // STAGES % 2
        mbarrier.wait(free.index(stage), phase ^ 1)
        mbarrier.expect(full.index(stage), x_tiles.block_type.nbytes)
        load_async(x_tiles, [step * 16, 0], full.index(stage), ring.index(stage))


@gluon.jit
def consume(out_ptr, ring, full, free, steps, STAGES: gl.constexpr, IS_SUM: gl.constexpr):
    result = gl.full([16, 64], 0.0 if IS_SUM else float("-inf"), gl.float32, LAYOUT)
    for step in range(steps):
        stage, phase = step % STAGES, step // STAGES % 2
        mbarrier.wait(full.index(stage), phase)
        x = ring.index(stage).load(LAYOUT).to(gl.float32)
        mbarrier.arrive(free.index(stage), count=1)
        if IS_SUM:
            result = result + x
        else:
            result = gl.maximum(result, x)
    row, column = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT)), gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    gl.store(out_ptr + row[:, None] * 64 + column[None, :], result)


@gluon.jit
def exercise(x_tiles, sum_ptr, max_ptr, steps, STAGES: gl.constexpr):
    ring = gl.allocate_shared_memory(gl.float16, [STAGES, 16, 64], x_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)  # both have read
    gl.warp_specialize(
        [
            (consume, (sum_ptr, ring, full, free, steps, STAGES, True)),
            (consume, (max_ptr, ring, full, free, steps, STAGES, False)),
            (produce, (x_tiles, ring, full, free, steps, STAGES)),
        ],
        [4, 1],
        [64, 24],
    )
