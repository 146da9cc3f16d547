"""The interpreter sanitizer catches each kind of planted mistake and passes the correct twin beside it."""

import os
import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from harness.sanitizer import SanitizerError, sanitize

INTERPRETED = bool(triton.knobs.runtime.interpret)  # read by Triton when @triton.jit runs


@triton.jit
def copy_kernel(x_ptr, out_ptr, length, start, SIZE: tl.constexpr):
    """out[start + program * SIZE + i] = x[the same place], masked at `length`."""
    idx = start + tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + idx, mask=idx < length, other=0.0)
    tl.store(out_ptr + idx, x, mask=idx < length)


@triton.jit
def copy_rows_kernel(x_ptr, out_ptr, x_stride, out_stride, rows, columns, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    inside = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * out_stride + column, x, mask=inside)


@triton.jit
def read_one(pair, idx):
    ptr, start = pair
    return tl.load(ptr + start + idx)


@triton.jit
def nested_kernel(out_ptr, args, SIZE: tl.constexpr):
    idx = tl.arange(0, SIZE)
    tl.store(out_ptr + idx, read_one(args[1], idx))


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, length, FEED: tl.constexpr, EXP: tl.constexpr, SIZE: tl.constexpr):
    idx = tl.arange(0, SIZE)
    if FEED:
        x = tl.load(x_ptr + idx, mask=idx < length, other=0)
    else:
        x = tl.load(x_ptr + idx, mask=idx < length)
    if EXP:
        x = tl.exp2(x)
    tl.store(out_ptr, tl.sum(x, axis=0))


@triton.jit
def pad_kernel(x_ptr, out_ptr, length, FEED: tl.constexpr, SIZE: tl.constexpr):
    idx = tl.arange(0, SIZE)
    if FEED:
        x = tl.load(x_ptr + idx, mask=idx < length, other=0)
    else:
        x = tl.load(x_ptr + idx, mask=idx < length)
    tl.store(out_ptr + idx, x)


@triton.jit
def unused_lanes_kernel(x_ptr, out_ptr, length, SIZE: tl.constexpr):
    """Masked lanes without other= are fine as long as a select drops them."""
    idx = tl.arange(0, SIZE)
    x = tl.load(x_ptr + idx, mask=idx < length)
    tl.store(out_ptr, tl.sum(tl.where(idx < length, x, 0.0), axis=0))


@triton.jit
def lookup_kernel(x_ptr, page_ptr, out_ptr, pages, FEED: tl.constexpr, SIZE: tl.constexpr):
    idx = tl.arange(0, SIZE)
    if FEED:
        page = tl.load(page_ptr + idx, mask=idx < pages, other=0)
    else:
        page = tl.load(page_ptr + idx, mask=idx < pages)
    tl.store(out_ptr + idx, tl.load(x_ptr + page))


@triton.jit
def total_kernel(x_ptr, out_ptr, ATOMIC: tl.constexpr, SPREAD: tl.constexpr, SIZE: tl.constexpr):
    program = tl.program_id(0)
    total = tl.sum(tl.load(x_ptr + program * SIZE + tl.arange(0, SIZE)), axis=0)
    if ATOMIC:
        tl.atomic_add(out_ptr + program * SPREAD, total)
    else:
        tl.store(out_ptr + program * SPREAD, total)


@triton.jit
def shift_kernel(x_ptr, out_ptr, step, SIZE: tl.constexpr):
    program = tl.program_id(0) + tl.program_id(1) + tl.program_id(2)
    idx = program * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + idx, tl.load(x_ptr + idx + step))


@triton.jit
def fold_kernel(x_ptr, out_ptr, fold, SIZE: tl.constexpr):
    idx = tl.arange(0, SIZE)
    tl.store(out_ptr + idx % fold, tl.load(x_ptr + idx))


@triton.jit
def cast_kernel(x_ptr, out_ptr, start_bytes, SIZE: tl.constexpr):
    ptr = (x_ptr.to(tl.pointer_type(tl.uint8)) + start_bytes).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + tl.arange(0, SIZE), tl.load(ptr + tl.arange(0, SIZE)))


def raises(check: str, *words: str):
    return pytest.raises(SanitizerError, match="^" + check + ".*" + ".*".join(map(re.escape, words)))


