"""The checks of an evidence run: they pass where all is right, and notice where it is not."""

import importlib
import inspect
import sys

import pytest
import torch
import triton

import tilewise
from bench import checks
from bench.checks.trial import NotApplicable, Trial
from tilewise.plan import passes

if torch.cuda.is_available():
    pytest.skip("on a GPU `python -m bench evidence` runs the checks themselves", allow_module_level=True)

CPU = torch.device("cpu")


def run(name: str):
    (check,), remark = checks.perform(name, "cpu", 0)
    assert remark == "" and check.name == name
    return check


@pytest.mark.parametrize(
    "name",
    [
        "bfloat16, width 64, causal",
        "feature window",
        "the same bits again, full, head_dim 64",
        "the last head of many keys",
        "hopper: float16, width 80, causal",
        "hopper: three warpgroups",
        "hopper: 17 x 129, causal",
        "hopper: NaN beyond the lengths",
        "hopper: the same bits again, full",
        "hopper: gradients, sink and softcap",
    ],
)
def test_checks_pass(name):
    check = run(name)
    assert check.passed, check.detail
    assert check.detail and check.seconds > 0


def test_a_wrong_forward_is_noticed(monkeypatch):
    launch = passes.launch_forward

    def wrong(call, out, *rest):
        launch(call, out, *rest)
        out[..., -1, 0] += 0.5

    monkeypatch.setattr(passes, "launch_forward", wrong)
    check = run("feature causal")
    assert not check.passed and "float64 says" in check.detail


def test_a_wrong_gradient_is_noticed(monkeypatch):
    launch = passes.launch_dq

    def wrong(call, dq, tile):
        launch(call, dq, tile)
        dq[..., 0, 0] *= 1.5

    monkeypatch.setattr(passes, "launch_dq", wrong)
    check = run("feature causal")
    assert not check.passed and check.detail.startswith("dq[")


def test_bits_that_change_are_noticed(monkeypatch):
    launch, calls = passes.launch_forward, []

    def restless(call, out, *rest):
        launch(call, out, *rest)
        calls.append(1)
        out[0, 0, 0, 0] += len(calls)

    monkeypatch.setattr(passes, "launch_forward", restless)
    check = run("the same bits again, full, head_dim 64")
    assert not check.passed and "'out': 2" in check.detail


def test_memory_left_unwritten_is_noticed(monkeypatch):
    monkeypatch.setattr(passes, "launch_forward", lambda *arguments: None)
    assert not run("feature causal").passed


@pytest.mark.parametrize("what", ["out", "lse"])
def test_a_wrong_hopper_forward_is_noticed(monkeypatch, what):
    launch = passes.launch_hopper

    def wrong(request, call, out, lse, statistics):
        launch(request, call, out, lse, statistics)
        (out if what == "out" else lse)[..., -1:] += 0.5

    monkeypatch.setattr(passes, "launch_hopper", wrong)
    check = run("hopper: bfloat16, width 64, full")
    assert not check.passed and f"{what}[" in check.detail


def test_values_behind_the_lengths_that_show_are_noticed(monkeypatch):
    launch = passes.launch_hopper

    def curious(request, call, out, *rest):
        launch(request, call, out, *rest)
        out[0, 0, 0, 0] += 1e-3 * request.v[0, 0, -1, 0].isnan()

    monkeypatch.setattr(passes, "launch_hopper", curious)
    check = run("hopper: NaN beyond the lengths")
    assert not check.passed and "out changes with what lies beyond the lengths, right" in check.detail


def test_hoppers_checks_do_not_apply_to_another_gpu(monkeypatch):
    monkeypatch.setattr(checks.hopper, "architecture", lambda device: "sm_80")
    for trial in checks.HOPPER:
        with pytest.raises(NotApplicable, match=r"needs a Hopper GPU \(sm_90\), and this one is sm_80"):
            trial.function(torch.device("cuda"), 0)


def test_what_raises_has_failed_and_what_lacks_something_has_no_result(monkeypatch):
    def raises(device, seed):
        raise ZeroDivisionError("of all things")

    def lacks(device, seed):
        raise NotApplicable("it needs 40 GB")

    monkeypatch.setitem(checks.TRIALS, "raises", Trial("raises", raises))
    monkeypatch.setitem(checks.TRIALS, "lacks", Trial("lacks", lacks))
    check = run("raises")
    assert not check.passed and "ZeroDivisionError: of all things" in check.detail
    assert checks.perform("lacks", "cpu", 0) == ([], "it needs 40 GB")


def test_every_check_has_its_place():
    hopper, beside, alone = (checks.trials(torch.device("cuda"), stage) for stage in checks.STAGES)
    assert sorted(hopper + beside + alone) == sorted(checks.TRIALS)
    everything = checks.ACCURACY + checks.FP8 + checks.GRAPHS + checks.LARGE + checks.HOPPER
    assert len(everything) == len(checks.TRIALS), "two of one name"
    here = [name for stage in checks.STAGES for name in checks.trials(CPU, stage)]
    assert sorted(here + checks.left_out(CPU)) == sorted(checks.TRIALS)
    assert all(name.startswith("hopper: ") for name in hopper) and checks.trials(CPU, "hopper") == hopper
    features = {name.removeprefix("feature ") for name in beside if name.startswith("feature ")}
    from harness.features import FEATURES

    assert {name for name, entry in FEATURES.items() if entry.kind not in ("dtype", "tile")} == features


def test_checks_that_are_gpu_tests_name_tests_that_there_are(monkeypatch):
    """Here the tests of the GPU cannot be imported unless they are told that there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.delitem(sys.modules, "test_cuda", raising=False)
    module = importlib.import_module("test_cuda")
    monkeypatch.delitem(sys.modules, "test_cuda")
    for trial in checks.TRIALS.values():
        if trial.needs_gpu:
            name, test, arguments = trial.function.args
            assert name == "test_cuda"
            inspect.signature(getattr(module, test)).bind(*arguments)


def test_hoppers_checks_say_which_tiles_they_run_with():
    widths = {trial.name: trial.width for trial in checks.HOPPER}
    assert {*widths.values()} == {64, 128, 256}
    assert widths["hopper: 1 x 1000, full"] == 64 and widths["hopper: gradients, width 256"] == 256
    assert widths["hopper: bfloat16, width 80, full"] == 128
    assert not any(trial.width for trial in checks.TRIALS.values() if trial not in checks.HOPPER)


def test_another_implementation_answers_a_check_only_where_that_is_asked_for(monkeypatch):
    """A Hopper forward that is wrong, or hangs, must not fail what is asked of the portable kernels."""
    from harness import oracle

    asked = []
    attention = tilewise.attention

    def seen(*given, **options):
        asked.append(options["impl"])
        return attention(*given, **options)

    monkeypatch.setattr(tilewise, "attention", seen)
    monkeypatch.setattr(tilewise, "why_not", lambda *given, **options: [])
    monkeypatch.setattr(oracle, "ALSO", [])
    assert run("bfloat16, width 64, causal").passed and {*asked} == {"portable"}
    monkeypatch.setattr(oracle, "ALSO", ["hopper"])
    del asked[:]
    assert run("bfloat16, width 64, causal").passed and {*asked} == {"portable", "hopper"}
