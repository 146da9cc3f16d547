"""Do the roles of the Hopper kernel wait for one another as they should, in whatever order they run?

The kernel's own source runs in the emulator under many schedules. Each must end, break no rule of the machine
(`tilewise.gluon_emulator` lists them) and give the very bits of every other. The copy engine's memory holds
NaN until a copy has landed, so that what is read too early shows in the result.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton

import tilewise
from tilewise.gluon_emulator import PriorityChange, RandomSchedule, Schedule, emulate
from tilewise.kernels.hopper import launch
from tilewise.kernels.hopper.forward import hopper_forward_kernel
from tilewise.kernels.tile import HopperTile
from tilewise.plan.bind import bind
from tilewise.plan.request import make_request

if not triton.knobs.runtime.interpret:
    pytest.skip("the emulator needs TRITON_INTERPRET=1", allow_module_level=True)

TILE_KV = 16
SEEDS = 16


def draw(rng: random.Random) -> dict[str, Any]:
    """A problem of a few tiles, in which programs, tiles of rows and warpgroups have unequal work."""
    warpgroups = rng.choice((2, 2, 3))
    stages = rng.choice((1, 2) if warpgroups == 3 else (1, 2, 3, 4))
    return dict(
        q_len=rng.choice((1, 64, 100, 64 * warpgroups, 150, 250)),
        kv_len=rng.choice((1, TILE_KV, TILE_KV * stages, TILE_KV * stages + 1, 5 * TILE_KV, 7 * TILE_KV - 3)),
        heads=rng.choice((1, 2)),
        mask=rng.choice((None, tilewise.Causal(), tilewise.Causal("top_left"), tilewise.Window(20, 0))),
        tile=HopperTile(
            64 * warpgroups,
            TILE_KV,
            4 * warpgroups,
            stages,
            has_turns=rng.random() < 0.7,
            producer_warps=rng.choice((1, 4)),
        ),
        programs=rng.choice((1, 1, 2, 3)),
        has_out_buffer=rng.random() < 0.5,
        q_in_registers=rng.random() < 0.3,
        dims=rng.choice(((16, 16), (72, 72), (72, 64))),
    )


def run(
    schedule: Schedule, *, q_len, kv_len, heads, mask, tile, programs, has_out_buffer, q_in_registers,
    dims=(16, 16),
):  # fmt: skip
    """out and lse of a problem under a schedule. dims: of head and value."""
    generator = torch.Generator().manual_seed(q_len + kv_len)
    q, k = (torch.randn(1, heads, n, dims[0], generator=generator).half() for n in (q_len, kv_len))
    v = torch.randn(1, heads, kv_len, dims[1], generator=generator).half()
    request = make_request(q, k, v, mask=mask, impl="hopper")
    out, lse = (
        torch.full((1, heads, q_len, dims[1]), torch.nan).half(),
        torch.full((1, heads, q_len), torch.nan),
    )
    grid, arguments = launch.forward_launch(bind(request), out, lse, None, tile)
    arguments |= dict(HAS_OUT_BUFFER=has_out_buffer, IS_Q_IN_REGISTERS=q_in_registers)
    emulate(hopper_forward_kernel, (min(grid[0], programs),), arguments, schedule)
    return out, lse


def schedules(seed: int) -> list[Schedule]:
    return [
        RandomSchedule(seed),
        PriorityChange(seed, 0),
        PriorityChange(seed, 3),
        PriorityChange(seed, 30, 2000),
    ]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_order_gives_the_same_bits(seed):
    problem = draw(random.Random(seed))
    out, lse = run(Schedule(), **problem)
    assert out.isfinite().all() and not lse.isnan().any()
    for schedule in schedules(seed):
        got = run(schedule, **problem)
        assert torch.equal(got[0], out) and torch.equal(got[1], lse), (type(schedule).__name__, problem)


@pytest.mark.in_turns
@pytest.mark.oldest
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 7])
def test_fewer_steps_than_stages_and_more(steps, stages):
    """Steps 0: a causal mask hides all keys from the first tile of rows, and few from the second."""
    kv_len = max(1, steps * TILE_KV)
    problem = dict(
        q_len=128 + kv_len if steps == 0 else 100, kv_len=kv_len, heads=2,
        mask=tilewise.Causal() if steps == 0 else None, tile=HopperTile(128, TILE_KV, 8, stages),
        programs=1, has_out_buffer=True, q_in_registers=False,
    )  # fmt: skip
    out, lse = run(Schedule(), **problem)
    for schedule in schedules(steps):
        got = run(schedule, **problem)
        assert torch.equal(got[0], out) and torch.equal(got[1], lse)


def test_the_problems_that_are_drawn_hold_what_matters():
    drawn = [draw(random.Random(seed)) for seed in range(SEEDS)]
    assert {p["tile"].warpgroups for p in drawn} == {2, 3}
    assert {p["tile"].num_stages for p in drawn} == {1, 2, 3, 4}
    for name in ("has_out_buffer", "q_in_registers"):
        assert {p[name] for p in drawn} == {True, False}
    assert {p["tile"].has_turns for p in drawn} == {True, False}
    assert {p["tile"].producer_warps for p in drawn} == {1, 4}
    assert {p["dims"] for p in drawn if not p["has_out_buffer"]} == {(16, 16), (72, 72), (72, 64)}
    steps = [-(-p["kv_len"] // TILE_KV) / p["tile"].num_stages for p in drawn]
    assert min(steps) < 1 and max(steps) > 2
