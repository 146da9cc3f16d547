"""The Gluon emulator: numbers, arguments, programs, what it refuses, and what Triton is like afterwards."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from harness.gluon import named_barrier, needs_interpreter, schedules
from tilewise.gluon_emulator import emulate

pytestmark = needs_interpreter


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
    with pytest.raises(ValueError, match="add_kernel has no parameter colour"):
        emulate(add_kernel, (1,), dict(colour=1))
    with pytest.raises(TypeError, match="missing a required argument"):
        emulate(add_kernel, (1,), dict(out_ptr=None))
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
