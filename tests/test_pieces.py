"""Tiles in pieces: which columns they have, and dimensions that are no power of two or wide, in every kernel,
against float64."""

import random

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from harness.features import build, judge
from harness.problem import DTYPES
from tilewise import Causal
from tilewise.kernels import backward
from tilewise.kernels.append import tile_rows
from tilewise.kernels.backward import sums_of
from tilewise.kernels.room import fits
from tilewise.kernels.tile import Tile
from tilewise.nn import Rotary
from tilewise.parts.pieces import (
    load_pieces,
    padded_columns,
    pieces_of,
    product,
    products,
    store_pieces,
    zero_pieces,
)
from tilewise.plan.rules.tensors import MAX_HEAD_DIM, MAX_VALUE_DIM
from tilewise.plan.tiles import square_tile, table_tile


def test_pieces_are_powers_of_two_and_waste_the_least():
    for dim in range(1, MAX_HEAD_DIM + 1):
        pieces = pieces_of(dim)
        assert all(piece >= 16 and piece & (piece - 1) == 0 for piece in pieces)
        one, half = max(16, 1 << (dim - 1).bit_length()), 16
        two = []
        while half < one and dim > 64:
            two += [half + rest for rest in (16, 32, 64, 128, 256, 512) if dim <= half + rest]
            half *= 2
        assert sum(pieces) == padded_columns(dim) == min([one, *two])
        assert len(pieces) <= 2 and sorted(pieces) == list(pieces), "the widest last"
        assert len(pieces) == 1 or sum(pieces) <= one * 3 / 4, "two are worth it"


@pytest.mark.parametrize(
    "dim, pieces",
    [(5, (16,)), (40, (64,)), (64, (64,)), (72, (16, 64)), (80, (16, 64)), (96, (32, 64)), (100, (128,)),
     (160, (32, 128)), (192, (64, 128)), (512, (512,)), (576, (64, 512))],
)  # fmt: skip
def test_pieces_of_some_dimensions(dim, pieces):
    assert pieces_of(dim) == pieces


@triton.jit
def products_kernel(a_ptr, s_ptr, o_ptr, DIM: tl.constexpr, PIECES: tl.constexpr):
    """S = A Aᵀ and S A, of 16 rows."""
    rows = tl.arange(0, 16)
    a = load_pieces((a_ptr, DIM, 1), rows, rows < 16, DIM, PIECES)
    s = product(a, a, "ieee")
    tl.store(s_ptr + rows[:, None] * 16 + rows[None, :], s)
    sums = zero_pieces(16, PIECES)
    store_pieces((o_ptr, DIM, 1), products(s, a, sums, "ieee"), rows, rows < 15, DIM, PIECES)


@pytest.mark.parametrize("dim", [16, 40, 75, 80, 96])
def test_products_over_pieces_and_into_them(device, dim):
    """What is stored beyond DIM or in a row that is masked stays as it was."""
    a = torch.randn(16, dim, generator=torch.Generator().manual_seed(dim)).to(device)
    s, o = a.new_empty(16, 16), torch.full((17, dim), 7.0, device=device)
    products_kernel[(1,)](a, s, o, DIM=dim, PIECES=pieces_of(dim))
    wide = a.double() @ a.double().mT
    torch.testing.assert_close(s.double(), wide, rtol=0, atol=4e-5)
    torch.testing.assert_close(o[:15].double(), (s.double() @ a.double())[:15], rtol=0, atol=1e-3)
    assert (o[15:] == 7).all()


SIZES = dict(batch=1, q_heads=2, kv_heads=1, q_len=17, kv_len=20)
TRAINED = {
    (80, 80): "causal alibi bias",
    (96, 40): "cosine_with_temperature window",
    (100, 72): "dropout causal",
    (160, 96): "scattered_documents sink",
    (192, 128): "packed_rows causal",
    (512, 512): "causal softcap",
    (576, 512): "packed_apart causal",
    (40, 160): "bool_mask relative_position",
    (575, 511): "cosine bool_mask",
}


