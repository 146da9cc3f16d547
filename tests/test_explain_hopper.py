"""`tilewise.explain` of Hopper's forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tilewise
from harness.explained import attend, meta
from tilewise.kernels.tile import hopper_backward_tile
from tilewise.parts.shape import Shape
from tilewise.plan.bind import bind
from tilewise.plan.request import make_request
from tilewise.plan.tiles import gpu_tile
from tilewise.tools.explain import workload
from tilewise.tools.explain.coverage import Coverage

WAITS = "it must be asked for, impl='hopper': no GPU has shown yet that it is right and faster"


def test_hoppers_forward_is_explained_where_it_is_asked_for(nothing_runs):
    q, k, v = attend(dim=256)
    found = tilewise.explain(q, k, v, impl="hopper", gpu="H200", work="training", mask=tilewise.Causal())
    assert [kernel.name for kernel in found.kernels] == ["hopper forward", "prepare", "dq", "dkv"]
    kernel = found.kernels[0]
    assert kernel.tile == gpu_tile("sm_90", 2, found_shape(found), "hopper")
    assert (kernel.programs, kernel.waves, kernel.tile_from) == (132, 1.0, "shipped table")
    # 32 tiles of 128 rows a head; tile i sees 2 (i + 1) tiles of 64 keys, the last two of them cut.
    assert (kernel.tiles.total, kernel.tiles.visited) == (16 * 32 * 64, 16 * 32 * 33)
    assert kernel.tiles.masked == 16 * 32 * 2
    text = " ".join(str(found).split())
    assert found.implementation == found.on_gpu == "hopper" and not found.refused
    assert "On an H200 (as asked for) the hopper kernels answer: impl='hopper' asks for it." in text
    assert "Hopper's forward has not run on a GPU yet." in text


def test_hoppers_backward_is_explained_too(nothing_runs):
    q, k, v = attend(dim=128)
    found = tilewise.explain(q, k, v, impl="hopper", gpu="H200", work="training", mask=tilewise.Causal())
    names = ["hopper forward", "prepare", "hopper backward", "finish dq"]
    assert [kernel.name for kernel in found.kernels] == names
    kernel = found.kernels[2]
    assert kernel.tile == hopper_backward_tile(128) and found.kernels[1].tile == kernel.tile
    # 32 tiles of 128 keys a head; tile j visits the last 64 - 2j of 64 tiles of rows, of which it cuts two.
    assert kernel.programs == 16 * 32 and kernel.tiles.visited == 16 * sum(64 - 2 * j for j in range(32))
    assert kernel.tiles.masked == 16 * 32 * 2
    assert kernel.executed_flops == 5 * 2 * kernel.tiles.visited * 64 * 128 * 128
    memory = {each.name: each.bytes for each in found.memory}
    assert memory["sums of dq"] == 16 * 4096 * 128 * 4 and memory["turns"] == 4 * (4 + 16 * 64)
    assert "portable backward" not in str(found)


def test_where_the_portable_backward_follows_explain_says_why():
    q, k, v = attend(dim=256)
    found = tilewise.explain(q, k, v, impl="hopper", gpu="H200", work="training")
    assert [kernel.name for kernel in found.kernels][1:] == ["prepare", "dq", "dkv"]
    text = " ".join(str(found).split())
    assert "The portable backward follows, for Hopper's does not take the call: head_dim=256" in text
    forward = tilewise.explain(q, k, v, impl="hopper", gpu="H200")
    assert "portable backward" not in str(forward)


def found_shape(found: Any) -> Shape:
    return Shape(**found.sizes)


def test_a_tile_of_rows_that_sees_nothing_visits_one_tile():
    q, k = meta(1, 2, 512, 64), meta(1, 2, 128, 64)
    found = tilewise.explain(q, k, k, impl="hopper", mask=tilewise.Causal(), gpu="H200")
    # Rows 0 to 383 see no key, which is three tiles of rows a head.
    assert found.kernels[0].tiles == Coverage(total=8, skipped=0, masked=8, full=0)
    portable = tilewise.explain(q, k, k, mask=tilewise.Causal(), gpu="H200")
    assert portable.kernels[0].tiles == Coverage(total=8, skipped=6, masked=2, full=0)


@pytest.mark.parametrize("heads, lengths, dim", [(1, (300, 40), 24), (64, (300, 700), 96)])
def test_programs_and_columns_are_those_of_hoppers_launch(heads, lengths, dim, monkeypatch):
    from tilewise.kernels.hopper import launch

    monkeypatch.setattr(launch, "resident_programs", lambda device: 132)
    q, k = (torch.zeros(1, heads, length, dim, dtype=torch.float16) for length in lengths)
    request = make_request(q, k, k, impl="hopper")
    grid, arguments = launch.forward_launch(
        bind(request), q, None, None, gpu_tile("sm_90", 2, request.shape, "hopper")
    )
    found = tilewise.explain(q, k, k, impl="hopper", gpu="H200").kernels[0]
    assert (found.programs,) == grid
    pieces = [arguments[name] for name in ("k_desc", "k_desc_2") if arguments[name] is not None]
    columns = sum(piece.block_shape[3] for piece in pieces)
    assert columns == {24: workload.HOPPER_COLUMNS, 96: 32 + 64}[dim]
    pairs = found.tiles.visited * found.tile.tile_q * found.tile.tile_kv
    assert found.executed_flops == 2 * pairs * 2 * columns


BY_DOCUMENT = tilewise.Documents(torch.arange(4096) // 1000)
CASES_FOR_HOPPER: dict[str, tuple[str, torch.dtype, dict[str, Any], str]] = {
    "it could": ("H200", torch.bfloat16, {}, WAITS),
    "another chip": ("A100", torch.bfloat16, {}, "it needs a Hopper GPU (sm_90), and A100 is sm_80"),
    "Blackwell": ("B200", torch.bfloat16, {}, "it needs a Hopper GPU (sm_90), and B200 is sm_100"),
    "fp32": ("H100", torch.float32, {}, "q.dtype=torch.float32 must be torch.float16"),
    "gaps": ("H100", torch.bfloat16, dict(mask=BY_DOCUMENT), "mask Documents may leave out a key"),
    "dropout": ("H100", torch.bfloat16, dict(dropout_p=0.1), "dropout_p=0.1 must be 0"),
    "two rules": ("H100", torch.float32, dict(dropout_p=0.1), "torch.bfloat16; dropout_p=0.1 must be 0"),
}


@pytest.mark.parametrize("name", CASES_FOR_HOPPER)
def test_why_hoppers_forward_does_not_answer(name):
    gpu, dtype, arguments, said = CASES_FOR_HOPPER[name]
    found = tilewise.explain(*attend(dtype=dtype), **arguments, gpu=gpu)
    assert said in found.others["hopper"] and found.on_gpu == "portable" and found.on_gpu_note == ""
    assert [kernel.name for kernel in found.kernels] == ["forward"]


def test_the_rule_on_chips_is_asked_about_the_gpu_that_is_named(monkeypatch):
    """Whatever q is on: the CPU, nothing, or a GPU that is none."""
    with FakeTensorMode():
        fake = torch.empty(1, 2, 256, 64, device="cuda", dtype=torch.float16)
    tensors = [fake, torch.zeros(1, 2, 256, 64, dtype=torch.float16), meta(1, 2, 256, 64)]
    for q in tensors:
        assert tilewise.explain(q, q, q, gpu="H200").others["hopper"] == WAITS
        assert "A100 is sm_80" in tilewise.explain(q, q, q, gpu="A100").others["hopper"]
        hopper = tilewise.explain(q, q, q, gpu="H200", impl="hopper")
        assert (hopper.on_gpu, hopper.refused, "hopper" in hopper.others) == ("hopper", (), False)
        other = tilewise.explain(q, q, q, gpu="A100", impl="hopper")
        assert other.on_gpu == "portable" and "A100 is sm_80" in other.on_gpu_note
        assert [kernel.name for kernel in other.kernels] == ["forward"]
    (refused,) = tilewise.explain(fake, fake, fake, gpu="A100", impl="hopper").refused
    assert refused == "impl='hopper': it needs a Hopper GPU (sm_90), and A100 is sm_80"


def test_what_hoppers_forward_does_not_take_is_explained_for_the_portable_one():
    found = tilewise.explain(*attend(), impl="hopper", mask=BY_DOCUMENT, gpu="H200")
    assert "mask Documents may leave out" in found.refused[0] and found.on_gpu == "portable"
    text = " ".join(str(found).split())
    assert "On an H200 (as asked for) the portable kernels would answer" in text
    assert "impl='hopper' cannot answer there: mask Documents may leave out" in text


def test_once_a_gpu_has_shown_it_hoppers_forward_is_what_a_hopper_runs(monkeypatch):
    monkeypatch.setattr("tilewise.plan.tiles.PROVEN", {("hopper", "sm_90", 2, 128)})
    found = tilewise.explain(*attend(), gpu="H200")
    assert found.kernels[0].name == "hopper forward" and found.others["hopper"] == "it does on an H200"
    assert "Hopper's forward answers there: a GPU has shown" in " ".join(str(found).split())
    asked = tilewise.explain(*attend(), gpu="H200", impl="portable")
    assert asked.on_gpu == "portable"
    assert asked.others["hopper"] == "it could; impl='portable' asks for another"
    assert tilewise.explain(*attend(), gpu="H200", impl="hopper").on_gpu_note == ""
    assert tilewise.explain(*attend(dim=64), gpu="H200").others["hopper"] == WAITS
