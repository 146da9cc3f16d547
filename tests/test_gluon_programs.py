"""Several programs in the Gluon emulator: tickets, counters that are polled, and what is added to memory."""

from __future__ import annotations

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from harness.gluon import LAYOUT, catch, needs_interpreter, role_barrier, schedules
from tilewise.gluon_emulator import Schedule, SlowMemory, emulate
from tilewise.kernels.hopper.instructions import add_async, wait_added

pytestmark = needs_interpreter

PROGRAMS = 4


@gluon.jit
def add_kernel(out_desc, tickets, counter, order_ptr, IS_ORDERED: gl.constexpr, WAITS: gl.constexpr):
    """Programs add 10⁸, 1, -10⁸ and 1 to a tile, in order or not, and note when their turn was."""
    number = gl.atomic_add(tickets, 1)
    if IS_ORDERED:
        while gl.atomic_add(counter, 0, sem="acquire") < number:
            pass
    tile = gl.allocate_shared_memory(gl.float32, out_desc.block_type.shape, out_desc.layout)
    value = gl.where(number == 0, 1.0e8, gl.where(number == 2, -1.0e8, 1.0))
    tile.store(gl.full(out_desc.block_type.shape, 0.0, gl.float32, LAYOUT) + value)
    fence_async_shared()
    role_barrier()
    add_async(out_desc, [0, 0], tile)
    tma.store_wait(0)
    if WAITS:
        wait_added()
    gl.store(order_ptr + gl.atomic_add(counter, 1, sem="release"), number)
    role_barrier()  # others may go on before this one ends


def run(schedule=None, together=1, is_ordered=True, waits=True):
    """The sum, and the numbers of programs in the order of their turns."""
    out, order = torch.zeros(16, 32), torch.full((PROGRAMS,), -1, dtype=torch.int32)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    arguments = dict(
        out_desc=TensorDescriptor.from_tensor(out, [16, 32], layout),
        tickets=torch.zeros(1, dtype=torch.int32),
        counter=torch.zeros(1, dtype=torch.int32),
        order_ptr=order,
        IS_ORDERED=is_ordered,
        WAITS=waits,
    )
    emulate(add_kernel, (PROGRAMS,), arguments, schedule, together)
    assert (out == out[0, 0]).all()
    return out[0, 0].item(), order.tolist()


def test_in_order_every_schedule_gives_the_same_sum():
    wanted = run()
    assert wanted[1] == [0, 1, 2, 3]
    for schedule in [*schedules(6), SlowMemory()]:
        assert run(schedule, together=3) == wanted


def test_out_of_order_sums_differ():
    found = {run(schedule, together=4, is_ordered=False)[0] for schedule in schedules(6)}
    assert len(found) > 1


def test_what_is_read_is_not_yet_there():
    """Whoever counts on when the copy engine has read its source may be overtaken on the way to memory."""
    wanted = run()[0]
    assert run(SlowMemory(), together=4)[0] == wanted
    assert run(SlowMemory(), together=4, waits=False)[0] != wanted


@gluon.jit
def wait_for_more_kernel(counter):
    gl.atomic_add(counter, 1)
    while gl.atomic_add(counter, 0, sem="acquire") < 3:
        pass


def test_programs_that_wait_for_one_another_must_live_together():
    for schedule in schedules(3):
        counter = torch.zeros(1, dtype=torch.int32)
        emulate(wait_for_more_kernel, (3,), dict(counter=counter), schedule, 3)
        assert counter.item() == 3
    arguments = dict(counter=torch.zeros(1, dtype=torch.int32))
    catch("deadlock.*a change of the number at 0x", emulate, wait_for_more_kernel, (3,), arguments)
    arguments = dict(counter=torch.zeros(1, dtype=torch.int32))
    catch(
        "no program can go on\nprogram .*a change of the number", emulate, wait_for_more_kernel, (3,),
        arguments, Schedule(), 2,
    )  # fmt: skip


@gluon.jit
def failing_kernel(x_ptr):
    gl.atomic_add(x_ptr, 1)
    gl.static_assert(gl.program_id(0) < 1)


def test_an_error_in_one_program_ends_all():
    with pytest.raises(AssertionError):
        emulate(failing_kernel, (3,), dict(x_ptr=torch.zeros(1, dtype=torch.int32)), SlowMemory(), 3)
