"""K and V by the copy engine: the same bits as by threads, where it can take them, and nowhere else."""

from dataclasses import replace

import pytest
import torch

import tilewise
from tilewise.kernels.copies import can_be_copied, copies_of
from tilewise.kernels.tile import CopiedTile, Tile, describe, tile_from
from tilewise.plan.bind import bind
from tilewise.plan.request import request_of
from tilewise.plan.tile_table import Evidence, Row, from_json, to_json
from tilewise.tools.tune.candidates import candidates, distance
from tilewise.tools.tune.command import short
from tilewise.tools.tune.journal import tile_of

LOADED, COPIED = Tile(16, 16), CopiedTile(16, 16)
NONE = [None] * 4


def inputs(lengths=(33, 70), dims=(32, 32), dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    (q_len, kv_len), (head_dim, value_dim) = lengths, dims
    sizes = (2, 4, q_len, head_dim), (2, 2, kv_len, head_dim), (2, 2, kv_len, value_dim)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def descriptors_of(*tensors, tile=COPIED, **given):
    return list(copies_of(bind(request_of(*tensors, **given)), tile).values())


def is_copied(found):
    """Whether there is a descriptor for the first piece of K and of V, at least."""
    return found[0] is not None and found[2] is not None


def assert_same(call):
    """The answers with either tile, which must have been made on purpose."""
    answers = []
    for tile in (LOADED, COPIED):
        with tilewise.tiles.use(tile, ["forward"]):
            answers.append(call())
    for loaded, copied in zip(*answers, strict=True):
        assert torch.equal(loaded, copied) and loaded.any()


@pytest.mark.parametrize("mask", [None, tilewise.Causal(), tilewise.Window(left=20, right=3)], ids=repr)
@pytest.mark.parametrize("dims", [(32, 32), (80, 16), (16, 96)], ids=str)
def test_the_same_bits_by_either_way(dims, mask):
    q, k, v = inputs(dims=dims)
    assert is_copied(descriptors_of(q, k, v, mask=mask))
    assert_same(lambda: tilewise.attention(q, k, v, mask=mask, impl="portable", return_lse=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_other_dtypes_and_memory_orders(dtype):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(dtype=dtype))
    assert is_copied(descriptors_of(q, k, v))
    assert_same(lambda: tilewise.attention(q, k, v, impl="portable", return_lse=True))


def test_the_same_bits_of_packed_sequences():
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in inputs((90, 90)))
    offsets = torch.tensor([0, 21, 21, 85], dtype=torch.int32)
    assert is_copied(descriptors_of(q, k, v, q_offsets=offsets))

    def call():
        out, lse = tilewise.packed_attention(q, k, v, q_offsets=offsets, return_lse=True)
        return out[:85], lse[..., :85]

    assert_same(call)


def test_the_same_bits_of_a_cache():
    q, k, v = inputs((1, 96))
    kv_lens = torch.tensor([96, 37], dtype=torch.int32)
    assert is_copied(descriptors_of(q, k, v, kv_lens=kv_lens))
    assert_same(lambda: tilewise.cached_attention(q, k, v, kv_lens=kv_lens, return_lse=True))


def test_what_nobody_sees_may_hold_nan():
    q, k, v = inputs((32, 64))
    k[:, :, 40:], v[:, :, 40:] = torch.nan, torch.nan
    mask = tilewise.Padding(torch.tensor([40, 33]))
    with tilewise.tiles.use(COPIED, ["forward"]):
        out = tilewise.attention(q, k, v, mask=mask, impl="portable")
    assert out.isfinite().all()


def test_the_copy_engine_is_asked_only_for_what_it_can_take():
    q, k, v = inputs()
    assert can_be_copied(k) and not can_be_copied(k[:, :, :0])
    assert not can_be_copied(torch.randn(2, 2, 8, 64).half()[..., ::2]), "its rows must lie in one piece"
    assert not can_be_copied(k[..., 1:17]), "they must begin on multiples of 16 bytes"
    assert not can_be_copied(torch.randn(2, 2, 8, 36).half()), "each of them"
    assert not can_be_copied(k[:, :, :1].expand(2, 2, 8, 32)), "and not all at one place"
    assert can_be_copied(k[:1, :, :1].as_strided((1, 2, 1, 32), (3, 2240, 5, 1))), "nobody steps along 1"
    assert descriptors_of(q, k, v, tile=LOADED) == NONE
    assert descriptors_of(q, k, v[..., 1:17]) == NONE
    pages = torch.zeros(2, 3, dtype=torch.int32)
    in_pages = torch.randn(2, 4, 16, 2, 32).half().unbind(0)
    lengths = torch.tensor([5, 40], dtype=torch.int32)
    assert descriptors_of(q, *in_pages, kv_lens=lengths, pages=pages) == NONE


def test_a_descriptor_for_each_piece_of_columns():
    q, k, v = inputs(dims=(80, 96))
    found = descriptors_of(q, k, v)
    assert [each.block_shape for each in found] == [[1, 1, 16, columns] for columns in (16, 64, 32, 64)]
    assert [each.base.data_ptr() for each in found] == [x.data_ptr() for x in (k, k, v, v)]
    one_piece = descriptors_of(q, k[..., :64], v[..., :64])
    assert [each is None for each in one_piece] == [False, True, False, True]


def test_such_a_tile_is_written_and_read():
    tile = CopiedTile(128, 64, 8, 3)
    row = Row("forward", "sm_90", 2, 128, tile, Evidence("3.9.0"))
    assert from_json(to_json(row)) == row and from_json(to_json(replace(row, tile=LOADED))).tile == LOADED
    plain = to_json(row) | {"is_copied": False}
    assert from_json(plain).tile == Tile(128, 64, 8, 3)
    with pytest.raises(ValueError, match="has no field is_copied"):
        from_json(to_json(replace(row, work="dkv")))
    with pytest.raises(ValueError, match="is_copied=1 must be bool"):
        from_json(to_json(row) | {"is_copied": 1})
    assert tile_of("forward", [128, 64, 8, 3, True]) == tile == tile_from("forward", to_json(row))
    assert describe(tile).endswith("3 stages, by the copy engine") and short(tile) == "128x64 w8 s3 copied"


def test_it_is_a_candidate_where_the_chip_has_a_copy_engine():
    for arch, works in (("sm_90", {"forward"}), ("sm_100", {"forward"}), ("sm_80", set()), ("gfx942", set())):
        for work in ("forward", "dkv", "dq"):
            found = candidates(work, arch, 2, 128)
            copied = {tile for tile in found if isinstance(tile, CopiedTile)}
            assert len(copied) * 2 == (len(found) if work in works else 0)
    assert distance(Tile(128, 64), CopiedTile(128, 64)) == 0.5
