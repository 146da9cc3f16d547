"""The tensor cores: products that run beside the role that started them, until it waits.

A product is computed at the wait that completes it, from what shared memory holds then; its operands must not
change in between, which memory.py checks. It rounds where `numerics.matmul` does in Triton's interpreter: the
sum of its exact products, taken in float64, to fp32; then what that is added to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl

from .memory import Access, Memory, SharedMemory
from .numbers import array, register, to_float32
from .roles import place


class Product:
    """acc + a · b, or a · b, under way. It has no value, and supports nothing, before it was waited for."""

    def __init__(self, memory: Memory, a: Any, b: SharedMemory, acc: Any, use_acc: bool) -> None:
        role = memory.roles.running
        self._memory, self._a, self._b, self._acc, self._use_acc = memory, a, b, acc, use_acc
        self._name = f"the warpgroup_mma that {role} issued at {place()}"
        self._value: tl.tensor | None = None
        self._check(role.warps)
        operands = [operand for operand in (a, b) if isinstance(operand, SharedMemory)]
        for operand in operands:
            memory.check_landed(operand, "warpgroup_mma")
            memory.check_seen(operand, "warpgroup_mma")
        self._accesses = [Access(operand.data, self) for operand in operands]
        memory.read += self._accesses

    def _check(self, warps: int) -> None:
        fault = self._memory.roles.fault
        a, b, acc = self._a, self._b, self._acc
        if warps % 4:
            raise fault(f"warpgroup_mma needs groups of 4 warps, but the role has {warps}")
        if not isinstance(b, SharedMemory):
            raise fault("the right operand of warpgroup_mma must be in shared memory")
        if a.dtype != b.dtype or a.dtype not in (tl.float16, tl.bfloat16):
            raise NotImplementedError(f"warpgroup_mma of {a.dtype} and {b.dtype}: both fp16, or both bf16")
        self.shape = [int(a.shape[0]), int(b.shape[1])]
        shapes = [[int(n) for n in operand.shape] for operand in (a, b, acc)]
        if shapes[0][1] != shapes[1][0] or shapes[2] != self.shape:
            raise fault(f"warpgroup_mma of shapes {shapes[0]} · {shapes[1]} + {shapes[2]}")
        if isinstance(acc, tl.tensor) and acc.dtype != tl.float32:
            raise NotImplementedError(f"warpgroup_mma that accumulates in {acc.dtype}: float32 only")

    def complete(self) -> tl.tensor:
        """Compute it. Products complete in the order of their issue."""
        with np.errstate(all="ignore"):
            value = np.matmul(self._operand(self._a), self._operand(self._b)).astype(np.float32)
            if self._use_acc:
                acc = self._acc.value() if isinstance(self._acc, Product) else self._acc
                value += array(acc)
        for access in self._accesses:
            self._memory.read.remove(access)
        self._value = register(value, tl.float32)
        return self._value

    def value(self) -> tl.tensor:
        """Its value; an error where nobody has waited for it."""
        if self._value is None:
            raise self._memory.roles.fault(f"uses the result of {self}, which is under way still")
        return self._value

    @staticmethod
    def _operand(operand: Any) -> np.ndarray[Any, Any]:
        data = operand.data if isinstance(operand, SharedMemory) else array(operand)
        return to_float32(data, operand.dtype).astype(np.float64)

    def __str__(self) -> str:
        return self._name

    def __getattr__(self, name: str) -> Any:
        raise self._memory.roles.fault(f"uses .{name} of {self._name}, which nobody has waited for")


def _refuse(self: Product, *others: Any) -> Any:
    raise self._memory.roles.fault(f"computes with {self}, which nobody has waited for")


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "radd",
    "rsub",
    "rmul",
    "rtruediv",
    "neg",
    "getitem",
    "lt",
    "gt",
):
    setattr(Product, f"__{_name}__", _refuse)
