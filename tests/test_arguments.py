"""Masks and scores that are made or given wrong: refused at once, by the name of the argument."""

import math

import pytest
import torch

import tilewise
from harness.calls import BOOL, INT, good, zeros
from tilewise.parts.bounds import UNLIMITED

INTS = torch.arange(5)
WRONG = [
    ("align", "'left'", "'bottom_right'", lambda: tilewise.Causal("left")),
    ("align", "'left'", "'top_left'", lambda: tilewise.Window(1, 1, align="left")),
    ("align", "'left'", "'top_left'", lambda: tilewise.Prefix(1, align="left")),
    ("align", "'left'", "'top_left'", lambda: tilewise.ALiBi(torch.ones(4), align="left")),
    ("align", "'left'", "'top_left'", lambda: tilewise.RelativePosition(torch.ones(4, 32), align="left")),
    ("left", "-1", "None", lambda: tilewise.Window(-1, 0)),
    ("right", str(UNLIMITED), "None", lambda: tilewise.Window(0, UNLIMITED)),
    ("lengths", "-2", "at least 0", lambda: tilewise.Prefix(-2)),
    ("lengths", "torch.float32", "torch.int32", lambda: tilewise.Prefix(torch.ones(2))),
    ("kv_lens", "-3", "at least 0", lambda: tilewise.Padding(-3)),
    ("kv_lens", "torch.bool", "sum(1)", lambda: tilewise.Padding(torch.ones(2, dtype=torch.bool))),
    ("side", "'middle'", "'right'", lambda: tilewise.Padding(3, side="middle")),
    ("start", "torch.int16", "torch.int32", lambda: tilewise.Intervals(INTS.short(), INTS)),
    ("end", "torch.float32", "torch.int64", lambda: tilewise.Intervals(INTS, INTS.float())),
    ("mask", "torch.int64", "mask.bool()", lambda: tilewise.Dense(INTS)),
    ("mask", "torch.float16", "bias=", lambda: tilewise.Dense(INTS.half())),
    ("slopes", "4", "alibi_slopes(4)", lambda: tilewise.ALiBi(4)),
    ("ids", "torch.uint8", "torch.int32", lambda: tilewise.Documents(INTS.byte())),
    ("kv_ids", "torch.float32", "torch.int64", lambda: tilewise.Documents(INTS, INTS.float())),
    ("ids", "(1, 1, 5)", "[batch, length]", lambda: tilewise.Documents(INTS[None, None])),
    ("kv_ids", "meta", "same", lambda: tilewise.Documents(INTS, INTS.to("meta"))),
    ("cap", "0", "above 0", lambda: tilewise.Softcap(0)),
    ("cap", "-1.0", "above 0", lambda: tilewise.Softcap(-1.0)),
    ("cap", "inf", "leave Softcap out", lambda: tilewise.Softcap(math.inf)),
    ("cap", "nan", "above 0", lambda: tilewise.Softcap(math.nan)),
    ("slopes", "torch.int64", "torch.float32", lambda: tilewise.ALiBi(INTS)),
    ("table", "torch.int64", "torch.float16", lambda: tilewise.RelativePosition(INTS[None])),
    ("table", "(32,)", "[q_heads, buckets]", lambda: tilewise.RelativePosition(torch.ones(32))),
    ("num_buckets", "3", "at least 4", lambda: tilewise.RelativePosition(torch.ones(4, 3))),
    (
        "max_distance",
        "8",
        "greater than 8",
        lambda: tilewise.RelativePosition(torch.ones(4, 32), max_distance=8),
    ),
    ("bias", "torch.int32", "torch.float64", lambda: tilewise.Bias(torch.ones(5, 7).int())),
    ("mask", "'causal'", "a tilewise mask", lambda: tilewise.Causal() & "causal"),
    ("tile_q", "24", "power of two", lambda: tilewise.tiles.Tile(24, 16)),
    ("tile_kv", "8", "at least 16", lambda: tilewise.tiles.Tile(16, 8)),
]
NOT_TENSORS = [
    ("bias", "0.5", lambda: tilewise.Bias(0.5)),
    ("slopes", "[0.5", lambda: tilewise.ALiBi([0.5, 0.25])),
    ("table", "[[", lambda: tilewise.RelativePosition([[1.0] * 32])),
    ("mask", "[True]", lambda: tilewise.Dense([True])),
    ("start", "[0]", lambda: tilewise.Intervals([0], INTS)),
    ("ids", "[0", lambda: tilewise.Documents([0, 0, 1])),
    ("kv_lens", "[7, 3]", lambda: tilewise.Padding([7, 3])),
    ("kv_lens", "1.5", lambda: tilewise.Padding(1.5)),
    ("lengths", "'3'", lambda: tilewise.Prefix("3")),
    ("left", "1.5", lambda: tilewise.Window(1.5, 0)),
    ("right", "'2'", lambda: tilewise.Window(0, "2")),
    ("cap", "'50'", lambda: tilewise.Softcap("50")),
]


