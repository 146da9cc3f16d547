"""Tuning: a tile whose answers are wrong, or that fails, is not timed."""

from dataclasses import replace

import pytest
import torch
import triton

from harness.fake_bench import case_named
from tilewise.kernels.tile import HOPPER_PASSES, PASSES, HopperTile, Tile, hopper_backward_tile
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
    from tilewise.kernels.hopper.backward.kernel import hopper_backward_kernel
    from tilewise.kernels.hopper.forward import hopper_forward_kernel

    kernels = dict(
        forward=forward.forward_kernel, dkv=backward.dkv_kernel, dq=backward.dq_kernel,
        dqkv=one_walk.dqkv_kernel, hopper=hopper_forward_kernel, hopper_backward=hopper_backward_kernel,
    )  # fmt: skip
    assert {work: kernel.fn.__name__ for work, kernel in kernels.items()} == tune_kernels.KERNELS
    # Gluon's launches go through the same door as Triton's.
    assert type(hopper_forward_kernel).run is tune_kernels.JITFunction.run


@pytest.mark.parametrize(
    "work, tile, launch, result",
    [
        ("hopper", HopperTile(128, 16, 8, 2), "launch_hopper", "out"),
        ("hopper_backward", hopper_backward_tile(64), "launch_hopper_backward", "dq"),
    ],
    ids=HOPPER_PASSES,
)
def test_hoppers_answers_are_checked_in_the_emulator(device, monkeypatch, work, tile, launch, result):
    if tiles.INTERPRETED is False and tiles.architecture(device) != "sm_90":
        pytest.skip("it needs a Hopper GPU")
    case = replace(case_named("paper-d64-causal-4096"), q_heads=2, kv_heads=1)
    bench = Bench(work, [small(case, 48)], device, 48)
    assert 0 < bench.check(tile).error <= 1 and 0 < bench.check_every_feature(tile).error <= 1
    (name,) = bench.cases
    assert bench.time(name, tile, 1)[0] > 0 and bench.time_portable(name, 1)[0] > 0
    right = getattr(passes, launch)

    def wrong(*given):
        right(*given)
        given[2 if work == "hopper" else 1][0, 1, 40, 3] += 0.05  # out or dq

    monkeypatch.setattr(passes, launch, wrong)
    with pytest.raises(Rejected, match=f"wrong: {result} is"):
        bench.check(tile)


def test_hoppers_kernels_are_timed_beside_all_that_does_their_work(workloads, monkeypatch):
    launched = []
    for name in ("forward", "dkv", "dq"):
        monkeypatch.setattr(tune_case, f"launch_{name}", lambda *_, name=name: launched.append(name))
    for work in HOPPER_PASSES:
        workloads["plain"].portable_launcher(work)()
    assert launched == ["forward", "dkv", "dq"]


def test_what_hoppers_backward_does_not_take_is_not_checked_with_another(device):
    """It would be the portable backward that is right."""
    cosine = replace(case_named("swinv2-b-window16"), batch=1, q_heads=1, kv_heads=1)
    workload = Workload(small(cosine, 48), device)
    with pytest.raises(ValueError, match="the gradients of cosine similarity"):
        workload.answer("hopper_backward", hopper_backward_tile(64))
