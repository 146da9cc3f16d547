"""What stands in for Gluon: a class for each of its modules, with functions of the same names.

What only computes on registers is the function of `triton.language` of the same name, as Triton's interpreter
runs it, without the layout. The others move data or wait: memory.py, copies.py, matmul.py, roles.py.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .copies import Add, Descriptor, Load, Store, check_tile
from .matmul import Product
from .memory import MBarrier, Memory, SharedMemory
from .numbers import array, integer, numpy_dtype, register, scalar, to_bfloat16
from .programs import Program
from .roles import Roles

# Functions of Gluon that are those of `triton.language`; some have a layout as their last parameter.
SAME = re.findall(
    r"\w+",
    """
    abs add assume broadcast cast cdiv ceil cos device_assert device_print div_rn erf exp exp2
    expand_dims fdiv floor fma join load log log2 max maximum min minimum mul multiple_of max_contiguous
    num_programs permute program_id ravel reshape rsqrt sin split sqrt sqrt_rn static_assert
    static_print store sub sum umulhi where xor_sum
    """,
)

NUMBERS: dict[int, Any] = {32: ctypes.c_int32, 64: ctypes.c_int64}  # by bits
BARRIER = re.compile(r"bar\.(sync|arrive) \$1 ?, ?(\d+) ?; ?mov\.b32 \$0 ?, ?\$1 ?;")
ROUND = re.compile(r"cvt\.rn\.(bf16x2|f16x2)\.f32 \$0 ?, ?\$2 ?, ?\$1 ?;")
WRITTEN = re.compile(r"cp\.async\.bulk\.wait_group 0 ?; ?mov\.b32 \$0 ?, ?\$1 ?;")
FENCE = re.compile(r"fence\.proxy\.async\.global ?; ?mov\.b32 \$0 ?, ?\$1 ?;")
UNPACK = re.compile(r"mov\.b32 \{ ?\$0 ?, ?\$1 ?\} ?, ?\$2 ?;")


def loop(*bounds: Any) -> Iterator[tl.tensor]:
    """In place of `range`: a loop's variable is a value in a register."""
    for i in range(*map(integer, bounds)):
        yield scalar(i)


class Machine:
    """The program that runs."""

    roles: Roles
    memory: Memory

    def go_on(self, program: Program) -> None:
        """This one runs, from its beginning or from where it was."""
        if program.memory is None:
            program.memory = Memory(program.roles)
            program.roles.other_barriers = program.memory.mbarriers.values()
        self.roles, self.memory = program.roles, program.memory


class Namespace:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @property
    def _roles(self) -> Roles:
        return self._machine.roles

    @property
    def _memory(self) -> Memory:
        return self._machine.memory