@pytest.mark.parametrize("name, given, wanted, make", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_value_is_refused_when_a_mask_or_score_is_made(name, given, wanted, make):
    with pytest.raises(ValueError) as raised:
        make()
    for word in (name, given, wanted):
        assert word in str(raised.value)


@pytest.mark.parametrize("name, given, make", NOT_TENSORS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_type_is_refused_when_a_mask_or_score_is_made(name, given, make):
    with pytest.raises(ValueError) as raised:
        make()
    for word in (name, given, "must be"):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    "name, given",
    [
        ("mask", "causal"),
        ("mask", 3),
        ("score", "softcap"),
        ("score", 5.0),
        ("score", ["alibi"]),
        ("bias", 0.5),
    ],
)
def test_a_wrong_mask_or_score_argument_is_named(name, given, device, nothing_runs):
    arguments = good(device) | {name: given}
    with pytest.raises(ValueError, match=name) as raised:
        tilewise.attention(**arguments)
    assert tilewise.why_not(**arguments) == [str(raised.value)]


def ends(start: int, end: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return zeros(start, **INT)(device), zeros(end, **INT)(device)


UNFIT = [
    ("Padding", "kv_lens.shape=(3,)", "(2,)", lambda d: dict(mask=tilewise.Padding(zeros(3, **INT)(d)))),
    ("Prefix", "lengths.shape=(3,)", "(2,)", lambda d: dict(mask=tilewise.Prefix(zeros(3, **INT)(d)))),
    ("Intervals", "end.shape=(7,)", "(2, 4, 5)", lambda d: dict(mask=tilewise.Intervals(*ends(5, 7, d)))),
    ("Documents", "kv_ids.shape=(5,)", "(2, 7)", lambda d: dict(mask=tilewise.Documents(INTS.to(d)))),
    ("ALiBi", "slopes.shape=(2,)", "(2, 4)", lambda d: dict(score=tilewise.ALiBi(zeros(2)(d)))),
    (
        "RelativePosition",
        "(2, 32)",
        "[4, buckets]",
        lambda d: dict(score=tilewise.RelativePosition(zeros(2, 32)(d))),
    ),
    (
        "mask (the bool tensor)",
        "(2, 4, 7, 5)",
        "(2, 4, 5, 7)",
        lambda d: dict(mask=tilewise.Causal() & zeros(2, 4, 7, 5, **BOOL)(d)),
    ),
]


@pytest.mark.parametrize("mask_or_score, given, wanted, change", UNFIT, ids=[case[0] for case in UNFIT])
def test_a_mask_or_score_of_another_shape_is_named(
    mask_or_score, given, wanted, change, device, nothing_runs
):
    arguments = good(device) | change(device)
    with pytest.raises(ValueError) as raised:
        tilewise.attention(**arguments)
    for word in (mask_or_score, given, wanted):
        assert word in str(raised.value)
