"""fp8 in the benchmarks: who is asked for it, and is a wrong answer or a wrong number found out?"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
from bench.answers_fp8 import judge_numbers
from bench.checks import FP8, fp8, perform
from bench.checks.trial import NotApplicable
from bench.groups import comparisons
from bench.implementations import IMPLEMENTATIONS, Implementation, for_group
from bench.implementations.base import Prepared
from bench.implementations.fp8 import Quantize, TilewiseFp8
from bench.measure import measure
from tilewise.tools.inputs import Inputs, case_inputs
from tilewise_reference.cases import Case, Features

from .stand_ins import flash_attn_3

CASE = Case(
    name="small", batch=2, q_heads=2, kv_heads=2, q_len=20, kv_len=28, head_dim=64, value_dim=64,
    dtype="bfloat16", phase="training", provenance="", features=Features(causal="bottom_right"),
)  # fmt: skip
JUDGED = ("flash_attn 3, fp8",)  # through its stand-in: test_extending.py


def rows(work: Any, *implementations: Implementation) -> list[Any]:
    return measure(
        CASE, work, implementations, group=work, seconds=0.0, device="cpu", rounds=1, least=1
    )  # fmt: skip


def test_who_is_asked_for_what():
    for quick in (False, True):
        assert {work for _, work in comparisons("fp8", quick)} == {"fp8"}
        assert {work for _, work in comparisons("quantize", quick)} == {"quantize"}
    names = [each.name for each in for_group("fp8")]
    assert {"tilewise portable", "sdpa flash", "flash_attn 3, fp8", "tilewise portable, fp8"} <= {*names}
    for each in IMPLEMENTATIONS.values():
        if each.only:
            assert "is for" in (each.refuses(CASE, "forward") or ""), each.name
        reason = each.refuses(CASE, "quantize")
        assert (reason is None) == isinstance(each, Quantize), each.name
    flash, ours = IMPLEMENTATIONS["flash_attn 3, fp8"], IMPLEMENTATIONS["tilewise portable, fp8"]
    assert ours.refuses(CASE, "fp8") is None and flash.refuses(CASE, "fp8") is None
    assert flash.refuses(replace(CASE, q_heads=4), "fp8") == (
        "flash_attn 3, fp8 has a scale of q for each key head, not for each of the 4 heads"
    )
    packed = replace(CASE, features=Features(lengths=(20, 8)), batch=2, kv_len=20)
    assert "not for packed sequences" in (ours.refuses(packed, "fp8") or "")


def test_flash_attention_3_is_asked_for_the_right_thing(monkeypatch):
    module, real = flash_attn_3(), importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *rest: module if "interface" in name else real(name, *rest)
    )
    flash = IMPLEMENTATIONS[JUDGED[0]]
    monkeypatch.setattr(flash, "unavailable", lambda device: None)
    (row,) = rows("fp8", flash)
    assert row.status == "ok", row.reason
    assert row.dtype == "float8_e4m3fn" and row.flops == CASE.flops()


class Spoiled(TilewiseFp8):
    """tilewise's own, with something wrong in its answer."""

    def __init__(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__("torch")
        self.name, self.change = name, change

    def prepare(self, case: Case, inputs: Inputs, work: Any) -> Prepared:
        prepared = super().prepare(case, inputs, work)
        call = prepared.call
        return replace(prepared, call=lambda: self.change(call()))


def test_an_answer_is_judged_by_plain_fp8(device):
    """bf16 answers by bf16's own rule, fp8 ones by that of plain fp8: its weights are rounded too."""
    bf16, plain, kernel, moved, other = rows(
        "fp8",
        IMPLEMENTATIONS["tilewise torch"],
        Spoiled("right", lambda out: out),
        IMPLEMENTATIONS["tilewise portable, fp8"],
        Spoiled("moved", lambda out: out + 0.2),
        Spoiled("of other rows", lambda out: out.roll(1, 2)),
    )
    for row in (bf16, plain, kernel):
        assert row.status == "ok" and 0 < row.error <= row.allowed_error, row
    assert kernel.torch_error > 2 * bf16.torch_error, "plain fp8 rounds no more than bf16 does"
    assert (moved.status, other.status) == ("wrong", "wrong")
    assert bf16.dtype == "bfloat16"


@pytest.mark.parametrize(
    "change",
    [
        lambda x8, scale: (x8, scale * 1.001),
        lambda x8, scale: (x8.float().mul(1.13).to(x8.dtype), scale),
        lambda x8, scale: (x8, scale[:, :1]),
    ],
)
@pytest.mark.parametrize("rotate", [False, True])
def test_wrong_numbers_are_found(change, rotate):
    q, k, v = case_inputs(CASE, "cpu")[:3]
    made = tilewise.quantize(q, k, v, rotate=rotate, impl="torch")
    assert not judge_numbers("k", k, made.k, made.scales.k, "head", rotate).wrong
    assert judge_numbers("k", k, *change(made.k, made.scales.k), "head", rotate).wrong.startswith(
        ("k", "the scale of k")
    )


@pytest.mark.parametrize("number", [3, 7, 10, 12])  # tiles of rows: dense, packed, in pages; the numbers
def test_checks_of_the_gpu_run_pass(number, device):
    (check,), remark = perform(FP8[number].name, "cpu", 0)
    assert check.passed and check.detail and not remark, check.detail


@pytest.mark.parametrize("number", [0, 11])
def test_checks_of_the_gpu_run_notice_another_scale(number, device, monkeypatch):
    """Of the keys, where the call reads it and where it is made."""
    real = tilewise.quantize if number == 11 else tilewise.attention

    def wrong(*given: Any, **options: Any) -> Any:
        if number == 11:
            made = real(*given, **options)
            return made._replace(scales=made.scales._replace(k=made.scales.k * 1.01))
        scales = options.pop("scales")
        return real(*given, **options, scales=scales._replace(k=scales.k * 1.01))

    monkeypatch.setattr(tilewise, "quantize" if number == 11 else "attention", wrong)
    (check,), _ = perform(FP8[number].name, "cpu", 0)
    assert check.status == "wrong", check.detail


def test_checks_do_not_apply_to_a_gpu_without_fp8(monkeypatch):
    monkeypatch.setattr(fp8, "architecture", lambda device: "sm_80")
    for trial in FP8:
        with pytest.raises(NotApplicable, match=r"sm_90 and newer.*this one is sm_80"):
            trial.function(torch.device("cuda"), 0)