class TestInTheInterpreter:
    __test__ = INTERPRETED

    @pytest.mark.oldest
    def test_bounds_one_past_the_end(self):
        x, out = torch.randn(40), torch.zeros(48)
        words = (
            "copy_kernel, program (2, 0, 0)",
            "load of element offset 40 of x_ptr",
            "last element is at 39",
        )
        with raises("bounds", *words), sanitize():
            copy_kernel[(3,)](x, out, 41, 0, SIZE=16)
        with sanitize() as state:
            copy_kernel[(3,)](x, out, 40, 0, SIZE=16)
        assert state.launches == 1 and torch.equal(out[:40], x)

    def test_bounds_one_past_the_end_in_a_neighbouring_tensor(self):
        # The address is another tensor's element: only following the pointer to its tensor can tell.
        both, out = torch.randn(64), torch.zeros(64)
        with raises("bounds", "element offset 32 of x_ptr"), sanitize():
            copy_kernel[(3,)](both[:32], both[32:], 33, 0, SIZE=16)
        with sanitize():
            copy_kernel[(2,)](both[:32], out[32:], 32, 0, SIZE=16)
        assert torch.equal(out[32:], both[:32])

    def test_bounds_negative_offset(self):
        x, out = torch.randn(64), torch.zeros(64)
        with raises("bounds", "load of element offset -1 of x_ptr"), sanitize():
            copy_kernel[(1,)](x[16:], out[16:], 16, -1, SIZE=16)
        with sanitize():
            copy_kernel[(1,)](x[16:], out[16:], 16, 0, SIZE=16)

    def test_bounds_store_past_the_end(self):
        x, out = torch.randn(48), torch.zeros(47)
        with raises("bounds", "store of element offset 47 of out_ptr"), sanitize():
            copy_kernel[(3,)](x, out, 48, 0, SIZE=16)
        with sanitize():
            copy_kernel[(3,)](x, out, 47, 0, SIZE=16)

    def test_bounds_empty_tensor(self):
        x, out = torch.zeros(0), torch.zeros(0)
        with raises("bounds", "load of element offset 0 of x_ptr"), sanitize():
            copy_kernel[(1,)](x, out, 1, 0, SIZE=16)
        with sanitize():
            copy_kernel[(1,)](x, out, 0, 0, SIZE=16)

    @pytest.mark.parametrize("wrong", ["load", "store"])
    def test_bounds_wrong_stride_lands_in_the_gaps_of_a_view(self, wrong):
        x, out = torch.randn(8, 24)[:, :10], torch.zeros(8, 20)[:, :10]
        strides = (20, 20) if wrong == "load" else (24, 10)
        with raises("bounds", wrong, "strides (24, 1)" if wrong == "load" else "strides (20, 1)"), sanitize():
            copy_rows_kernel[(1,)](x, out, *strides, 8, 10, SIZE=16)
        with sanitize():
            copy_rows_kernel[(1,)](x, out, 24, 20, 8, 10, SIZE=16)
        assert torch.equal(out, x)

    def test_bounds_views_of_every_kind(self):
        base = torch.randn(4096)
        for x, stride in [
            (base[:160].view(16, 10), 10),
            (base[:10].expand(16, 10), 0),
            (base.as_strided((16, 10), (3, 1)), 3),  # overlapping rows
            (base[7 : 7 + 16 * 200].view(16, 200)[:, 3:13], 200),
            (base.view(64, 64)[::2][:16, :10], 128),
        ]:
            out = torch.zeros(16, 10)
            with sanitize():
                copy_rows_kernel[(1,)](x, out, stride, 10, 16, 10, SIZE=16)
            assert torch.equal(out, x)
            with raises("bounds", "x_ptr"), sanitize():
                copy_rows_kernel[(1,)](x, out, stride + 1 if stride else 1, 10, 16, 10, SIZE=16)

    def test_bounds_inside_nested_tuples(self):
        x, out = torch.randn(20), torch.zeros(16)
        with raises("bounds", "nested_kernel", "element offset 20 of args[1][0]"), sanitize():
            nested_kernel[(1,)](out, (1.0, (x, 5)), SIZE=16)
        with sanitize():
            nested_kernel[(1,)](out, (1.0, (x, 4)), SIZE=16)
        assert torch.equal(out, x[4:])

    def test_bounds_misaligned_element(self):
        x, out = torch.randn(20), torch.zeros(16)
        with raises("bounds", "element offset 0.5 of x_ptr"), sanitize():
            cast_kernel[(1,)](x, out, 2, SIZE=16)
        with sanitize():
            cast_kernel[(1,)](x, out, 4, SIZE=16)
        assert torch.equal(out, x[1:17])

    @pytest.mark.oldest
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
    def test_poison_masked_lanes_feed_a_sum(self, dtype):
        x, out = torch.arange(16).to(dtype), torch.zeros(1, dtype=dtype)
        if dtype.is_floating_point:
            with raises("poison", "row_sum_kernel", "test_sanitizer.py:"), sanitize():
                row_sum_kernel[(1,)](x, out, 10, FEED=False, EXP=False, SIZE=16)
        else:  # a sum of marked integers bears no mark: it is a number that no test expects
            with sanitize():
                row_sum_kernel[(1,)](x, out, 10, FEED=False, EXP=False, SIZE=16)
            assert out.item() != 45
        with sanitize():
            row_sum_kernel[(1,)](x, out, 10, FEED=True, EXP=False, SIZE=16)
            assert out.item() == 45
            row_sum_kernel[(1,)](x[:10], out, 10, FEED=True, EXP=False, SIZE=16)
            unused_lanes_kernel[(1,)](x, out, 10, SIZE=16)
        assert out.item() == 45

    def test_poison_survives_an_exponential(self):
        x, out = torch.randn(16), torch.zeros(1)
        with raises("poison", "masked lane without other="), sanitize():
            row_sum_kernel[(1,)](x, out, 10, FEED=False, EXP=True, SIZE=16)
        with sanitize():
            row_sum_kernel[(1,)](x, out, 10, FEED=True, EXP=True, SIZE=16)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32, torch.uint8])
    def test_poison_stored_as_it_is(self, dtype):
        x, out = torch.arange(16).to(dtype), torch.zeros(16, dtype=dtype)
        with raises("poison", "pad_kernel"), sanitize():
            pad_kernel[(1,)](x, out, 10, FEED=False, SIZE=16)
        with sanitize():
            pad_kernel[(1,)](x, out, 10, FEED=True, SIZE=16)
        assert out.tolist() == [*range(10), *[0] * 6]

    def test_poison_is_told_from_a_users_nan(self):
        x, out = torch.full((16,), float("nan")), torch.zeros(16)
        with sanitize():
            row_sum_kernel[(1,)](x, out, 10, FEED=True, EXP=False, SIZE=16)
            unused_lanes_kernel[(1,)](x, out, 10, SIZE=16)
        assert out[0].isnan()

    def test_poison_as_an_index_is_out_of_bounds(self):
        x, page, out = torch.randn(16), torch.arange(16), torch.zeros(16)
        with raises("bounds", "x_ptr"), sanitize():
            lookup_kernel[(1,)](x, page, out, 10, FEED=False, SIZE=16)
        with sanitize():
            lookup_kernel[(1,)](x, page, out, 10, FEED=True, SIZE=16)

    @pytest.mark.oldest
    def test_race_two_programs_store_to_one_address(self):
        x, out = torch.ones(64), torch.zeros(4)
        with (
            raises("race", "total_kernel, program (1, 0, 0)", "store of element offset 0 of out_ptr"),
            sanitize(),
        ):
            total_kernel[(4,)](x, out, ATOMIC=False, SPREAD=0, SIZE=16)
        with sanitize():
            total_kernel[(4,)](x, out, ATOMIC=False, SPREAD=1, SIZE=16)
        assert out.tolist() == [16.0] * 4
        with sanitize():
            total_kernel[(4,)](x, out.zero_(), ATOMIC=True, SPREAD=0, SIZE=16)
        assert out[0] == 64

    def test_race_is_not_reported_between_launches_or_when_switched_off(self):
        x, out = torch.ones(64), torch.zeros(4)
        with sanitize(races=False):
            total_kernel[(4,)](x, out, ATOMIC=False, SPREAD=0, SIZE=16)
        with sanitize() as state:
            for _ in range(2):
                total_kernel[(4,)](x, out, ATOMIC=False, SPREAD=1, SIZE=16)
        assert state.launches == 2

    @pytest.mark.parametrize("grid", [(3,), (1, 3), (1, 1, 3)])
    @pytest.mark.parametrize("step", [16, -16], ids=["written_after_the_read", "read_after_the_write"])
    def test_race_one_program_reads_what_another_writes(self, step, grid):
        x = torch.randn(5 * 16)
        with raises("race", "shift_kernel", "store" if step > 0 else "load"), sanitize():
            shift_kernel[grid](x, x[16:64], 16 + step, SIZE=16)
        with sanitize():
            shift_kernel[grid](x, x[16:64], 16, SIZE=16)

    def test_collision_of_lanes(self):
        x, out = torch.randn(16), torch.zeros(16)
        with raises("collision", "fold_kernel"), sanitize():
            fold_kernel[(1,)](x, out, 8, SIZE=16)
        with sanitize():
            fold_kernel[(1,)](x, out, 16, SIZE=16)
            fold_kernel[(1,)](torch.ones(16), out, 8, SIZE=16)  # all lanes agree

    def test_fresh_memory_is_not_read_before_it_is_written(self):
        x, scratch, out = torch.randn(32), torch.zeros(32), torch.zeros(32)
        with raises("fresh", "load of never written element offset 16 of x_ptr"), sanitize(fresh=[scratch]):
            copy_kernel[(1,)](x, scratch, 16, 0, SIZE=16)
            copy_kernel[(2,)](scratch, out, 32, 0, SIZE=16)
        with sanitize(fresh=[scratch]):
            copy_kernel[(2,)](x, scratch, 32, 0, SIZE=16)
            copy_kernel[(2,)](scratch, out, 32, 0, SIZE=16)
        assert torch.equal(out, x)

    def test_a_kernels_own_error_passes_through(self):
        with pytest.raises(Exception, match="length") as caught, sanitize():
            copy_kernel[(1,)](torch.zeros(1), torch.zeros(1), start=0, SIZE=16)
        assert not isinstance(caught.value, SanitizerError)

    def test_the_interpreter_is_left_as_it_was(self):
        x, out = torch.randn(40), torch.zeros(41)
        with raises("bounds"), sanitize():
            copy_kernel[(3,)](x, out, 41, 0, SIZE=16)
        row_sum_kernel[(1,)](x, out, 10, FEED=False, EXP=False, SIZE=16)
        assert out[0].isfinite()


if not INTERPRETED:

    def test_in_an_interpreter_process():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