class GluonLanguage(Namespace):
    """`triton.experimental.gluon.language`"""

    def constexpr(self, value: Any) -> Any:
        return value

    def static_range(self, *bounds: int) -> range:
        return range(*bounds)

    def to_tensor(self, value: Any) -> tl.tensor:
        return tl.core.to_tensor(value)

    def arange(self, start: int, end: int, layout: Any = None) -> tl.tensor:
        return tl.arange(start, end)

    def full(self, shape: Sequence[int], value: Any, dtype: tl.dtype, layout: Any = None) -> tl.tensor:
        return tl.full(list(shape), value, dtype)

    def zeros(self, shape: Sequence[int], dtype: tl.dtype, layout: Any = None) -> tl.tensor:
        return tl.full(list(shape), 0, dtype)

    def full_like(
        self, input: tl.tensor, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None
    ) -> tl.tensor:
        return tl.full(list(shape or input.shape), value, dtype or input.dtype)

    def zeros_like(
        self, input: tl.tensor, shape: Any = None, dtype: Any = None, layout: Any = None
    ) -> tl.tensor:
        return self.full_like(input, 0, shape, dtype)

    def convert_layout(self, value: tl.tensor, layout: Any, assert_trivial: bool = False) -> tl.tensor:
        return value

    def num_warps(self) -> int:
        return self._roles.running.warps

    def allocate_shared_memory(
        self, element_ty: tl.dtype, shape: Sequence[int], layout: Any, value: Any = None
    ) -> SharedMemory:
        memory = self._memory.allocate(element_ty, shape, layout)
        if value is not None:
            memory.store(value)
        return memory

    def warp_specialize(
        self, functions_and_args: Any, worker_num_warps: Sequence[int], worker_num_regs: Any = None
    ) -> Any:
        self._memory.barrier()
        result = self._roles.specialize(functions_and_args, worker_num_warps)
        self._memory.barrier(of_all=True)
        return result

    def barrier(self, *, cluster: bool = False) -> None:
        """The warps of a role are one here: nobody to wait for."""
        self._roles.switch()
        self._memory.barrier()

    thread_barrier = barrier

    def inline_asm_elementwise(
        self, asm: str, constraints: str, args: Sequence[tl.tensor], dtype: Any, is_pure: bool, pack: int
    ) -> Any:
        text = " ".join(asm.split())
        if pack == 1 and (match := BARRIER.fullmatch(text)) and len(args) == 1:
            if is_pure:
                raise self._roles.fault(f"{text!r} with is_pure=True: the compiler may drop it")
            self._named_barrier(match[1], args[0], int(match[2]))
            return args[0]
        if pack == 1 and (match := ROUND.fullmatch(text)) and len(args) == 2:
            low, high = (_bits(array(x), match[1]).astype(np.uint32) for x in args)
            return register((low | high << np.uint32(16)).view(numpy_dtype(dtype)), dtype)
        if pack == 1 and UNPACK.fullmatch(text) and len(args) == 1:
            pair = array(args[0]).view(np.uint32)
            halves = (pair & np.uint32(0xFFFF), pair >> np.uint32(16))
            return tuple(
                register(half.astype(np.uint16).view(numpy_dtype(kind)), kind)
                for half, kind in zip(halves, dtype, strict=True)
            )
        if pack == 1 and len(args) == 1 and not is_pure and WRITTEN.fullmatch(text):
            wait_for_stores(self._roles, 0, read_only=False)
            return args[0]
        if pack == 1 and len(args) == 1 and not is_pure and FENCE.fullmatch(text):
            return args[0]  # global memory is one here
        raise NotImplementedError(f"the emulator does not know the assembly {asm!r} of {len(args)} operands")

    def atomic_add(
        self, pointer: tl.tensor, val: Any, mask: Any = None, sem: Any = None, scope: Any = None
    ) -> tl.tensor:
        """Who adds 0 to the same number again, and finds it as it was, waits until it is not."""
        self._roles.switch()
        role = self._roles.running
        is_poll = mask is None and not isinstance(val, tl.tensor) and val == 0 and not pointer.type.is_block()
        if not is_poll:
            return tl.atomic_add(pointer, val, mask, sem, scope)
        value = tl.atomic_add(pointer, val, mask, sem, scope)
        address = integer(pointer)
        if role.polled == (address, integer(value)):
            number = NUMBERS[value.dtype.primitive_bitwidth].from_address(address)
            was = integer(value)
            self._roles.wait(lambda: number.value != was, f"a change of the number at {address:#x}, {was}")
            value = tl.atomic_add(pointer, val, mask, sem, scope)
        role.polled = address, integer(value)
        return value

    def _named_barrier(self, instruction: str, numbers: tl.tensor, threads: int) -> None:
        number = int(array(numbers).flat[0])
        if (array(numbers) != number).any():
            raise self._roles.fault(f"bar.{instruction} of different barriers at once: {array(numbers)}")
        self._roles.switch()
        self._memory.arrive()
        if instruction == "sync":
            self._roles.sync(number, threads)
            self._memory.barrier()
        else:
            self._roles.arrive(number, threads)


def wait_for_stores(roles: Roles, pendings: int, read_only: bool) -> None:
    """Until all but the last `pendings` stores of the role have read their source, or memory has them too."""
    role = roles.running
    kept = role.stores if read_only else role.writes
    done = kept[: max(len(kept) - pendings, 0)]
    if read_only:
        roles.wait(lambda: all(store.has_read for store in done), "its TMA stores", role)
    else:
        roles.wait(lambda: all(store.has_happened for store in done), "what its TMA stores write", role)
        role.writes = [store for store in role.writes if store not in done]
    for store in [store for store in role.stores if store in done]:
        store.release()
        role.stores.remove(store)


def _bits(x: np.ndarray[Any, Any], instruction: str) -> np.ndarray[Any, Any]:
    if instruction == "bf16x2":
        return to_bfloat16(x)
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16)


class Hopper(Namespace):
    """`triton.experimental.gluon.language.nvidia.hopper`"""

    def fence_async_shared(self, cluster: bool = False) -> None:
        self._memory.fence()

    def warpgroup_mma(
        self, a: Any, b: SharedMemory, acc: Any, *, use_acc: Any = True, is_async: bool = False
    ) -> Any:
        self._roles.switch()
        product = Product(self._memory, a, b, acc, bool(use_acc))
        self._memory.begin(product)
        self._roles.running.products.append(product)
        return product if is_async else self.warpgroup_mma_wait(0, [product])

    def warpgroup_mma_wait(self, num_outstanding: int = 0, deps: Sequence[Any] | None = None) -> Any:
        self._roles.switch()
        if deps is None:
            raise ValueError("warpgroup_mma_wait deps must be given")
        role = self._roles.running
        done = max(len(role.products) - num_outstanding, 0)
        for product in role.products[:done]:
            product.complete()
            self._memory.end(product)
        del role.products[:done]
        values = [dep.value() if isinstance(dep, Product) else dep for dep in deps]
        return values[0] if len(values) == 1 else tuple(values)


