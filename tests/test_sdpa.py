"""tilewise.scaled_dot_product_attention answers as PyTorch's function of that name does, call for call."""

import ast
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F

import tilewise

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 2, 3, 5, 7, 8
U = 2.0**-24  # half a unit in the last place of fp32


@pytest.fixture(autouse=True)
def small_tiles():
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        yield


def allowed_error(query, key, value, attn_mask, scale, want) -> torch.Tensor:
    """How far fp32 arithmetic may stray from the exact result, by the textbook bound on dot products."""
    factor = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    # |q·k| ≤ |q| |k|; finfo.min in a mask is as good as -inf, and says nothing about the size of scores.
    largest = factor * query.double().norm(dim=-1).amax() * key.double().norm(dim=-1).amax()
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        largest = largest + attn_mask[attn_mask > -1e4].double().abs().amax()
    # A score: head_dim products and sums (tensor cores cut instead of rounding: twice), then scale, mask,
    # base 2 and the subtraction of the maximum.
    score = (2 * query.shape[-1] + 5) * U * largest
    # Two sums over keys, each of exponentials with the score's error and 2 units of their own (PTX ISA).
    weights = 2 * (score + (key.shape[-2] + 4) * U)
    rounding = torch.finfo(query.dtype).eps / 2  # of P before the second matmul, and of the result
    return (weights + rounding) * value.double().abs().amax() + rounding * want.abs()


def compare(query, key, value, attn_mask=None, scale=None, **arguments) -> torch.Tensor:
    """Both functions on the same arguments; PyTorch's in float64."""
    got = tilewise.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale, **arguments)
    additive = attn_mask is not None and attn_mask.dtype != torch.bool
    mask = attn_mask.double() if additive else attn_mask
    want = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), mask, scale=scale, **arguments
    )
    assert got.dtype == query.dtype and got.device == query.device
    assert got.shape == want.shape
    if want.numel() and key.shape[-2] == 0:
        assert (got == want).all() and (want == 0).all()
    elif want.numel():
        assert want.isfinite().all(), "PyTorch's own result is no yardstick here"
        excess = (got.double() - want).abs() - allowed_error(query, key, value, attn_mask, scale, want)
        assert excess.max() <= 0, f"an element is {excess.max().item():.3g} beyond the allowed error"
    return got


def qkv(device, q=(BATCH, HEADS, Q_LEN, DIM), k=(BATCH, HEADS, KV_LEN, DIM), v=None, dtype=torch.float32):
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in (q, k, v or k))


@pytest.mark.parametrize(
    "q, k, v",
    [
        ((5, 8), (7, 8), (7, 8)),
        ((5, 8), (7, 8), (7, 3)),
        ((3, 5, 8), (3, 7, 8), (3, 7, 11)),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
        ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)),
        ((3, 5, 8), (1, 7, 8), (7, 8)),
        ((5, 8), (2, 2, 7, 8), (7, 6)),
        ((2, 3, 5, 8), (1, 3, 7, 8), (2, 1, 7, 8)),
        ((1, 1, 5, 8), (3, 1, 7, 8), (1, 2, 7, 8)),
        ((2, 1, 2, 5, 8), (3, 1, 7, 8), (1, 3, 2, 7, 8)),
    ],
    ids=str,
)
def test_ranks_and_broadcasting(q, k, v, device):
    compare(*qkv(device, q, k, v))


FULL = (BATCH, HEADS, Q_LEN, KV_LEN)
MASK_SHAPES = [
    tuple(size if keep else 1 for size, keep in zip(FULL, kept, strict=True))
    for kept in itertools.product([True, False], repeat=4)
]
MASK_SHAPES += [FULL[1:], FULL[2:], (1, KV_LEN), (Q_LEN, 1), (HEADS, 1, 1), (1, 1, KV_LEN)]


def make_mask(kind: str, shape: tuple[int, ...], device, dtype=torch.float32) -> torch.Tensor:
    """A mask that leaves every row some key: the last row, and the last entry of each other row, is kept."""
    kept = torch.rand(shape, device=device) < 0.6
    kept[..., -1] = True
    if kind == "bool":
        return kept
    added = torch.randn(shape, device=device).to(dtype)
    return added if kind != "-inf" else added.masked_fill(~kept, -torch.inf)