@pytest.mark.parametrize("dims", TRAINED, ids=str)
def test_forward_and_gradients(device, dims):
    features = [*TRAINED[dims].split(), DTYPES[sum(dims) // 8 % 3]]
    judge(
        build(device, random.Random(3), features, **SIZES, head_dim=dims[0], value_dim=dims[1]), backward=True
    )


def test_which_dk_and_dv_are_summed_apart():
    """Those of 16 bits that have more columns together than a program sums."""
    together = [(256, 256, 2), (384, 128, 2), (80, 80, 2), (576, 512, 4)]
    apart = [(257, 240, 2), (16, 512, 2), (512, 512, 2), (576, 512, 2)]
    assert {sums_of(*given) for given in together} == {("dkv",)}
    assert {sums_of(*given) for given in apart} == {("dk", "dv")}


def test_dk_and_dv_apart_with_what_is_learned(device, monkeypatch):
    """For several tiles of rows and of keys, and a parameter whose tiles of rows are others."""
    launched = []

    def recorded(kernel, *args, launch=backward.launch, **arguments):
        launched.append(arguments.get("SUMS"))
        launch(kernel, *args, **arguments)

    monkeypatch.setattr(backward, "launch", recorded)
    features = ["dropout", "causal", "bias", "float16"]
    sizes = SIZES | dict(q_len=40, head_dim=272, value_dim=250)
    p = build(device, random.Random(3), features, **sizes)
    p.tile = Tile(32, 16)
    assert len(judge(p, backward=True)) == 4  # of q, k, v and the bias
    assert [sums for sums in launched if sums is not None] == ["dk", "dv"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tiles_of_parameters_of_wide_rows_fit(arch):
    for dim in (64, 256, 320, 576):
        tile = square_tile(table_tile(arch, 2, dim, "dkv"), dim)
        assert tile.tile_q == tile.tile_kv and fits(tile, arch, 2, dim, "dq")


def test_explain_counts_dk_and_dv_apart():
    """Q Kᵀ once more, and no other product."""
    q, k, v = (torch.empty(1, 2, 64, dim, dtype=torch.bfloat16, device="meta") for dim in (576, 576, 512))
    found = {kernel.name: kernel for kernel in tilewise.explain(q, k, v, gpu="H200", work="training").kernels}
    assert [*found] == ["forward", "prepare", "dq", "dk", "dv"]
    pairs = 2 * 2 * 64 * 64
    assert [found[name].flops for name in ("dk", "dv")] == [pairs * (2 * 576 + 512), pairs * (576 + 512)]
    assert found["dk"].tile == found["dv"].tile == table_tile("sm_90", 2, 576, "dkv")


@pytest.mark.parametrize("dims", [(80, 80), (576, 512)], ids=str)
def test_nan_where_nobody_looks(device, dims):
    """In keys and values that no row sees and in rows that see no key, in every piece of them."""
    p = build(device, random.Random(3), ["float16"], **SIZES, head_dim=dims[0], value_dim=dims[1])
    q, k, v = (x.requires_grad_() for x in p.tensors())
    keep = torch.ones(17, 20, dtype=torch.bool, device=device)
    keep[:, 3] = keep[:, 18] = keep[5] = False
    with torch.no_grad():
        for x in (k, v):
            x[:, :, 3] = x[:, :, 18] = torch.nan
    with tilewise.tiles.use(Tile(16, 16)):
        out = tilewise.attention(q, k, v, mask=keep, impl="portable")
        do = torch.randn_like(out)
        do[:, :, 5] = torch.nan
        found = torch.autograd.grad(out, (q, k, v), do)
    assert all(x.isfinite().all() for x in (out, *found))


CACHED = {(80, 80): None, (192, 128): 5, (512, 512): 16, (576, 512): 16}


@pytest.mark.parametrize("dims", CACHED, ids=str)
def test_cached_split_and_turned(device, dims):
    """New rows written, turned by their positions; then the keys of each sequence in parts, and merged."""
    (dim, value_dim), page, lens, new = dims, CACHED[dims], (20, 3), 2
    generator = torch.Generator().manual_seed(dim)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    q, new_k, new_v = randn(2, 4, new, dim), randn(2, 1, new, dim), randn(2, 1, new, value_dim)
    k, v = randn(2, 1, 48, dim), randn(2, 1, 48, value_dim)
    rotary = Rotary(dim, rotary_dim=2 * (dim // 3))
    held = [k.clone(), v.clone()]
    pages = None
    if page is not None:
        pages = torch.arange(2 * -(-48 // page), device=device).flip(0).reshape(2, -1)
        pools = []
        for x in held:
            padded = x.new_full((2, pages.shape[1] * page, 1, x.shape[3]), torch.nan)
            padded[:, :48] = x.transpose(1, 2)
            pool = x.new_empty(pages.numel(), page, 1, x.shape[3])
            pool[pages] = padded.reshape(2, -1, page, 1, x.shape[3])
            pools.append(pool)
        held = pools
    out = tilewise.cached_attention(
        q, *held, kv_lens=torch.tensor(lens, device=device), pages=pages, new_k=new_k, new_v=new_v,
        rotary=rotary.table(64, device), mask=Causal(), split_size=16, impl="portable",
    )  # fmt: skip
    for b, n in enumerate(lens):
        one_q, one_k = rotary(q[b : b + 1], new_k[b : b + 1], positions=n)
        keys = torch.cat([k[b : b + 1, :, :n], one_k], 2)
        values = torch.cat([v[b : b + 1, :, :n], new_v[b : b + 1]], 2)
        wanted = tilewise.attention(one_q, keys, values, mask=Causal(), impl="torch")
        torch.testing.assert_close(
            out[b : b + 1], wanted, rtol=0, atol=64 * 2.0**-23 * wanted.abs().max().item()
        )


@pytest.mark.parametrize(
    "name, dims, most", [("head_dim", (577, 16), MAX_HEAD_DIM), ("value_dim", (16, 513), MAX_VALUE_DIM)]
)
def test_what_is_wider_is_refused_by_name(device, name, dims, most):
    q, v = (torch.zeros(1, 1, 3, dim, device=device) for dim in dims)
    with pytest.raises(ValueError, match=f"{name}={max(dims)} must be from 1 to {most}$"):
        tilewise.attention(q, q, v)


def test_a_gradient_in_one_piece_alone(device):
    """The gradient of a row may lie in the narrow piece alone, or in the wide one."""
    for columns in (slice(0, 16), slice(16, 80)):
        q = torch.zeros(1, 1, 4, 80, device=device)
        q[..., 0 if columns.start else 20] = 1.0  # orthogonal to the keys
        k = torch.zeros(1, 1, 3, 80, device=device)
        k[..., columns] = torch.randn(3, columns.stop - columns.start, device=device)
        v = torch.randn(1, 1, 3, 16, device=device)
        q.requires_grad_()
        found = []
        for impl in ("portable", "torch"):
            out = tilewise.attention(q, k, v, similarity="cosine", impl=impl)
            found.append(torch.autograd.grad(out.square().sum(), q)[0])
        assert (found[1][..., columns].abs().sum(-1) > 1e-3).all()
        torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_a_program_that_appends_holds_as_much_whatever_the_width():
    assert [tile_rows(dim) for dim in (16, 256, 300, 512, 576)] == [16, 16, 8, 8, 4]
