"""A stand-in GPU: Triton compiles for Hopper, binds, encodes and launches as ever, and only the C function
at the end is a recorder. Tensors are the CPU's.

    with stand_in_gpu() as (driver, recorder): ...

Kernels of this process must not be interpreted. What is faked is what Triton 3.6 and 3.9 ask of their driver.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
import triton.backends.nvidia.driver as nvidia
from triton.backends.compiler import GPUTarget

from tilewise.plan import implementation
from tilewise.plan.rules import implementations


class Recorder:
    """The C function that launches; no Python function, as that is none."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.launches.append(args)


RECORDER = Recorder()  # one for all, as a kernel that has been loaded keeps it


class Driver:
    """As much of Triton's driver as a launch asks for."""

    def __init__(self, recorder: Recorder) -> None:
        self.launcher_cls = nvidia.CudaLauncher
        self.utils = SimpleNamespace(
            launch=recorder,
            load_binary=lambda name, *rest: (name, name, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            build_signature_metadata=tuple,
            fill_tma_descriptor=lambda *words: ("map", *map(str, words)),
            fill_tma_descriptor_tiled=lambda *words: ("map", *map(str, words)),
        )
        self.device, self.stream = 0, 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def allocate_default_profile_scratch(self, *_: Any) -> None:
        return None


@contextlib.contextmanager
def stand_in_gpu() -> Iterator[tuple[Driver, Recorder]]:
    """The driver, and what records launches."""
    driver, recorder = Driver(RECORDER), RECORDER
    recorder.launches.clear()
    with contextlib.ExitStack() as stack:
        triton.runtime.driver.set_active(driver)
        fakes = dict(
            compile_module_from_src=lambda **_: SimpleNamespace(launch=recorder),
            library_dirs=list,
            PyKernelArg=lambda nested_tuple, type: (type, nested_tuple),
            ARG_CONSTEXPR="constexpr", ARG_KERNEL="kernel", ARG_TUPLE="tuple",
        )  # fmt: skip
        for name, fake in fakes.items():
            if hasattr(nvidia, name):
                stack.enter_context(mock.patch.object(nvidia, name, fake))
        for module in (implementation, implementations):  # CPU tensors are answered by kernels
            stack.enter_context(mock.patch.object(module, "INTERPRETED", True))
        yield driver, recorder