@pytest.mark.parametrize("kind", ["bool", "-inf"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_of_every_broadcast_shape(shape, kind, device):
    compare(*qkv(device), make_mask(kind, shape, device))


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 5, 7), (2, 1, 3, 5, 7), (1, 2, 1, 1, 7), (2, 1, 5, 1), (3, 5, 7), (5, 7)], ids=str
)
def test_masks_of_rank_five_calls(shape, kind, device):
    """Leading dimensions become one batch, which a mask may follow, share, or cut across."""
    compare(*qkv(device, (2, 2, 3, 5, 8), (2, 2, 3, 7, 8)), make_mask(kind, shape, device))


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("rank", [2, 3])
def test_masks_of_low_rank_calls(rank, kind, device):
    q, k = (2, 5, 8)[3 - rank :], (2, 7, 8)[3 - rank :]
    compare(*qkv(device, q, k), make_mask(kind, (2, 5, 7)[3 - rank :], device))
    compare(*qkv(device, q, k), make_mask(kind, (1, 7), device))


@pytest.mark.oldest
@pytest.mark.parametrize("lengths", [(5, 5), (5, 7), (7, 5), (1, 6), (6, 1), (17, 20)], ids=str)
def test_causal_is_aligned_to_the_top_left(lengths, device):
    q_len, kv_len = lengths
    compare(*qkv(device, (1, 2, q_len, DIM), (1, 2, kv_len, DIM)), is_causal=True)


@pytest.mark.parametrize("heads", [(6, 2), (8, 1), (9, 3), (3, 3)], ids=str)
@pytest.mark.parametrize("lead", [(), (2, 1)], ids=str)
def test_grouped_heads(heads, lead, device):
    q_heads, kv_heads = heads
    tensors = qkv(device, (*lead, q_heads, Q_LEN, DIM), (*lead, kv_heads, KV_LEN, DIM))
    compare(*tensors, enable_gqa=True)
    compare(*tensors, make_mask("bool", (q_heads, 1, KV_LEN), device), enable_gqa=True)


@pytest.mark.parametrize("scale", [0.3, 2, 1.0, 0.0, -0.5, 1e-40, 1e-46])
def test_scale(scale, device):
    compare(*qkv(device), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [None, "causal", "bool", "additive", "additive in fp32"])
def test_half_precision(dtype, kind, device):
    """PyTorch takes an additive mask in the query's dtype or in fp32."""
    tensors = qkv(device, dtype=dtype)
    if kind == "causal":
        compare(*tensors, is_causal=True)
    elif kind is None:
        compare(*tensors)
    else:
        mask_dtype = torch.float32 if kind == "additive in fp32" else dtype
        compare(*tensors, make_mask(kind.removesuffix(" in fp32"), FULL[2:], device, mask_dtype))


