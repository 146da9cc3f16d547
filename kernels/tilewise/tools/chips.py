"""What a GPU can do a clock, by its datasheet: the denominators of every estimate made without the GPU.

A measured figure belongs in a benchmark's results, not here. Rates are per multiprocessor (AMD: compute unit)
and dense; exponentials are those of the special function unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chip:
    """One GPU model. `clock` is that at which its maker states its matmul rate."""

    name: str
    arch: str  # as in tiles.TABLE: "sm_90"
    multiprocessors: int
    clock: float  # Hz
    matmul_flops: int  # a clock and multiprocessor: fp16 and bf16, fp32 accumulators
    float32_flops: int  # IEEE fp32 outside the tensor cores
    memory_bytes: float  # a second
    shared_bytes: int  # of one multiprocessor
    threads: int  # resident at most on one multiprocessor
    source: str
    warp: int = 32
    exponentials: int = 16  # a clock and multiprocessor
    shared_bytes_a_clock: int = 128
    registers: int = 65_536  # of 32 bits, of one multiprocessor
    fp8_flops: int = 0  # as matmul_flops, of e4m3; 0 where tilewise does not multiply it

    @property
    def exponentials_per_second(self) -> float:
        return self.exponentials * self.multiprocessors * self.clock

    def matmul_flops_of(self, element_bytes: int, is_tf32: bool = False) -> float:
        """FLOPs a clock and multiprocessor: of fp8 (1 byte); of fp16 and bf16 (2 bytes); of TF32, half of
        that; or IEEE fp32. Raises ValueError for fp8 where tilewise does not multiply it."""
        if element_bytes == 1:
            if not self.fp8_flops:
                raise ValueError(f"{self.name} ({self.arch}) is no chip on which tilewise multiplies fp8")
            return self.fp8_flops
        if element_bytes == 2:
            return self.matmul_flops
        return self.matmul_flops / 2 if is_tf32 else self.float32_flops

    def matmul_rate(self, element_bytes: int, is_tf32: bool = False) -> float:
        """The same of the whole chip, a second."""
        return self.matmul_flops_of(element_bytes, is_tf32) * self.multiprocessors * self.clock


_AMPERE, _ADA = "NVIDIA A100 datasheet", "NVIDIA Ada architecture whitepaper, appendix A"
_HOPPER, _BLACKWELL = "NVIDIA H100 and H200 datasheets (SXM)", "NVIDIA DGX B200 datasheet"

CHIPS: tuple[Chip, ...] = (
    Chip("A100 40GB", "sm_80", 108, 1.410e9, 2048, 128, 1.555e12, 164 << 10, 2048, _AMPERE),
    Chip("A100", "sm_80", 108, 1.410e9, 2048, 128, 2.039e12, 164 << 10, 2048, _AMPERE + " (80 GB SXM)"),
    Chip("RTX 3090", "sm_86", 82, 1.695e9, 512, 256, 0.936e12, 100 << 10, 1536,
         "NVIDIA GA102 architecture whitepaper"),
    Chip("RTX 4090", "sm_89", 128, 2.520e9, 512, 256, 1.008e12, 100 << 10, 1536, _ADA),
    Chip("L40S", "sm_89", 142, 2.490e9, 1024, 256, 0.864e12, 100 << 10, 1536, "NVIDIA L40S datasheet"),
    Chip("H100", "sm_90", 132, 1.830e9, 4096, 256, 3.35e12, 228 << 10, 2048, _HOPPER,
         fp8_flops=8192),
    Chip("H200", "sm_90", 132, 1.830e9, 4096, 256, 4.8e12, 228 << 10, 2048, _HOPPER,
         fp8_flops=8192),
    Chip("B200", "sm_100", 148, 1.856e9, 8192, 256, 8.0e12, 228 << 10, 2048, _BLACKWELL,
         fp8_flops=16_384),
    Chip("RTX 5090", "sm_120", 170, 2.407e9, 512, 256, 1.792e12, 100 << 10, 1536,
         "NVIDIA RTX Blackwell architecture whitepaper", fp8_flops=1024),
    Chip("MI300X", "gfx942", 304, 2.100e9, 2048, 256, 5.3e12, 64 << 10, 2048, "AMD MI300X datasheet",
         warp=64, registers=131_072),
)  # fmt: skip


def find_chip(name: str) -> Chip:
    """The chip that a name means: "H200", "NVIDIA H200", "h200".

    Raises ValueError, with the known names, where none is meant.
    """
    words = name.lower()
    # The longest name wins: "A100 40GB" is not "A100".
    for chip in sorted(CHIPS, key=lambda chip: -len(chip.name)):
        if all(word in words for word in chip.name.lower().split()):
            return chip
    known = ", ".join(chip.name for chip in CHIPS)
    raise ValueError(f"gpu={name!r} is not in the list of datasheets: {known}")


def chip_of_target(arch: str) -> Chip:
    """The chip by which estimates for a compilation target are stated: the first of its architecture that is
    made for data centres, H200 for "sm_90"."""
    stands_for = {"sm_80": "A100", "sm_90": "H200", "sm_100": "B200", "gfx942": "MI300X"}
    if arch in stands_for:
        return find_chip(stands_for[arch])
    found = [chip for chip in CHIPS if chip.arch == arch]
    if not found:
        known = ", ".join(sorted({chip.arch for chip in CHIPS}))
        raise ValueError(f"{arch=} is not in the list of datasheets: {known}")
    return found[0]


def current_chip() -> Chip | None:
    """The chip of the current GPU; None without a GPU or where it is not in the list."""
    if not torch.cuda.is_available():
        return None
    try:
        return find_chip(torch.cuda.get_device_name())
    except ValueError:
        return None
