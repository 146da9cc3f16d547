"""Run a Gluon kernel for Hopper on the CPU, and check that it keeps the rules of the machine.

Triton's interpreter runs `@triton.jit` kernels without a GPU; Gluon has none. Here the source of a Gluon
kernel runs in Python, statement by statement, so one can step through it with a debugger: its values are
those of Triton's interpreter, its roles are threads that take turns, and what Hopper does on the side (the
copy engine, the tensor cores) happens as late, or as early, as a schedule says.

    emulate(kernel, (programs,), dict(x_desc=..., n=..., num_warps=4))     # kernel[(programs,)](...)
    emulate(kernel, (programs,), arguments, RandomSchedule(seed=1))        # in another order

What breaks a rule of the machine raises EmulationError, with the role, the barrier or buffer, and the place:

    roles      a deadlock; a named barrier that counts too many threads, or a role twice, or is left half full
    mbarriers  used before init; armed twice; other bytes than are expected
    buffers    read before a copy has landed; written while a copy or a matmul still reads; written by threads
               and read by the tensor cores or the copy engine without a fence and a barrier
    races      two roles touch the same shared memory, one writes, and nothing makes one wait for the other
    the end    copies, stores or matmuls that nobody has waited for

What is not checked: layouts, registers and everything else that the compiler decides, races between the warps
of one role, clusters, whether what roles and programs tell one another through global memory is there when
they look. What Gluon has and the emulator has not raises NotImplementedError.

    schedules.py   which role goes on next, and when copies happen
    programs.py    several programs at once
    roles.py       roles, named barriers, deadlock
    memory.py      shared memory, mbarriers, who may touch what
    order.py       what must have happened before what
    copies.py      the copy engine
    matmul.py      the tensor cores
    language.py    the functions that stand in for Gluon's
    translate.py   from the kernel's functions to functions that Python can run
    numbers.py     values in registers
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.nvidia.compiler import CUDAOptions
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import interpreter
from triton.runtime.interpreter import interpreter_builder

from .copies import Descriptor
from .language import Machine, loop, own_stand_ins, stand_ins
from .numbers import interpreted_language, quiet, scalar
from .programs import Program, Programs
from .roles import EmulationError, Roles
from .schedules import PriorityChange, RandomSchedule, Schedule, SlowMemory
from .translate import Translator, unwrap

__all__ = ["EmulationError", "PriorityChange", "RandomSchedule", "Schedule", "SlowMemory", "emulate"]


def emulate(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    schedule: Schedule | None = None,
    together: int = 1,
) -> None:
    """Do what `kernel[grid](**arguments)` does on a Hopper GPU, program by program, or with as many of them
    at once as `together` says.

    kernel: a `@gluon.jit` function. arguments: its tensors, also those of its descriptors, are on the CPU; of
    the launch options, `num_warps` counts. The process must have been started with TRITON_INTERPRET=1.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("a Gluon kernel runs on the CPU only with TRITON_INTERPRET=1 in the environment")
    if not isinstance(kernel, GluonJITFunction):
        raise ValueError(f"kernel must be a @gluon.jit function, not {kernel!r}")
    options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
    if unknown := sorted(options.keys() - CUDAOptions.__dataclass_fields__.keys()):
        raise ValueError(f"{kernel.fn.__name__} has no parameter {', '.join(unknown)}")
    if options.get("num_ctas", 1) != 1:
        raise NotImplementedError(f"num_ctas={options['num_ctas']}: the emulator knows no clusters")
    bound = inspect.signature(kernel.fn).bind(**{k: v for k, v in arguments.items() if k not in options})
    bound.apply_defaults()

    schedule = Schedule() if schedule is None else schedule
    sizes = (*grid, 1, 1)[:3]
    with interpreted_language():
        machine = Machine()
        translate = Translator(stand_ins(machine), own_stand_ins(machine), loop)
        constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        values = {
            name: translate(unwrap(value)) if name in constant else _in_registers(value)
            for name, value in bound.arguments.items()
        }
        run = translate(kernel)
        interpreter_builder.set_grid_dim(*sizes)
        warps = options.get("num_warps", 4)

        def enter(program: Program) -> None:
            interpreter_builder.set_grid_idx(*program.index)
            machine.go_on(program)

        def run_all_of(program: Program) -> None:
            run(**values)
            program.roles.check_all_ended()
            program.memory.check_ended()

        indices = itertools.product(*map(range, sizes))
        if together > 1:
            programs = [Program(index, Roles(schedule, warps)) for index in indices]
            Programs(programs, together, schedule, enter, run_all_of).run()
            return
        for index in indices:
            program = Program(index, Roles(schedule, warps))
            enter(program)
            with quiet():
                run_all_of(program)


def _in_registers(argument: Any) -> Any:
    """A kernel's argument as the kernel sees it."""
    if isinstance(argument, TensorDescriptor):
        return Descriptor(argument)
    if isinstance(argument, tuple):
        return tuple(map(_in_registers, argument))
    if isinstance(argument, torch.Tensor) and argument.device.type != "cpu":
        raise ValueError(f"a tensor is on {argument.device}, but must be on the CPU")
    if isinstance(argument, float):
        return scalar(argument, tl.float32)
    return interpreter._implicit_cvt(argument)