@pytest.mark.parametrize("kind", ["bool", "-inf"])
def test_rows_that_see_nothing_are_zero(kind, device):
    mask = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool, device=device)
    mask[2] = mask[4] = False
    if kind == "-inf":
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, -torch.inf)
    got = compare(*qkv(device), mask)
    assert (got[:, :, [2, 4]] == 0).all() and (got[:, :, [0, 1, 3]] != 0).any(dim=-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_most_negative_number_is_no_infinity(dtype, device):
    """A row masked with finfo.min everywhere is an average over all keys, as in PyTorch."""
    query, key, value = qkv(device, dtype=dtype)
    mask = torch.zeros(Q_LEN, KV_LEN, device=device, dtype=torch.float32)
    mask[1, 3:] = mask[2] = torch.finfo(torch.float32).min
    got = compare(query * 0.01, key, value, mask)
    mean = value.double().mean(-2)
    # Scores vanish beside finfo.min in fp32: weights of exactly 1, a sum of 7 values and a division round.
    rounding = (KV_LEN + 4) * U + torch.finfo(dtype).eps / 2
    assert ((got[:, :, 2] - mean).abs() <= rounding * value.double().abs().amax()).all()


@pytest.mark.parametrize(
    "q, k",
    [
        ((2, 3, 0, 8), (2, 3, 7, 8)),
        ((2, 3, 5, 8), (2, 3, 0, 8)),
        ((0, 3, 5, 8), (0, 3, 7, 8)),
        ((0, 8), (0, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
def test_zero_lengths(q, k, causal, device):
    compare(*qkv(device, q, k), is_causal=causal)


def test_transposed_inputs_and_their_memory_order(device):
    """[batch, length, heads, dim] views cost no copy, and the result lies in memory as the query does."""
    query, key, value = (t.transpose(1, 2) for t in qkv(device, (2, 5, 3, 8), (2, 7, 3, 8)))
    got = compare(query, key, value)
    assert got.transpose(1, 2).is_contiguous()


def test_signature_is_pytorchs():
    """PyTorch's function has no Python signature; its documentation opens with it."""
    written = F.scaled_dot_product_attention.__doc__.split("->")[0].strip()
    arguments = ast.parse(f"def {written}: ...").body[0].args
    names = [argument.arg for argument in arguments.args]
    defaults = [ast.literal_eval(default) for default in arguments.defaults]
    ours = inspect.signature(tilewise.scaled_dot_product_attention).parameters
    assert list(ours) == names
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in ours.values())
    assert [p.default for p in ours.values() if p.default is not p.empty] == defaults


def test_every_argument_by_position_and_by_name(device):
    query, key, value = qkv(device)
    given = (query, key, value, torch.zeros(Q_LEN, KV_LEN, device=device), 0.0, False, 0.5, True)
    names = list(inspect.signature(tilewise.scaled_dot_product_attention).parameters)
    by_name = dict(zip(names, given, strict=True))
    F.scaled_dot_product_attention(*given[:6], scale=0.5, enable_gqa=True)
    F.scaled_dot_product_attention(**by_name)
    got = tilewise.scaled_dot_product_attention(*given)
    assert torch.equal(got, tilewise.scaled_dot_product_attention(**by_name))


WRONG = [
    (ValueError, ("dropout_p=-0.1", "0 to 1"), dict(dropout_p=-0.1)),
    (ValueError, ("dropout_p=1.5", "0 to 1"), dict(dropout_p=1.5)),
    (ValueError, ("attn_mask", "is_causal=True", "together"), dict(attn_mask=(5, 7), is_causal=True)),
    (ValueError, ("attn_mask.dtype=torch.int64", "torch.bool"), dict(attn_mask=(7,), of=torch.int64)),
    (ValueError, ("attn_mask.dtype=torch.float64", "query.dtype"), dict(attn_mask=(7,), of=torch.double)),
    (ValueError, ("attn_mask.dtype=torch.float16", "torch.float32"), dict(attn_mask=(7,), of=torch.half)),
    (ValueError, ("attn_mask.shape=(5, 6)", "(2, 3, 5, 7)"), dict(attn_mask=(5, 6))),
    (ValueError, ("attn_mask.shape=(4, 2, 3, 5, 7)", "(2, 3, 5, 7)"), dict(attn_mask=(4, 2, 3, 5, 7))),
    (ValueError, ("attn_mask.shape=(2, 2, 5, 7)", "(2, 3, 5, 7)"), dict(attn_mask=(2, 2, 5, 7))),
    (ValueError, ("query.shape=(8,)", "at least 2 dimensions"), dict(query=(8,))),
    (ValueError, ("query.shape=(2, 6, 5, 8)", "key.shape=(2, 3", "broadcast"), dict(query=(2, 6, 5, 8))),
    (ValueError, ("6 heads over 3", "enable_gqa=True"), dict(query=(2, 6, 5, 8))),
    (ValueError, ("attn_mask.shape=(2, 7)", "attn_mask[:, None, None, :]"), dict(attn_mask=(2, 7))),
    (ValueError, ("attn_mask.shape=(2, 5, 7)", "attn_mask[:, None]"), dict(attn_mask=(2, 5, 7))),
    (ValueError, ("key.shape=(5, 3, 7, 8)", "broadcast"), dict(key=(5, 3, 7, 8), enable_gqa=True)),
    (ValueError, ("q_heads=4", "multiple", "kv_heads=3"), dict(query=(2, 4, 5, 8), enable_gqa=True)),
    (ValueError, ("head_dim", "q: 6", "k: 8"), dict(query=(2, 3, 5, 6))),
    (ValueError, ("lengths", "k: 7", "v: 9"), dict(value=(2, 3, 9, 8))),
    (ValueError, ("scale=nan", "finite"), dict(scale=float("nan"))),
]  # fmt: skip


@pytest.mark.parametrize("error, words, changes", WRONG, ids=[words[0] for _, words, _ in WRONG])
def test_wrong_arguments(error, words, changes, device):
    arguments = dict(query=(2, 3, 5, 8), key=(2, 3, 7, 8), value=(2, 3, 7, 8)) | changes
    dtype = arguments.pop("of", torch.float32)
    for name, given in arguments.items():
        if isinstance(given, tuple):
            arguments[name] = torch.zeros(given, device=device, dtype=dtype if name == "attn_mask" else None)
    with pytest.raises(error) as raised:
        tilewise.scaled_dot_product_attention(**arguments)
    for word in words:
        assert word in str(raised.value)


def test_grouped_heads_are_named_only_where_they_would_do(device):
    for heads, kv_heads in ((4, 3), (3, 6)):
        with pytest.raises(ValueError, match="broadcast") as raised:
            tilewise.scaled_dot_product_attention(
                *qkv(device, (2, heads, Q_LEN, DIM), (2, kv_heads, KV_LEN, DIM))
            )
        assert "enable_gqa" not in str(raised.value)
