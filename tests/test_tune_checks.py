"""Tuning: a tile whose answers are wrong, or that fails, is not timed."""

from dataclasses import replace

import pytest
import torch
import triton

from harness.fake_bench import case_named
from tilewise.kernels.tile import PASSES, HopperTile, Tile
from tilewise.plan import passes, tiles
from tilewise.tools.tune import case as tune_case
from tilewise.tools.tune import kernels as tune_kernels
from tilewise.tools.tune.bench import Bench, DeviceLost, Rejected, label
from tilewise.tools.tune.case import Workload, small, with_every_feature


@pytest.fixture(scope="module")
def workloads(device):
    """Small problems by name."""
    plain = replace(case_named("paper-d64-causal-4096"), q_heads=1, kv_heads=1, dtype="bfloat16")
    plain = small(plain, 48)
    return {
        "plain": Workload(plain, device),
        "every feature": Workload(with_every_feature(plain, 48), device),
    }


@pytest.mark.parametrize("work", PASSES)
@pytest.mark.parametrize("problem", ["plain", "every feature"])
def test_right_answers_pass(workloads, problem, work):
    share, name = workloads[problem].worst(work, Tile(32, 16))
    assert 0 < share <= 1
    assert name in {"forward": ("out", "lse"), "dq": ("dq",)}.get(work, (name,))


def test_every_gradient_of_the_dkv_pass_is_checked(workloads):
    """Those of the parameters too: their kernel has the rows of dkv's tile."""
    names = sorted(workloads["every feature"].answer("dkv", Tile(16, 32)))
    assert [name.split()[0] for name in names] == ["dALiBi.slopes", "dBias.bias", "dk", "dsink", "dv"]


def wrong_bench(device, monkeypatch, spoil):
    """A bench whose kernel gives what `spoil` makes of the right out."""
    launch = tune_case.run_forward

    def spoilt(*args, **kwargs):
        out, lse, statistics = launch(*args, **kwargs)
        spoil(out)
        return out, lse, statistics

    case = replace(small(case_named("paper-d64-full-4096"), 48), q_heads=1, kv_heads=1)
    bench = Bench("forward", [case], device, 48)
    assert bench.check(Tile(16, 16)).error <= 1
    monkeypatch.setattr(tune_case, "run_forward", spoilt)
    return bench


@pytest.mark.parametrize("what", ["one element", "not written", "a row shifted"])
def test_a_wrong_candidate_is_rejected(device, monkeypatch, what):
    def spoil(out):
        if what == "one element":
            out[0, 0, 40, 3] += 0.05
        elif what == "not written":
            out[0, 0, 47, 63] = torch.empty(1, dtype=out.dtype, device=out.device)[0]  # poisoned: NaN
        else:
            out.copy_(out.roll(1, 2))

    bench = wrong_bench(device, monkeypatch, spoil)
    with pytest.raises(Rejected, match=r"wrong: out is [\d.e+]+|inf times as far"):
        bench.check(Tile(16, 16))


def test_what_a_candidate_raises_is_its_reason(device, monkeypatch):
    def fail(*_, **__):
        raise triton.runtime.OutOfResources(300_000, 232_448, "shared memory")

    case = replace(small(case_named("paper-d64-full-4096"), 48), q_heads=1, kv_heads=1)
    bench = Bench("forward", [case], device, 48)
    monkeypatch.setattr(tune_case, "run_forward", fail)
    monkeypatch.setattr(tune_case, "launch_forward", fail)
    for measure in (lambda: bench.check(Tile(16, 16)), lambda: bench.time(label(case), Tile(16, 16), 1)):
        with pytest.raises(
            Rejected, match="OutOfResources: out of resource: shared memory, Required: 300000"
        ):
            measure()


def test_a_gpu_that_answers_no_more_is_told_from_a_bad_candidate(device, monkeypatch):
    case = replace(small(case_named("paper-d64-full-4096"), 48), q_heads=1, kv_heads=1)
    bench = Bench("forward", [case], device, 48)
    bench.device = torch.device("cuda", 0)

    def lost(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more lines")

    monkeypatch.setattr(tune_case, "run_forward", lost)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLost, match=r"illegal memory access was encountered$"):
        bench.check(Tile(16, 16))


def test_launches_are_watched_and_compiled_ahead_through_the_same_door(monkeypatch):
    """The interpreter has no compiled kernels: a stand-in for JITFunction shows what each launch becomes."""
    launched = []

    class Kernel:
        def run(self, *args, grid, warmup):
            launched.append((args, grid, warmup))
            metadata = type("M", (), dict(name="dq_kernel", shared=4096))
            return type("C", (), dict(metadata=metadata, n_regs=99, n_spills=2))

    monkeypatch.setattr(tune_kernels, "JITFunction", Kernel)
    before = Kernel.run
    with tune_kernels.watched() as seen:
        Kernel().run(1, grid=(2,), warmup=False)
    with tune_kernels.compiling_ahead(1):
        Kernel().run(3, grid=(4,), warmup=False)
    assert seen == [tune_kernels.Usage("dq_kernel", 99, 2, 4096)]
    assert launched == [((1,), (2,), False), ((3,), (4,), True)] and Kernel.run is before


def test_every_pass_has_a_kernel_that_is_watched():
    from tilewise.kernels import backward, forward, one_walk
    from tilewise.kernels.hopper.forward import hopper_forward_kernel

    kernels = dict(
        forward=forward.forward_kernel, dkv=backward.dkv_kernel, dq=backward.dq_kernel,
        dqkv=one_walk.dqkv_kernel,
    )  # fmt: skip
    named = {
        work: kernel.fn.__name__ for work, kernel in (kernels | dict(hopper=hopper_forward_kernel)).items()
    }
    assert named == tune_kernels.KERNELS
    # Gluon's launches go through the same door as Triton's.
    assert type(hopper_forward_kernel).run is tune_kernels.JITFunction.run


def test_hoppers_answers_are_checked_in_the_emulator(device, monkeypatch):
    if tiles.INTERPRETED is False and tiles.architecture(device) != "sm_90":
        pytest.skip("it needs a Hopper GPU")
    case = replace(case_named("paper-d64-causal-4096"), q_heads=4, kv_heads=2)
    bench = Bench("hopper", [small(case, 48)], device, 48)
    tile = HopperTile(128, 16, 8, 2)
    assert 0 < bench.check(tile).error <= 1 and 0 < bench.check_every_feature(tile).error <= 1
    (name,) = bench.cases
    assert bench.time(name, tile, 1)[0] > 0 and bench.time_portable(name, 1)[0] > 0
    right = passes.launch_hopper

    def wrong(request, call, out, *rest):
        right(request, call, out, *rest)
        out[0, 1, 40, 3] += 0.05

    monkeypatch.setattr(passes, "launch_hopper", wrong)
    with pytest.raises(Rejected, match="wrong: out is"):
        bench.check(tile)