class MBarriers(Namespace):
    """`triton.experimental.gluon.language.nvidia.hopper.mbarrier`"""

    def init(self, mbarrier: SharedMemory, count: int) -> None:
        if mbarrier.numel != 1 or mbarrier.dtype != gl.int64:
            raise self._roles.fault(f"an mbarrier is one int64, but {mbarrier.name} is {mbarrier.shape}")
        self._memory.mbarriers[mbarrier.address] = MBarrier(mbarrier.name, count, count)

    def expect(self, mbarrier: SharedMemory, bytes_per_cta: int, pred: Any = True) -> None:
        self._roles.switch()
        if not pred:
            return
        barrier = self._ready(mbarrier, 1)
        barrier.bytes += bytes_per_cta
        barrier.arrive(1, self._roles.running)

    def arrive(self, mbarrier: SharedMemory, *, count: int = 1, pred: Any = True) -> None:
        self._roles.switch()
        if pred:
            self._memory.barrier()  # Triton has the role's warps wait for one another before it arrives
            self._ready(mbarrier, count).arrive(count, self._roles.running)

    def wait(self, mbarrier: SharedMemory, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        barrier, parity = self._memory.mbarrier(mbarrier), integer(phase)
        if parity not in (0, 1):
            raise self._roles.fault(f"mbarrier.wait for phase {parity}, which must be 0 or 1: {barrier}")
        if pred:
            self._roles.wait(
                lambda: barrier.has_completed(parity), f"parity {parity} of mbarrier {barrier.name}", barrier
            )
            barrier.learn(self._roles.running)
        else:
            self._roles.switch()

    def _ready(self, mbarrier: SharedMemory, count: int) -> MBarrier:
        barrier = self._memory.mbarrier(mbarrier)
        if barrier.arrivals < count:
            raise self._roles.fault(f"arrives {count} times, before the phase has ended, at {barrier}")
        return barrier


class Tma(Namespace):
    """`triton.experimental.gluon.language.nvidia.hopper.tma`"""

    def async_load(
        self,
        tensor_desc: Descriptor,
        coord: Any,
        barrier: SharedMemory,
        result: SharedMemory,
        pred: Any = True,
    ) -> None:
        self._roles.switch()
        if pred:
            corner = check_tile(self._memory, tensor_desc, coord, result)
            signals = self._memory.mbarrier(barrier)
            self._roles.copies.append(Load(self._memory, tensor_desc, corner, signals, result))

    def async_store(self, tensor_desc: Descriptor, coord: Any, src: SharedMemory) -> None:
        self._begin(Store, tensor_desc, coord, src)

    def async_atomic_add(self, tensor_desc: Descriptor, coord: Any, src: SharedMemory) -> None:
        self._begin(Add, tensor_desc, coord, src)

    def _begin(self, kind: type[Store], descriptor: Descriptor, corner: Any, source: SharedMemory) -> None:
        self._roles.switch()
        store = kind(self._memory, descriptor, check_tile(self._memory, descriptor, corner, source), source)
        self._roles.running.stores.append(store)
        self._roles.running.writes.append(store)
        self._roles.copies.append(store)

    if not hasattr(tma, "async_load"):  # Triton 3.6
        async_copy_global_to_shared = async_load
        async_copy_shared_to_global = async_store

    def store_wait(self, pendings: int, read_only: bool = True) -> None:
        wait_for_stores(self._roles, pendings, read_only)


def own_stand_ins(machine: Machine) -> dict[str, Callable[..., Any]]:
    """What stands in for a function that a kernel adds to Gluon, by its name."""
    return {"add_async": Tma(machine).async_atomic_add}


def stand_ins(machine: Machine) -> dict[int, Callable[..., Any]]:
    """What stands in for each function of Gluon, by its id. To be called where `triton.language` is replaced
    by the interpreter's."""
    found = {id(getattr(gl, name)): getattr(tl, name) for name in SAME}
    for module, namespace in (
        (gl, GluonLanguage(machine)),
        (hopper, Hopper(machine)),
        (mbarrier, MBarriers(machine)),
        (tma, Tma(machine)),
    ):
        names = [name for name in dir(namespace) if not name.startswith("_") and hasattr(module, name)]
        found |= {id(getattr(module, name)): getattr(namespace, name) for name in names}
    return found
