"""Do the roles, and the programs, of Hopper's backward wait for one another as they should?

The kernel's own source runs in the emulator under many schedules, with several programs alive at once that
start and go on in any order. Each must end, break no rule of the machine and give the very bits of every
other: sums of dQ are taken in one order, which programs keep by a counter in memory.
"""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import tilewise
from harness.gluon import catch
from tilewise.gluon_emulator import PriorityChange, RandomSchedule, Schedule, SlowMemory, emulate
from tilewise.kernels.hopper.backward import launch, reducer
from tilewise.kernels.hopper.backward.kernel import hopper_backward_kernel
from tilewise.kernels.prepare import BackwardCall, prepare
from tilewise.kernels.tile import HopperBackwardTile
from tilewise.plan.bind import bind
from tilewise.plan.passes import run_forward
from tilewise.plan.request import make_request

if not triton.knobs.runtime.interpret:
    pytest.skip("the emulator needs TRITON_INTERPRET=1", allow_module_level=True)

SEEDS = 6


def draw(rng: random.Random) -> dict[str, Any]:
    """A problem of a few tiles of keys, in which programs have unequal work."""
    kv_heads, group = rng.choice(((1, 1), (1, 2), (2, 1)))
    return dict(
        q_len=rng.choice((1, 100, 128, 130, 260)),
        kv_len=rng.choice((100, 256, 300, 400)),
        heads=(kv_heads * group, kv_heads),
        mask=rng.choice(
            (None, tilewise.Causal(), tilewise.Causal("top_left"), tilewise.Window(150, 0, "top_left"))
        ),
        stages=rng.choice((2, 2, 3)),
    )


def prepared(*, q_len, kv_len, heads, mask, stages) -> tuple[BackwardCall, HopperBackwardTile]:
    generator = torch.Generator().manual_seed(q_len + kv_len)
    q_heads, kv_heads = heads
    q, do = (torch.randn(1, q_heads, q_len, 16, generator=generator).half() for _ in range(2))
    k, v = (torch.randn(1, kv_heads, kv_len, 16, generator=generator).half() for _ in range(2))
    request = make_request(q, k, v, mask=mask)
    out, _, statistics = run_forward(request, return_lse=False, for_backward=True)
    tile = HopperBackwardTile(128, 128, 8, stages)
    return prepare(bind(request), out, statistics, do, None, tile.tile_q), tile


def run(
    backward: BackwardCall,
    tile: HopperBackwardTile,
    schedule: Schedule | None = None,
    together: int = 1,
    deterministic: bool = True,
) -> tuple[torch.Tensor, ...]:
    """The sums of dq in fp32, dk, dv and the counters under a schedule."""
    call = backward.call
    dk, dv = (torch.full_like(x, torch.nan) for x in (call.k, call.v))
    sums = launch.empty_sums(backward)
    grid, arguments = launch.backward_launch(backward, sums, dk, dv, tile, deterministic)
    emulate(hopper_backward_kernel, grid, arguments, schedule, together)
    return sums, dk, dv, arguments["counters"]


def schedules(seed: int) -> list[Schedule]:
    return [SlowMemory(), RandomSchedule(seed), PriorityChange(seed, 30, 3000)]


def visits(backward: BackwardCall) -> torch.Tensor:
    """How many tiles of keys each tile of rows visits."""
    start, stop = backward.ranges[..., 0], backward.ranges[..., 1]
    return torch.where(start < stop, (stop + 127) // 128 - start // 128, 0).flatten()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_order_gives_the_same_bits(seed):
    problem = prepared(**draw(random.Random(seed)))
    wanted = run(*problem)
    assert all(x.isfinite().all() for x in wanted[:3])
    assert torch.equal(wanted[3], visits(problem[0]))  # everybody has counted once
    together = random.Random(seed).choice((2, 3, 8))
    for schedule in schedules(seed):
        for ours, same in zip(run(*problem, schedule, together), wanted, strict=True):
            assert torch.equal(ours, same), (type(schedule).__name__, together)


MANY = dict(
    q_len=130, kv_len=600, heads=(1, 1), mask=None, stages=2
)  # five programs add to two tiles of rows


def test_without_turns_the_order_decides_and_nobody_counts():
    problem = prepared(**MANY)
    wanted = run(*problem)
    found = [
        run(*problem, schedule, 5, deterministic=False) for schedule in (SlowMemory(), RandomSchedule(0))
    ]
    for dq, dk, dv, counters in found:
        assert torch.equal(dk, wanted[1]) and torch.equal(dv, wanted[2]) and not counters.any()
        torch.testing.assert_close(dq, wanted[0], atol=2e-3, rtol=2e-3)
    assert any(not torch.equal(dq, wanted[0]) for dq, *_ in found)


@pytest.mark.oldest
def test_programs_add_to_the_same_rows_in_the_order_of_their_keys():
    problem = prepared(**MANY)
    wanted = run(*problem)
    assert torch.equal(wanted[3], torch.tensor([5, 5], dtype=torch.int32))
    for schedule in (SlowMemory(), RandomSchedule(0), RandomSchedule(1)):
        for ours, same in zip(run(*problem, schedule, 5), wanted, strict=True):
            assert torch.equal(ours, same)


@gluon.jit
def nobody_waits(counter, rank, before):
    reducer.pass_turn(before)


@gluon.jit
def read_is_enough(counter):
    """The turn is passed on when the copy engine has read what it is going to add."""
    gl.atomic_add(counter, 1, sem="release")


@pytest.mark.parametrize("name, other", [("take_turn", nobody_waits), ("pass_turn", read_is_enough)])
def test_turns_are_what_keeps_the_order(name, other, monkeypatch):
    """The same schedules without one half of them: some have other bits."""
    problem = prepared(**MANY)
    wanted = run(*problem)[0]
    monkeypatch.setattr(reducer, name, other)
    found = [run(*problem, schedule, 5)[0] for schedule in (SlowMemory(), RandomSchedule(0))]
    assert any(not torch.equal(dq, wanted) for dq in found)


def test_a_program_that_is_not_there_is_waited_for():
    """Its rank is never reached: the report names the counter's value."""
    problem = prepared(**MANY)
    problem[0].ranges[..., 0] = -128  # as if a tile of keys came before the first
    error = catch("no role can go on.*a change of the number at 0x", run, *problem)
    assert re.search(r"reducer\.py:\d+ take_turn", str(error))
    catch("no program can go on.*take_turn", run, *problem, RandomSchedule(0), 2)


def test_tickets_not_the_hardware_say_who_comes_first():
    """Without them the programs of a head that start last may have the lowest numbers. With room for two, the
    two that wait leave none for those that they wait for."""
    problem = prepared(**MANY)

    class LastFirst(Schedule):
        def choose_program(self, running, programs):
            return running or max(programs, key=lambda program: program.index)

    wanted = run(*problem)
    for ours, same in zip(run(*problem, LastFirst(), 2), wanted, strict=True):
        assert torch.equal(ours, same)


def test_the_problems_that_are_drawn_hold_what_matters():
    drawn = [draw(random.Random(seed)) for seed in range(SEEDS)]
    assert {p["stages"] for p in drawn} == {2, 3}
    assert {p["heads"] for p in drawn} == {(1, 1), (2, 1), (2, 2)}
    assert any(p["mask"] is None for p in drawn) and any(p["mask"] is not None for p in drawn)
    tiles = [-(-p["kv_len"] // 128) for p in drawn]
    assert min(tiles) == 1 and max(tiles) >= 3
