"""What tests of the Gluon emulator have in common: orders of events, outcomes, named barriers, and the names
that Triton's versions give to one thing."""

from __future__ import annotations

import re
import threading

import pytest
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewise.gluon_emulator import EmulationError, PriorityChange, RandomSchedule, Schedule

needs_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="the emulator runs where Triton's interpreter does"
)
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
