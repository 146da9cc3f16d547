"""Which calls does the Hopper kernel take, which does it refuse, and in what words?"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
from tilewise.kernels import room
from tilewise.kernels.tile import HopperTile
from tilewise.parts.place import Place
from tilewise.plan import checks, tiles
from tilewise.plan.implementation import implementation
from tilewise.plan.request import make_request, request_of
from tilewise.plan.rules import hopper as rules
from tilewise.plan.tile_table import Evidence

if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU (sm_90), or none: then it runs in the emulator", allow_module_level=True)

BATCH, Q_HEADS, KV_HEADS, Q_LEN, KV_LEN, DIM = 2, 4, 2, 5, 7, 16


def good(device: torch.device) -> dict[str, Any]:
    """A call with everything that it takes."""
    q = torch.zeros(BATCH, Q_LEN, Q_HEADS, DIM, dtype=torch.bfloat16, device=device).transpose(1, 2)
    k = torch.zeros(BATCH, KV_HEADS, KV_LEN, DIM, dtype=torch.bfloat16, device=device)
    lengths = torch.tensor([3, 7], device=device)
    return dict(
        q=q, k=k, v=torch.zeros_like(k), impl="hopper", sink=torch.zeros(Q_HEADS, device=device),
        mask=tilewise.Causal("top_left") & tilewise.Window(3, 1, "bottom_right") & tilewise.Padding(lengths),
        score=[tilewise.Softcap(30.0), tilewise.ALiBi(torch.ones(Q_HEADS, device=device), "top_left")],
        scale=2.0, bias=torch.zeros(Q_LEN, KV_LEN, device=device), similarity="cosine",
    )  # fmt: skip


def halves(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, **options)


def keep_all(q_idx, kv_idx, batch, head, args):
    return q_idx >= 0


K = (BATCH, KV_HEADS, KV_LEN, DIM)
# A rule, the words of its reason, and what changes in a good call, made on a device.
REFUSED = [
    ("dtype_is_16_bits", ("q.dtype=torch.float32", "torch.float16", "torch.bfloat16"), lambda d: {
        name: torch.zeros(*shape, device=d) for name, shape in
        (("q", (BATCH, Q_HEADS, Q_LEN, DIM)), ("k", K), ("v", K))
    }),
    ("dims_are_narrow", ("head_dim=16", "value_dim=264", "at most 256"), lambda d: dict(
        v=halves(*K[:3], 264, device=d),
    )),
    ("some_key_is_there", ("kv_len=0",), lambda d: dict(
        k=halves(BATCH, KV_HEADS, 0, DIM, device=d), v=halves(BATCH, KV_HEADS, 0, DIM, device=d), bias=None,
    )),
    ("rows_are_not_packed", ("q_offsets pack sequences", "across their ends"), lambda d: dict(
        q=halves(9, Q_HEADS, DIM, device=d), k=halves(9, KV_HEADS, DIM, device=d),
        v=halves(9, KV_HEADS, DIM, device=d), bias=None, q_offsets=torch.tensor([0, 4, 9], device=d),
    )),
    ("nothing_is_dropped", ("dropout_p=0.5", "must be 0"), lambda d: dict(
        dropout_p=0.5, dropout_seed=torch.zeros(1, dtype=torch.int64, device=d),
    )),
    ("masks_leave_no_gaps", ("Documents", "Causal, Window, Prefix, Padding"), lambda d: dict(
        mask=tilewise.Causal(2) & tilewise.Documents(torch.zeros(Q_LEN, dtype=torch.int32, device=d),
                                                     torch.zeros(KV_LEN, dtype=torch.int32, device=d)),
    )),
    ("masks_leave_no_gaps", ("Dense",), lambda d: dict(
        mask=torch.ones(Q_LEN, KV_LEN, dtype=torch.bool, device=d),
    )),
    ("masks_leave_no_gaps", ("Intervals",), lambda d: dict(
        mask=tilewise.Intervals(*torch.zeros(2, Q_LEN, dtype=torch.int32, device=d)),
    )),
    ("masks_leave_no_gaps", ("UserMask",), lambda d: dict(mask=tilewise.UserMask(keep_all))),
    ("scores_are_known", ("keep_all", "function of the caller's own"), lambda d: dict(
        score=tilewise.UserScore(keep_all),
    )),
    ("out_is_aligned", ("value_dim=12", "multiple of 8"), lambda d: dict(v=halves(*K[:3], 12, device=d))),
    ("tensors_can_be_copied", ("k.stride(3)=7", "must be 1"), lambda d: dict(
        k=halves(BATCH, KV_HEADS, DIM, KV_LEN, device=d).mT,
    )),
    ("tensors_can_be_copied", ("k.stride(0)=252", "504 bytes", "multiple of 16"), lambda d: dict(
        k=halves(BATCH, KV_HEADS, KV_LEN, DIM + 2, device=d)[..., :DIM],
    )),
    ("tensors_can_be_copied", ("v.stride(0)=0", "0 bytes", "above 0"), lambda d: dict(
        v=halves(1, *K[1:], device=d).expand(K),
    )),
    ("tensors_can_be_copied", ("k starts at an address", "16 bytes", "clone()"), lambda d: dict(
        k=halves(BATCH * KV_HEADS * KV_LEN * DIM + 4, device=d)[4:].view(K),
    )),
]  # fmt: skip


@pytest.mark.parametrize("rule, words, change", REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_refused_says_why(rule, words, change, device, monkeypatch):
    monkeypatch.setattr("tilewise.plan.passes.launch_hopper", None)  # nothing runs
    arguments = good(device) | change(device)
    reason = getattr(rules, rule)(request_of(**arguments))
    assert reason is not None and all(word in reason for word in words), reason
    listed = tilewise.why_not(**arguments)
    assert len(listed) == 1 and listed[0].startswith("impl='hopper': ") and reason in listed[0]
    assert "impl=None" in listed[0]
    attend = tilewise.packed_attention if "q_offsets" in arguments else tilewise.attention
    with pytest.raises(ValueError, match="impl='hopper'"):
        attend(**arguments)
    # The portable kernel takes it.
    assert tilewise.why_not(**arguments | dict(impl="portable")) == []


def test_every_rule_has_a_case():
    elsewhere = {"chip_is_hopper", "call_is_whole"}  # on a GPU; below
    assert {rule.__name__ for rule in rules.RULES} == {rule for rule, *_ in REFUSED} | elsewhere


def test_a_part_of_a_larger_call_is_refused(device):
    request = request_of(**good(device))
    place = Place(*request.shape[:5])
    assert "a part of a larger one" in rules.call_is_whole(replace(request, place=place))
    assert rules.call_is_whole(request) is None


def test_a_call_with_everything_that_is_taken(device):
    assert tilewise.why_not(**good(device)) == []


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_dimension_of_one_may_have_any_stride(axis, device):
    shape = [1 if i == axis else size for i, size in enumerate((BATCH, KV_HEADS, KV_LEN, DIM))]
    odd = list(halves(*shape).stride())
    odd[axis] = 3
    k = torch.randn(4096, device=device).bfloat16().as_strided(shape, odd)
    q = torch.randn(shape[0], Q_HEADS, Q_LEN, DIM, device=device).bfloat16()
    assert tilewise.why_not(q, k, k, impl="hopper") == []
    out = tilewise.attention(q, k, k, impl="hopper")
    assert torch.equal(out, tilewise.attention(q, k.contiguous(), k.contiguous(), impl="hopper"))


def test_other_chips_are_refused(device, monkeypatch):
    """Asked of a GPU that says it is another chip; nothing runs on it."""
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    request = make_request(**good(device))
    on_cuda = replace(request, q=_OnCuda())
    reason = rules.chip_is_hopper(on_cuda)
    assert reason == "it needs a Hopper GPU (sm_90), and cuda:0 is NVIDIA A100 (sm_80)"
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    assert rules.chip_is_hopper(on_cuda) is None


class _OnCuda:
    """As much of a tensor as the rule about chips looks at."""

    device = torch.device("cuda:0")
    is_meta = False
    shape = (BATCH, Q_HEADS, Q_LEN, DIM)

    def element_size(self) -> int:
        return 2


def test_a_call_that_passed_and_one_that_only_looks_like_it(device):
    """What passed is remembered by what rules look at: strides and addresses are among it."""
    arguments = good(device)
    checks.check(make_request(**arguments))
    moved = halves(BATCH * KV_HEADS * KV_LEN * DIM + 4, device=device)[4:].view(K)
    with pytest.raises(ValueError, match="k starts at an address"):
        checks.check(make_request(**arguments | dict(k=moved)))
    with pytest.raises(ValueError, match=r"k\.stride\(3\)"):
        checks.check(
            make_request(**arguments | dict(k=halves(BATCH, KV_HEADS, DIM, KV_LEN, device=device).mT))
        )
    checks.check(make_request(**arguments | dict(k=moved, impl="portable")))


# ---- Without being asked for


PROVEN = Evidence("3.9.0", gpu="NVIDIA H200", error=0.9, over_portable=1.2)


@pytest.mark.parametrize(
    "change",
    [dict(gpu=None), dict(error=None), dict(error=1.1), dict(over_portable=None), dict(over_portable=1.0)],
)
def test_a_result_proves_only_what_a_gpu_showed_right_and_faster(change):
    assert tiles.is_proven(PROVEN)
    assert not tiles.is_proven(replace(PROVEN, **change))


def test_it_must_be_asked_for_until_a_gpu_has_proven_it(device):
    """The shipped table has no such result; when one is committed, this test goes."""
    assert frozenset() == tiles.PROVEN
    request = make_request(**good(device) | dict(impl=None))
    assert implementation(request) == "portable" and not rules.is_default(request)


def test_it_is_the_default_where_it_is_proven(device, monkeypatch):
    request = make_request(**good(device) | dict(impl=None))
    monkeypatch.setattr(tiles, "PROVEN", frozenset({("hopper", "sm_90", 2, 64)}))
    monkeypatch.setattr(rules, "RULES", (rules.chip_is_hopper, rules.masks_leave_no_gaps))
    monkeypatch.setattr(rules, "INTERPRETED", False)

    def is_default(arch: str = "sm_90", **changes: Any) -> bool:
        monkeypatch.setattr(tiles, "architecture", lambda device: arch)
        asked = replace(request, q=_OnCuda(), **changes)
        asked._shape = request.shape
        return rules.is_default(asked)

    assert is_default()
    assert not is_default(masks=(tilewise.UserMask(keep_all),))  # refused: the portable kernel answers
    assert not is_default("sm_100")
    monkeypatch.setattr(tiles, "PROVEN", frozenset({("hopper", "sm_90", 2, 128)}))
    assert not is_default()


def shape_of(head_dim: int, value_dim: int) -> Any:
    q, v = (torch.empty(1, 1, 128, dim, dtype=torch.float16, device="meta") for dim in (head_dim, value_dim))
    return make_request(q, q, v).shape


def test_a_result_for_one_piece_proves_nothing_for_two(monkeypatch):
    """96 has the tile of 128, and other code."""
    monkeypatch.setattr(tiles, "PROVEN", frozenset({("hopper", "sm_90", 2, 128)}))
    proven = {dims for dims in ((128, 128), (96, 96), (128, 96)) if is_proven_for(*dims)}
    assert proven == {(128, 128)}
    monkeypatch.setattr(tiles, "PROVEN", frozenset({("hopper", "sm_90", 2, 160)}))
    assert is_proven_for(160, 160) and is_proven_for(192, 128) and not is_proven_for(192, 192)


def is_proven_for(head_dim: int, value_dim: int) -> bool:
    return tiles.is_hopper_proven("sm_90", 2, shape_of(head_dim, value_dim))


@pytest.mark.parametrize(
    "dims, tile_kv",
    [
        ((128, 128), 128), ((192, 128), 128), ((160, 160), 128), ((192, 192), 64), ((128, 192), 64),
        ((136, 152), 64), ((256, 64), 64), ((256, 256), 64),
    ],
)  # fmt: skip
def test_a_tile_for_what_shared_memory_and_registers_hold(dims, tile_kv):
    """Twice as many keys a step where K and V together are narrow enough, and O can share Q's place."""
    tile = tiles.gpu_tile("sm_90", 2, shape_of(*dims), "hopper")
    assert isinstance(tile, HopperTile) and tile.tile_kv == tile_kv


def test_every_dimension_has_a_tile_with_room():
    for dims in itertools.product(range(8, 257, 8), repeat=2):
        tile = tiles.table_tile("sm_90", 2, tiles.tile_dim(*dims, "hopper"), "hopper")
        assert isinstance(tile, HopperTile)
        taken = room.hopper_bytes(tile, *dims, room.has_out_buffer(tile, *dims))
        assert taken <= room.SHARED_BYTES["sm_90"], dims


def test_o_without_a_place_is_refused():
    """O leaves through Q's place only where that has pieces as wide as its own."""
    wide, narrow = HopperTile(128, 64, 8, 3), HopperTile(128, 64, 8, 2)
    assert not room.has_out_buffer(HopperTile(128, 128, 8, 2), 192, 128)
    assert not room.has_out_buffer(narrow, 256, 256) and room.has_out_buffer(narrow, 256, 128)
    with pytest.raises(NotImplementedError, match=r"no room for O.*head_dim=256 and value_dim=128"):
        room.has_out_buffer(wide, 256, 128)
