"""The Gluon emulator: the matmuls and copies of one role, their mistakes, and the edges of tensors."""

import re

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from harness.gluon import (
    COLUMNS,
    LAYOUT,
    ROWS,
    catch,
    descriptor,
    load_async,
    needs_interpreter,
    role_barrier,
    schedules,
    store_async,
)
from tilewise.gluon_emulator import emulate

pytestmark = needs_interpreter


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
    assert re.search(r"test_gluon_copies\.py:\d+ matmul_kernel", str(error))


def test_matmuls_need_four_warps():
    catch(r"needs groups of 4 warps, but the role has 2", run_matmul, num_warps=2)


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
