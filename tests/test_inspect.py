"""`tilewise inspect`: the baseline's judgement, and the command on one kernel.

What the shipped kernels become is in test_compiled.py.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from harness.baseline import Figures, against_baseline, better, load, save, worse
from tilewise.tools.compiled.compiler import Compiled, CompileError, Variant, compile_variants
from tilewise.tools.compiled.machine_code import Instruction
from tilewise.tools.compiled.main_loop import main_loops
from tilewise.tools.compiled.variants import KERNELS, find_case
from tilewise.tools.inspect.command import inspect as inspect_command
from tilewise.tools.inspect.inspect import applicable, check_arguments, inspect_one, variants

OLD = Figures(200, 0, 1024, [500, 700], [16, 16], [66, 66], [66, 64])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(registers=208), None),
        (dict(registers=209), "registers 200 -> 209"),
        (dict(spill_bytes=8), "spill_bytes 0 -> 8"),
        (dict(shared_bytes=1025), "shared_bytes 1024 -> 1025"),
        (dict(instructions=[550, 770]), None),
        (dict(instructions=[551, 700]), "instructions [500, 700] -> [551, 700]"),
        (dict(instructions=[500]), "instructions [500, 700] -> [500]"),
        (dict(matmuls=[16, 8]), "matmuls [16, 16] -> [16, 8]"),
        (dict(exponentials=[65, 66]), "exponentials [66, 66] -> [65, 66]"),
        (dict(overlapped=[66, 63]), "overlapped [66, 64] -> [66, 63]"),
        (dict(overlapped=[66, 66]), None),
        (dict(registers=100, shared_bytes=512, instructions=[400, 600]), None),
    ],
)
def test_what_is_worse_than_the_baseline(change, complaint):
    assert worse(OLD, dataclasses.replace(OLD, **change)) == ([] if complaint is None else [complaint])


def test_what_is_better_than_the_baseline():
    assert better(OLD, OLD) == []
    new = dataclasses.replace(OLD, registers=199, instructions=[400, 600])
    assert better(OLD, new) == ["registers 200 -> 199", "instructions [500, 700] -> [400, 600]"]


def some_kernel(**change) -> Compiled:
    """With two main loops, one of three instructions and one of two."""
    product, back = Instruction("HGMMA.64x128x16.F32.BF16"), Instruction("BRA", targets=(0,))
    code = [product, Instruction("MUFU.EX2"), back, product, dataclasses.replace(back, targets=(3,))]
    loops = main_loops(code, warps=8, warp=32)
    tile = dict(TILE_Q=64, TILE_KV=128, HEAD_TILE=64, VALUE_TILE=64)
    kernel = Compiled(
        "bf16 64 causal", "dkv_kernel", "sm_90", "bfloat16", tile, 8, 2, 200, {}, 0, 1024, 0, {}, {}, loops
    )
    return dataclasses.replace(kernel, **change)


def test_baseline_file(tmp_path, monkeypatch):
    """Written and read back; what is worse fails, what is better warns, another Triton is skipped."""
    file = tmp_path / "inspect.json"
    monkeypatch.setattr("harness.baseline.load", lambda: load(file))
    name, figures = "sm_90 dkv bf16 64 causal", Figures(200, 0, 1024, [3, 2], [1, 1], [1, 0], [0, 0])
    monkeypatch.setattr("triton.__version__", "3.9.0")
    save({"3.9.0": {name: figures}, "3.6.0": {}}, file)
    assert load(file) == {"3.6.0": {}, "3.9.0": {name: figures}}
    against_baseline([some_kernel()])
    with pytest.raises(pytest.fail.Exception, match=f"{name}: registers 200 -> 220") as failure:
        against_baseline([some_kernel(registers=220)])
    assert "python -m harness.baseline" in str(failure.value)
    with pytest.raises(pytest.fail.Exception, match=r"not in inspect\.json"):
        against_baseline([some_kernel(variant="bf16 64 full")])
    with pytest.warns(UserWarning, match="registers 200 -> 190"):
        against_baseline([some_kernel(registers=190)])
    monkeypatch.setattr("triton.__version__", "9.9.9")
    with pytest.raises(pytest.skip.Exception, match=r"no figures of Triton 9\.9\.9"):
        against_baseline([some_kernel(registers=220)])


def test_targets_without_a_datasheet_have_counts_and_no_limits():
    found = inspect_one(some_kernel(target="sm_103"))
    assert found.chip is None and found.occupancy is None
    assert [loop.bound for loop in found.loops] == [None, None]
    assert [loop.counts.matmuls for loop in found.loops] == [1, 1]


DEFAULTS = dict(archs=["sm_90"], dtypes=["bf16"], dims=[64], masks=["full"], kernels=["forward"], cases=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(archs=["sm_33"]), "arch='sm_33' must be one of sm_75, sm_80"),
        (dict(dtypes=["fp64"]), "dtype='fp64' must be one of fp16, bf16, fp32, fp8"),
        (dict(dtypes=["fp8"], archs=["sm_90", "sm_80"]), "multiplied on sm_90 and sm_100, and arch='sm_80'"),
        (dict(dtypes=["fp8"], kernels=["dq"]), "kernel='dq': fp8 has a forward alone"),
        (dict(masks=["window"]), "mask='window' must be one of causal, full"),
        (
            dict(kernels=["decode"]),
            "must be one of forward, hopper, dkv, dq, dqkv, hopper_backward, prepare, parameter",
        ),
        (dict(dims=[513]), "dim=513 must be from 1 to 512"),
        (dict(cases=["llama3-8b"]), "case 'llama3-8b' is not a named case; near it are llama3-8b-"),
        (dict(kernels=[]), "nothing to inspect"),
        (dict(kernels=["hopper"], archs=["sm_90", "sm_100"]), "'hopper' does not apply: .* arch='sm_100'"),
        (dict(kernels=["hopper"], dtypes=["fp32"]), "'hopper' does not apply: .* dtype='fp32'"),
        (dict(kernels=["hopper"], cases=["feature-dropout"]), "case='feature-dropout': dropout_p=0.1"),
        (
            dict(kernels=["hopper_backward"], dims=[256]),
            "'hopper_backward' does not apply: dim=256: .* of 128",
        ),
        (
            dict(kernels=["hopper_backward"], cases=["swinv2-b-window16"]),
            "the gradients of cosine similarity",
        ),
    ],
)
def test_wrong_names_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(**DEFAULTS | change)


@pytest.mark.parametrize(
    ("archs", "dtypes", "dims", "cases", "forward", "backward"),
    [
        (["sm_90"], ["bf16", "fp16"], [128, 256], [], True, True),
        (["sm_90"], ["bf16"], [256], [], True, False),
        (["sm_90"], ["bf16"], [512], [], False, False),
        (["sm_90"], ["bf16", "fp32"], [64], [], False, False),
        (["sm_90", "sm_80"], ["bf16"], [64], [], False, False),
        (["sm_90"], ["bf16"], [64], ["feature-softcap"], True, True),
        (["sm_90"], ["bf16"], [64], ["feature-softcap", "feature-dropout"], False, False),
    ],
)
def test_hoppers_kernels_are_inspected_where_they_apply(archs, dtypes, dims, cases, forward, backward):
    expected = ["forward", *["hopper"] * forward, "dkv", "dq", "dqkv", *["hopper_backward"] * backward]
    assert applicable(KERNELS, archs, dtypes, dims, cases) == expected


def test_of_hoppers_backward_those_dimensions_are_inspected_that_it_takes():
    asked = dict(dims=[64, 128, 256], kernels=["hopper", "hopper_backward"])
    found = variants(**check_arguments(**DEFAULTS | asked))
    assert [each.name for each in found if each.kernels] == ["bf16 64 full", "bf16 128 full"]
    assert [each.name for each in found if not each.kernels][-1] == "bf16 256 full"
    (case,) = variants(
        **check_arguments(**DEFAULTS | asked | dict(kernels=["hopper_backward"], cases=["feature-softcap"]))
    )
    assert (case.name, case.kernels) == ("feature-softcap", ("hopper_backward_kernel",))


def test_what_is_compiled():
    """Names that say which call; every named case is ready to launch, and nothing is launched here."""
    arguments = check_arguments(**DEFAULTS | dict(dims=[64, 128], kernels=["forward", "dkv", "parameter"]))
    found = variants(**arguments)
    walks = ["bias", "bias of keys", "bias of rows", "position table"]
    names = ["bf16 64 full"] * 2 + [f"bf16 64 full {walk}" for walk in walks]
    assert [each.name for each in found] == names + [name.replace("64", "128") for name in names]
    assert [each.kernels for each in found[:3]] == [None, ("dkv_kernel",), ("parameter_kernel",)]
    case = variants(**check_arguments(**DEFAULTS | dict(cases=["swinv2-b-window16", "short-d64-64"])))
    assert [each.name for each in case] == ["swinv2-b-window16", "short-d64-64"]
    assert find_case("feature-softcap").features["softcap"] == 50


def failing_variants() -> list[Variant]:
    def fails() -> None:
        raise ValueError("no such thing")

    return [Variant("wrong", fails), Variant("idle", lambda: None)]


def test_nothing_but_the_error_is_printed_where_no_terminal_is(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise CompileError("sm_90: it does not compile")

    monkeypatch.setattr("tilewise.tools.inspect.command.inspect_kernels", fails)
    app = typer.Typer()
    app.command()(inspect_command)
    ran = CliRunner().invoke(app, ["--kernel", "prepare"])
    assert (ran.exit_code, ran.output) == (1, "tilewise inspect: sm_90: it does not compile\n")


def test_failures_are_named_with_target_and_variant():
    with pytest.raises(CompileError) as failure:
        compile_variants(f"{__name__}:failing_variants", ["sm_90"])
    assert str(failure.value) == (
        "sm_90, wrong: ValueError: no such thing\n\nsm_90, idle: RuntimeError: it launched no kernel"
    )


def test_the_command_on_one_kernel():
    """As a user types it, in a process that runs kernels in the interpreter: the child does not."""
    arguments = ["--arch", "sm_90", "--dim", "128", "--mask", "causal", "--kernel", "forward", "--json", "-"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tilewise", "inspect", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    names = ("kernel", "variant", "target", "chip")
    assert [found[name] for name in names] == ["forward", "bf16 128 causal", "sm_90", "H200"]
    assert found["compiled"]["spill_bytes"] == 0 and found["occupancy"]["programs"] == 1
    assert found["compiled"]["assembler"] == {"warnings": [], "spill_stores": 0, "spill_loads": 0}
    full, cut = found["loops"]
    assert full["counts"]["name"] == "full" and full["counts"]["matmuls"] == cut["counts"]["matmuls"] == 16
    assert 0 < full["bound"]["apart"] < full["bound"]["together"] <= 1
