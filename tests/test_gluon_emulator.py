"""The Gluon emulator runs correct kernels in every order, and catches each mistake planted in them."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import core

from tilewise.gluon_emulator import EmulationError, PriorityChange, RandomSchedule, Schedule, emulate

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="the emulator runs where Triton's interpreter does"
)
aggregate = getattr(triton, "aggregate", None) or core._aggregate
NEWER = hasattr(tma, "async_load")
load_async = tma.async_load if NEWER else tma.async_copy_global_to_shared
store_async = tma.async_store if NEWER else tma.async_copy_shared_to_global
role_barrier = gl.barrier if NEWER else gl.thread_barrier

ROWS = gl.constexpr(16)
COLUMNS = gl.constexpr(64)
LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


def descriptor(tensor, rows=ROWS.value, columns=COLUMNS.value):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(tensor, [rows, columns], layout)


def schedules(count=12):
    """The default order, random ones, and ones that starve somebody."""
    return [
        Schedule(),
        *(RandomSchedule(seed) for seed in range(count)),
        *(PriorityChange(seed, changes=3, steps=60) for seed in range(count)),
    ]


def catch(message, run, *args, **kwargs):
    with pytest.raises(EmulationError, match=re.compile(message, re.DOTALL)) as caught:
        run(*args, **kwargs)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("role ")]
    return caught.value


def outcome(run, *args, **kwargs):
    """What comes out: the right result, a wrong one, or an error."""
    try:
        run(*args, **kwargs)
    except EmulationError as error:
        return re.search("has not landed|overwrites|touches|unordered", str(error))[0]
    except AssertionError:
        return "wrong"
    return "right"


@gluon.constexpr_function
def barrier_text(instruction, threads):
    return f"bar.{instruction}  $1, {threads};\n  mov.b32 $0, $1;"


@gluon.jit
def named_barrier(number, INSTRUCTION: gl.constexpr, THREADS: gl.constexpr, IS_PURE: gl.constexpr = False):
    numbers = gl.full([32], number, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    text: gl.constexpr = barrier_text(INSTRUCTION, THREADS)
    gl.inline_asm_elementwise(text, "=r,r", [numbers], dtype=gl.int32, is_pure=IS_PURE, pack=1)


# ---- A ring between a producer and a consumer


@aggregate
class Ring:
    buffers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, buffers, full, STAGES):
        self.buffers = buffers
        self.full = full
        self.STAGES = gl.constexpr(STAGES)

    @gluon.jit
    def fill(self, step, x_desc, WAITS: gl.constexpr):
        stage = step % self.STAGES
        if WAITS:
            named_barrier(4 + stage, "sync", 160)
        mbarrier.expect(self.full.index(stage), x_desc.block_type.nbytes)
        load_async(x_desc, [step * ROWS, 0], self.full.index(stage), self.buffers.index(stage))

    @gluon.jit
    def read(self, step):
        return self.buffers.index(step % self.STAGES).load(LAYOUT)

    @gluon.jit
    def release(self, step):
        named_barrier(4 + step % self.STAGES, "arrive", 160)


@gluon.jit
def copy_producer(ring, x_desc, steps, MISTAKE: gl.constexpr):
    for step in range(steps):
        ring.fill(step, x_desc, MISTAKE != "does not wait for the buffer")
    for stage in gl.static_range(ring.STAGES):
        if MISTAKE != "leaves a barrier half full":
            named_barrier(4 + stage, "sync", 160)


@gluon.jit
def copy_consumer(ring, out_ptr, steps, MISTAKE: gl.constexpr):
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    for stage in gl.static_range(ring.STAGES):
        ring.release(stage)
    for step in range(steps):
        if MISTAKE != "does not wait for the copy":
            mbarrier.wait(ring.full.index(step % ring.STAGES), step // ring.STAGES % 2)
        if MISTAKE == "releases before it reads":
            ring.release(step)
        tile = ring.read(step)
        if MISTAKE != "releases before it reads" and MISTAKE != "never releases":
            ring.release(step)
        at = (step * ROWS + row)[:, None] * COLUMNS + column[None, :]
        gl.store(out_ptr + at, tile)


@gluon.jit
def copy_kernel(x_desc, out_ptr, steps, STAGES: gl.constexpr, MISTAKE: gl.constexpr):
    buffers = gl.allocate_shared_memory(x_desc.dtype, [STAGES, ROWS, COLUMNS], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        if MISTAKE != "does not init":
            mbarrier.init(full.index(stage), count=1)
    ring = Ring(buffers, full, STAGES)
    gl.warp_specialize(
        [(copy_consumer, (ring, out_ptr, steps, MISTAKE)), (copy_producer, (ring, x_desc, steps, MISTAKE))],
        [1],
        [24],
    )


def run_copy(mistake=None, schedule=None, steps=5, stages=2):
    x = torch.randn(steps * ROWS.value, COLUMNS.value).to(torch.bfloat16)
    out = torch.full_like(x, float("nan"))
    arguments = dict(x_desc=descriptor(x), out_ptr=out, steps=steps, STAGES=stages, MISTAKE=mistake)
    emulate(copy_kernel, (1,), arguments | dict(num_warps=4, enable_fp_fusion=True), schedule)
    assert torch.equal(x, out)


@pytest.mark.oldest
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_ring_copies_in_every_order(stages):
    for schedule in schedules():
        run_copy(schedule=schedule, stages=stages)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("does not init", r"copy_consumer.*uses the mbarrier in buffer 2.*before mbarrier.init"),
        ("does not wait for the copy", r"copy_consumer.*comes a second time.* named barrier 4: 128 of 160"),
        ("does not wait for the buffer", r"copy_producer.*arrives 1 times, before the phase has ended.*fill"),
        ("never releases", r"deadlock.*copy_producer\) waits for named barrier 4"),
        ("leaves a barrier half full", r"ends and leaves named barrier 4: 128 of 160 threads"),
    ],
)
def test_mistakes_that_show_in_the_default_order(mistake, message):
    catch(message, run_copy, mistake)


@pytest.mark.oldest
def test_a_deadlock_names_who_waits_for_what():
    lines = str(catch("^deadlock", run_copy, "never releases")).splitlines()
    assert "role 0 (copy_consumer) waits for parity 1 of mbarrier buffer 2" in lines[1]
    assert re.search(r"at test_gluon_emulator.py:\d+ copy_kernel > .*:\d+ copy_consumer$", lines[2])
    assert "role 1 (copy_producer) waits for named barrier 4" in lines[3]
    assert re.search(r"at test_gluon_emulator.py:\d+ copy_producer > .* fill > .* named_barrier$", lines[4])
    assert any(re.search(r"named barrier 4: 32 of 160 threads, those of role 1", line) for line in lines)
    assert any(re.search(r"mbarrier buffer 2.*phase 1, waits for 1 of 1 arrivals", line) for line in lines)


@pytest.mark.oldest
def test_a_race_shows_in_every_order():
    """A consumer that releases a buffer before it reads it: also where it happens to read in time."""
    message = r"the load of tile .*, unordered with role 0 \(copy_consumer\): load of buffer 1"
    catch(message, run_copy, "releases before it reads")
    assert {outcome(run_copy, "releases before it reads", each) for each in schedules(20)} == {"unordered"}


@pytest.mark.parametrize("new", [lambda: RandomSchedule(3), lambda: PriorityChange(3, changes=3, steps=60)])
def test_a_seed_fixes_the_order(new):
    def order(schedule):
        chosen, choose = [], schedule.choose

        def record(running, roles, copies):
            chosen.append(choose(running, roles, copies))
            return chosen[-1]

        schedule.choose = record
        run_copy(schedule=schedule)
        return [getattr(choice, "number", "copy") for choice in chosen]

    assert order(new()) == order(new())
    assert order(new()) != order(Schedule())


# ---- Named barriers


@gluon.jit
def first_meets(numbers, THREADS: gl.constexpr, IS_PURE: gl.constexpr):
    for i in gl.static_range(len(numbers)):
        named_barrier(numbers[i], "arrive", THREADS, IS_PURE)


@gluon.jit
def second_meets(number, THREADS: gl.constexpr):
    named_barrier(number, "sync", THREADS)


@gluon.jit
def meet_kernel(numbers, number, THREADS: gl.constexpr, OTHERS: gl.constexpr, IS_PURE: gl.constexpr):
    gl.warp_specialize(
        [(first_meets, (numbers, THREADS, IS_PURE)), (second_meets, (number, OTHERS))], [4], [24]
    )


def meet(numbers=(5,), number=5, threads=256, others=256, is_pure=False):
    arguments = dict(numbers=numbers, number=number, THREADS=threads, OTHERS=others, IS_PURE=is_pure)
    emulate(meet_kernel, (1,), arguments)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(threads=96), r"first_meets.*its 128 threads are too many for 96"),
        (dict(threads=100), r"first_meets.*expects 100 threads at named barrier 5.*no whole warps"),
        (dict(others=160), r"second_meets.*expects 160 threads.*128 of 256"),
        (dict(threads=160, others=160), r"second_meets.*its 128 threads are too many for 160"),
        (dict(numbers=(5, 5)), r"first_meets.*comes a second time.*named barrier 5"),
        (dict(numbers=(2,)), r"named barrier 2 is Triton's own: it keeps 0..2 for a kernel with 1 workers"),
        (dict(numbers=(16,)), r"named barrier 16 must be one of 0..15"),
        (dict(is_pure=True), r"is_pure=True: the compiler may drop it"),
        (dict(number=6), r"deadlock.*second_meets\) waits for named barrier 6"),
    ],
)
def test_named_barriers(arguments, message):
    meet()
    catch(message, meet, **arguments)


# ---- Matmuls and copies of one role


@gluon.jit
def matmul_kernel(a_desc, b_desc, out_desc, MISTAKE: gl.constexpr):
    SIZE: gl.constexpr = a_desc.block_type.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    a = gl.allocate_shared_memory(a_desc.dtype, [SIZE, SIZE], a_desc.layout)
    b = gl.allocate_shared_memory(b_desc.dtype, [SIZE, SIZE], b_desc.layout)
    out = gl.allocate_shared_memory(out_desc.dtype, [SIZE, SIZE], out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(ready.index(1), count=1)
    nbytes: gl.constexpr = a_desc.block_type.nbytes + b_desc.block_type.nbytes
    if MISTAKE == "expects less":
        mbarrier.expect(ready.index(0), nbytes - 2)
    elif MISTAKE == "expects more":
        mbarrier.expect(ready.index(0), nbytes + 2)
    else:
        mbarrier.expect(ready.index(0), nbytes)
    if MISTAKE == "expects twice":
        mbarrier.expect(ready.index(0), nbytes)
    load_async(a_desc, [0, 0], ready.index(0), a)
    if MISTAKE == "loads twice":
        load_async(a_desc, [0, 0], ready.index(0), a)
    load_async(b_desc, [0, 0], ready.index(0), b)
    if MISTAKE != "does not wait for the copy":
        mbarrier.wait(ready.index(0), 0)
    if MISTAKE == "transposes in place":
        b.store(b.load(LAYOUT).trans())

    zeros = gl.full([SIZE, SIZE], 0.0, gl.float32, layout)
    early = warpgroup_mma(a, b.permute((1, 0)), zeros, use_acc=False, is_async=True)
    later = warpgroup_mma(a.load(gl.DotOperandLayout(0, layout, 2)), b, early, is_async=True)
    if MISTAKE == "computes early":
        early = early + early
    elif MISTAKE == "uses early":
        early = early.to(gl.float16)
    elif MISTAKE == "overwrites an operand":
        b.store(gl.zeros_like(b.load(LAYOUT)))
    elif MISTAKE == "loads into an operand":
        mbarrier.expect(ready.index(1), a_desc.block_type.nbytes)
        load_async(a_desc, [0, 0], ready.index(1), a)
    elif MISTAKE == "waits for the first":
        later = warpgroup_mma_wait(1, deps=[later])
    elif MISTAKE == "does not wait for the matmul":
        later = zeros
    if MISTAKE != "does not wait for the matmul":
        early, later = warpgroup_mma_wait(0, deps=[early, later])
    out.store(later.to(out_desc.dtype))
    if MISTAKE == "barrier, fence":
        role_barrier()
    if MISTAKE != "no fence":
        fence_async_shared()
    if MISTAKE != "no barrier" and MISTAKE != "barrier, fence":
        role_barrier()
    store_async(out_desc, [0, 0], out)
    if MISTAKE == "writes what is stored":
        out.store(gl.zeros_like(out.load(LAYOUT)))
    if MISTAKE == "loads into what is stored":
        mbarrier.expect(ready.index(1), a_desc.block_type.nbytes)
        load_async(a_desc, [0, 0], ready.index(1), out)
    if MISTAKE != "does not wait for the store":
        tma.store_wait(0)
    if MISTAKE == "loads and leaves":
        mbarrier.expect(ready.index(1), a_desc.block_type.nbytes)
        load_async(a_desc, [0, 0], ready.index(1), out)


def run_matmul(mistake=None, dtype=torch.float16, schedule=None, num_warps=4, size=64):
    """A Bᵀ + A B of small whole numbers, which is exact in fp32."""
    a, b = (torch.randint(-4, 5, (size, size)).to(dtype) for _ in range(2))
    out = torch.full_like(a, float("nan"))
    descriptors = [descriptor(x, size, size) for x in (a, b, out)]
    names = dict(zip(("a_desc", "b_desc", "out_desc"), descriptors, strict=True))
    emulate(matmul_kernel, (1,), names | dict(MISTAKE=mistake, num_warps=num_warps), schedule)
    a, b = a.double(), b.double()
    assert torch.equal(out, (a @ b.mT + a @ b).float().to(dtype))


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matmuls_and_copies(dtype):
    for schedule in schedules(5):
        run_matmul(dtype=dtype, schedule=schedule)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("expects less", r"a TMA load of 8192 bytes, but the mbarrier expects only 8190 more"),
        ("expects more", r"deadlock.*parity 0 of mbarrier.*waits for 0 of 1 arrivals and 2 bytes"),
        ("expects twice", r"arrives 1 times, before the phase has ended"),
        ("loads twice", r"a TMA load reads or writes buffer 1.*has not landed"),
        ("does not wait for the copy", r"warpgroup_mma reads or writes buffer 1.*has not landed"),
        ("transposes in place", r"warpgroup_mma touches buffer 2.*fence_async_shared\(\) and then a barrier"),
        ("computes early", r"computes with the warpgroup_mma.*which nobody has waited for"),
        ("uses early", r"uses \.to of the warpgroup_mma.*which nobody has waited for"),
        ("overwrites an operand", r"store overwrites buffer 2.*which the warpgroup_mma.* still reads"),
        ("loads into an operand", r"a TMA load overwrites buffer 1.*which the warpgroup_mma.* still reads"),
        ("waits for the first", r"uses the result of the warpgroup_mma.*under way still"),
        ("does not wait for the matmul", r"ends, but never waits for the warpgroup_mma"),
        ("no fence", r"a TMA store touches buffer 3.*fence_async_shared\(\) and then a barrier"),
        ("no barrier", r"a TMA store touches buffer 3.*has written: a barrier of that role"),
        ("barrier, fence", r"a TMA store touches buffer 3.*has written: a barrier of that role"),
        (
            "writes what is stored",
            r"store overwrites buffer 3.*which the store to tile \[0, 0\].* still reads",
        ),
        ("loads into what is stored", r"a TMA load overwrites buffer 3.*which the store to tile .* still"),
        ("does not wait for the store", r"ends, but never waits for the store to tile \[0, 0\]"),
        ("loads and leaves", r"the kernel ends, but nobody has waited for the load of tile \[0, 0\]"),
    ],
)
def test_mistakes_with_matmuls_and_copies(mistake, message):
    error = catch(message, run_matmul, mistake)
    assert re.search(r"test_gluon_emulator\.py:\d+ matmul_kernel", str(error))


def test_matmuls_need_four_warps():
    catch(r"needs groups of 4 warps, but the role has 2", run_matmul, num_warps=2)


# ---- What one role writes and another has read


@gluon.jit
def writer(buffer, VALUE: gl.constexpr, FENCES: gl.constexpr, INSTRUCTION: gl.constexpr):
    buffer.store(gl.full([ROWS, COLUMNS], VALUE, gl.float16, LAYOUT))
    if FENCES:
        fence_async_shared()
    named_barrier(5, INSTRUCTION, 256)


@gluon.jit
def sender(buffer, out_desc, VALUE: gl.constexpr, WAITS: gl.constexpr):
    if WAITS:
        named_barrier(5, "sync", 256)
    else:
        buffer.store(gl.full([ROWS, COLUMNS], VALUE, gl.float16, LAYOUT))
        fence_async_shared()
        role_barrier()
    store_async(out_desc, [0, 0], buffer)
    tma.store_wait(0)
    if not WAITS:
        named_barrier(5, "sync", 256)


@gluon.jit
def send_kernel(
    out_desc, VALUES: gl.constexpr, FENCES: gl.constexpr, WAITS: gl.constexpr, INSTRUCTION: gl.constexpr
):
    buffer = gl.allocate_shared_memory(out_desc.dtype, [ROWS, COLUMNS], out_desc.layout)
    gl.warp_specialize(
        [(sender, (buffer, out_desc, VALUES[0], WAITS)), (writer, (buffer, VALUES[1], FENCES, INSTRUCTION))],
        [4],
        [24],
    )


def send(values=(1.0, 1.0), fences=True, waits=True, instruction="arrive", schedule=None):
    out = torch.zeros(ROWS.value, COLUMNS.value, dtype=torch.float16)
    arguments = dict(VALUES=values, FENCES=fences, WAITS=waits, INSTRUCTION=instruction)
    emulate(send_kernel, (1,), arguments | dict(out_desc=descriptor(out)), schedule)
    assert (out == 1).all()


@pytest.mark.oldest
def test_another_role_needs_the_writers_fence():
    for instruction in ("arrive", "sync"):
        for schedule in schedules(5):
            send(instruction=instruction, schedule=schedule)
    catch(
        r"sender.*a TMA store touches.*role 1 \(writer\) has written: fence_async_shared", send, fences=False
    )


@pytest.mark.oldest
@pytest.mark.parametrize("values", [(1.0, 1.0), (1.0, 2.0)])
def test_roles_may_not_write_out_of_order(values):
    """Each for itself, with its own fence and barrier: a race, also where both write the same."""
    found = {outcome(send, values=values, waits=False, schedule=schedule) for schedule in schedules(20)}
    assert found == {"unordered", "overwrites"}


@gluon.jit
def first_reads(buffer, ready, out_desc, MISTAKE: gl.constexpr):
    buffer.load(LAYOUT)
    named_barrier(5, "arrive", 256)
    mbarrier.wait(ready, 0, MISTAKE != "does not wait")
    store_async(out_desc, [0, 0], buffer)
    tma.store_wait(0)


@gluon.jit
def then_writes(buffer, ready, MISTAKE: gl.constexpr):
    if MISTAKE != "writes early":
        named_barrier(5, "sync", 256)
    buffer.store(gl.full([ROWS, COLUMNS], 1.0, gl.float16, LAYOUT))
    fence_async_shared()
    mbarrier.arrive(ready)
    if MISTAKE == "writes early":
        named_barrier(5, "sync", 256)


@gluon.jit
def hand_over_kernel(out_desc, MISTAKE: gl.constexpr):
    buffer = gl.allocate_shared_memory(out_desc.dtype, [ROWS, COLUMNS], out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    mbarrier.init(ready, count=1)
    gl.warp_specialize(
        [(first_reads, (buffer, ready, out_desc, MISTAKE)), (then_writes, (buffer, ready, MISTAKE))],
        [4],
        [24],
    )


def hand_over(mistake=None, schedule=None):
    out = torch.zeros(ROWS.value, COLUMNS.value, dtype=torch.float16)
    emulate(hand_over_kernel, (1,), dict(out_desc=descriptor(out), MISTAKE=mistake), schedule)
    assert (out == 1).all()


@pytest.mark.oldest
def test_who_waits_is_ordered():
    """By a named barrier, and by an mbarrier."""
    for schedule in schedules():
        hand_over(schedule=schedule)
        assert outcome(hand_over, "writes early", schedule) in ("unordered", "overwrites")
        assert outcome(hand_over, "does not wait", schedule) in ("unordered", "overwrites", "touches")


# ---- The edges of tensors


@gluon.jit
def window_kernel(x_desc, tile_desc, out_desc, row, column):
    buffer = gl.allocate_shared_memory(x_desc.dtype, [ROWS, COLUMNS], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    mbarrier.init(full, count=1)
    mbarrier.expect(full, x_desc.block_type.nbytes)
    load_async(x_desc, [row, column], full, buffer)
    mbarrier.wait(full, 0)
    store_async(tile_desc, [0, 0], buffer)
    store_async(out_desc, [row, column], buffer)
    tma.store_wait(0)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_beyond_the_edges(dtype):
    corners = [(0, 0), (-3, 8), (-15, -63), (10, 16), (19, 71), (-16, 0), (20, 0), (100, -200), (4, 72)]
    whole = torch.randn(24, 3 * 80).to(dtype)
    x = whole[2:22, 80:152]  # a view: neighbours in memory are not part of it
    for row, column in corners:
        tile, out = torch.full((16, 64), 7).to(dtype), torch.full((20, 72), 7).to(dtype)
        tensors = dict(x_desc=x, tile_desc=tile, out_desc=out)
        arguments = {name: descriptor(tensor) for name, tensor in tensors.items()}
        emulate(window_kernel, (1,), arguments | dict(row=row, column=column))
        padded = torch.zeros(20 + 400, 72 + 400).to(dtype)
        padded[200:220, 200:272] = x
        assert torch.equal(tile, padded[200 + row :, 200 + column :][:16, :64])
        inside = torch.zeros(20 + 400, 72 + 400, dtype=torch.bool)
        inside[200 + row : 216 + row, 200 + column : 264 + column] = True
        assert torch.equal(out, torch.where(inside[200:220, 200:272], x, torch.tensor(7).to(dtype)))


# ---- Numbers


@gluon.jit
def numbers_kernel(x_ptr, pairs_ptr, halves_ptr, rounded_ptr, TEXT: gl.constexpr, N: gl.constexpr):
    low = gl.load(x_ptr + 2 * gl.arange(0, N))
    high = gl.load(x_ptr + 2 * gl.arange(0, N) + 1)
    pairs = gl.inline_asm_elementwise(TEXT, "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1)
    gl.store(pairs_ptr + gl.arange(0, N), pairs)
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    halves = gl.join(low, high).reshape([2 * N]).to(halves_ptr.dtype.element_ty, bitcast=True)
    gl.store(halves_ptr + gl.arange(0, 2 * N), halves)
    x = gl.load(x_ptr + gl.arange(0, 2 * N))
    gl.store(rounded_ptr + gl.arange(0, 2 * N), x.to(rounded_ptr.dtype.element_ty))


@pytest.mark.oldest
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bf16x2"), (torch.float16, "f16x2")])
def test_rounding_and_pairs(dtype, kind):
    """To nearest even, as PyTorch does it; ties, the largest numbers and what is beyond them included."""
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65504.0, 65519.9, 65520.0, -1e6, 3.4e38]
    ties = [1 + n / 512 for n in range(1, 9)] + [1 + n / 4096 for n in range(1, 9)] + [1e-7, 6e-8, -3e-5]
    x = torch.cat([torch.tensor(special + ties), torch.randn(256)])[:256].contiguous()
    pairs, halves, rounded = torch.empty(128, dtype=torch.int32), x.to(dtype) * 0, x.to(dtype) * 0
    arguments = dict(x_ptr=x, pairs_ptr=pairs, halves_ptr=halves, rounded_ptr=rounded, N=128)
    emulate(numbers_kernel, (1,), arguments | dict(TEXT=f" cvt.rn.{kind}.f32  $0, $2,\n $1; "))
    for found in (pairs.view(dtype), halves, rounded):
        assert torch.equal(found.nan_to_num(123.0), x.to(dtype).nan_to_num(123.0))
        assert torch.equal(found.isnan(), x.isnan())


@gluon.jit
def add_kernel(x_ptr, out_ptr):
    x = gl.load(x_ptr + gl.arange(0, 16))
    gl.store(out_ptr + gl.arange(0, 16), x + x)


def test_arithmetic_on_raw_bits_is_refused():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="add of bfloat16"):
        emulate(add_kernel, (1,), dict(x_ptr=x, out_ptr=x))
    out = torch.ones(16)
    emulate(add_kernel, (1,), dict(x_ptr=out, out_ptr=out))
    assert (out == 2).all()


# ---- Arguments, programs, and what Triton is like afterwards


@triton.jit
def twice(x):
    return tl.where(x > 0, x * 2, x)


@triton.jit
def through(x, FUNCTIONS: tl.constexpr, args):
    for i in tl.static_range(len(FUNCTIONS)):
        x = FUNCTIONS[i](x) + args[i]
    return x


@gluon.jit
def arguments_kernel(out_ptr, pair, nothing, factor, FUNCTIONS: gl.constexpr, SHIFT: gl.constexpr = 3):
    program = gl.program_id(0) * gl.num_programs(1) + gl.program_id(1)
    value = through(pair[0] + program, FUNCTIONS, pair[1]) * factor
    if nothing is None:
        value += SHIFT
    for i in range(program):
        value += i.to(gl.float32)
    gl.store(out_ptr + program, value)


@pytest.mark.oldest
def test_arguments_and_programs():
    out = torch.zeros(6)
    arguments = dict(out_ptr=out, pair=(4, (10, 20)), nothing=None, factor=0.5, FUNCTIONS=(twice, twice))
    emulate(arguments_kernel, (2, 3), arguments | dict(num_warps=8))
    expected = [((4 + n) * 4 + 40) * 0.5 + 3 + sum(range(n)) for n in range(6)]
    assert out.tolist() == expected


def test_bad_arguments():
    with pytest.raises(ValueError, match="copy_kernel has no parameter colour"):
        emulate(copy_kernel, (1,), dict(colour=1))
    with pytest.raises(TypeError, match="missing a required argument"):
        emulate(copy_kernel, (1,), dict(steps=1))
    with pytest.raises(ValueError, match=r"must be a @gluon.jit function"):
        emulate(twice, (1,), {})
    with pytest.raises(NotImplementedError, match="num_ctas=2"):
        emulate(add_kernel, (1,), dict(x_ptr=None, out_ptr=None, num_ctas=2))


@gluon.jit
def unknown_kernel(x_ptr, WHICH: gl.constexpr):
    if WHICH == "function":
        gl.histogram(gl.arange(0, 16), 16)
    else:
        gl.inline_asm_elementwise("add $0, $1, 1;", "=r,r", [x_ptr], gl.int32, True, 1)


@pytest.mark.oldest
def test_what_is_not_built_says_so():
    with pytest.raises(NotImplementedError, match=r"triton.experimental.gluon.language.*histogram"):
        emulate(unknown_kernel, (1,), dict(x_ptr=1, WHICH="function"))
    with pytest.raises(NotImplementedError, match=r"the assembly 'add \$0, \$1, 1;' of 1 operands"):
        emulate(unknown_kernel, (1,), dict(x_ptr=1, WHICH="assembly"))


@gluon.jit
def stays():
    named_barrier(5, "sync", 160)


@gluon.jit
def fails(x):
    return 1 // x.value


@gluon.jit
def failing_kernel(x):
    gl.warp_specialize([(stays, ()), (stays, ()), (fails, (x,))], [1, 1], [24, 24])


@pytest.mark.oldest
def test_an_exception_ends_all_roles():
    for schedule in schedules(3):
        with pytest.raises(AttributeError, match="value") as caught:
            emulate(failing_kernel, (1,), dict(x=1), schedule)
        assert "fails" in [entry.name for entry in caught.traceback]
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("role ")]
        assert tl.core.is_builtin(tl.load) and tl.core.is_builtin(tl.tensor.__add__)


def test_without_the_interpreter():
    """A process that was started without TRITON_INTERPRET=1 is told so."""
    program = (
        "from tilewise.gluon_emulator import emulate\n"
        "try: emulate(None, (1,), {})\n"
        "except RuntimeError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert "only with TRITON_INTERPRET=1" in answer.stdout, answer.stderr
