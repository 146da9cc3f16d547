"""The Gluon emulator: kernels of several roles run in every order, and mistakes between roles are caught."""

import re

import pytest
import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language import core

from harness.gluon import (
    COLUMNS,
    LAYOUT,
    ROWS,
    catch,
    descriptor,
    load_async,
    named_barrier,
    needs_interpreter,
    outcome,
    role_barrier,
    schedules,
    store_async,
)
from tilewise.gluon_emulator import PriorityChange, RandomSchedule, Schedule, emulate

pytestmark = needs_interpreter
aggregate = getattr(triton, "aggregate", None) or core._aggregate


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
