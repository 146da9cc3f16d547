"""The backward kernels against float64: every feature alone and with others, on small odd sizes.

What is compared: out, lse and the gradients of q, k, v, the sink and every parameter of a score, given
gradients of both results at once.
"""

import random
from typing import Any

import pytest
import torch

import tilewise
from harness.features import build, judge, of_kind
from harness.gradients import check_gradients
from harness.problem import DTYPES, SMALL, lengths, run
from harness.sanitizer import sanitize
from tilewise import ALiBi, Bias, Causal, Cosine, Dense, Padding, Softcap, Window
from tilewise.kernels.tile import Tile

MASKS = [entry.name for entry in of_kind("mask")]
SCORES = [entry.name for entry in of_kind("score")]
# q_len, kv_len: none a multiple of a tile; equal, decoding with a cache, and more queries than keys.
LENGTHS = ((33, 33), (19, 37), (37, 19))


def draw(device: torch.device, *features: str, seed: object = 0, **sizes: Any) -> None:
    run(device, *features, seed=seed, backward=True, **(SMALL | sizes))


# ---- Masks and scores


@pytest.mark.parametrize("pair", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_mask(device, mask, pair):
    dtype = DTYPES[(MASKS.index(mask) + LENGTHS.index(pair)) % 3]
    draw(device, mask, dtype, seed=pair, **lengths(device, pair))


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_interval_masks_at_once(device, dtype):
    p = build(device, random.Random(1), [dtype], **(SMALL | lengths(device, (33, 45))))
    p.mask = Causal("bottom_right") & Window(25, 3, "bottom_right") & Padding(p.kv_len - 4)
    p.mask = p.mask & tilewise.Prefix(p.kv_len // 3, "bottom_right")
    judge(p, backward=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_score(device, score, dtype):
    draw(device, score, dtype, seed=dtype, **lengths(device, LENGTHS[DTYPES.index(dtype)]))


@pytest.mark.in_turns
@pytest.mark.parametrize("first, second", [(a, b) for a in SCORES for b in SCORES if a != b])
def test_scores_apply_in_order(device, first, second):
    draw(device, first, second, DTYPES[SCORES.index(first) % 3], batch=1)


@pytest.mark.in_turns
@pytest.mark.parametrize(
    "mask, score", [(m, SCORES[(i + j) % 5]) for i, m in enumerate(MASKS) for j in (0, 2)]
)
def test_mask_with_score(device, mask, score):
    dtype = DTYPES[(MASKS.index(mask) + SCORES.index(score)) % 3]
    draw(device, mask, score, dtype, batch=1, q_len=19, kv_len=35)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # fp16 has no ε to normalise rows of 0 by
def test_everything_at_once(device, dtype):
    """Each gradient goes to the tensor that it belongs to, with others of all kinds around it."""
    p = build(device, random.Random(2), [dtype, "relative_position", "user_score", "alibi"], **SMALL)
    p.scores = [Softcap(3.0), *p.scores, Bias(p.randn(2, 1, 17, 20))]
    p.mask = (
        Padding(p.integers(9, 20, 2))
        & Causal("bottom_right")
        & tilewise.Documents(p.integers(0, 1, 17), p.integers(0, 1, 20))
    )
    p.arguments = {
        "similarity": Cosine(3 * p.randn(2)),
        "scale": 2 * p.randn(),
        "sink": p.randn(2),
        "bias": p.randn(1, 2, 1, 20),
        "dropout_p": 0.3,
        "dropout_seed": torch.tensor([7], device=device),
    }
    got = judge(p, backward=True)
    assert len(got) == 3 + 8 and all(gradient.any() for gradient in got.values())


# ---- Similarity, scale, sink


@pytest.mark.in_turns
@pytest.mark.parametrize("similarity", ["scaled_dot", "dot", "cosine", "a number", "a tensor"])
@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0, "tensor", "half tensor"])
def test_similarity_with_scale(device, similarity, scale):
    p = build(device, random.Random(4), [DTYPES[len(str(scale)) % 3]], **SMALL)
    if isinstance(scale, str):
        scale = torch.tensor(-0.7, device=device, dtype=torch.float16 if "half" in scale else torch.float32)
    temperature = {"a number": 4.0, "a tensor": torch.tensor([5.0, -2.0], device=device)}.get(similarity)
    p.arguments = {"similarity": similarity if temperature is None else Cosine(temperature), "scale": scale}
    p.batch = 1
    judge(p, backward=True)


@pytest.mark.in_turns
@pytest.mark.parametrize("score", ["softcap", "alibi", "bias_modifier"])
@pytest.mark.parametrize("similarity", ["dot", "cosine", "cosine_with_temperature"])
def test_similarity_with_tensor_scale_and_score(device, similarity, score):
    draw(device, similarity, "tensor_scale", score, "causal", DTYPES[SCORES.index(score) % 3], batch=1)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES)
def test_sink(device, dtype):
    draw(device, "sink", "window", dtype)
    p = build(device, random.Random(5), [dtype], **SMALL)
    for logit in (40.0, -40.0, -torch.inf):  # takes all weight, takes none
        p.arguments["sink"] = torch.tensor([1.0, logit], device=device)
        judge(p, backward=True)


# ---- Sizes and layouts


@pytest.mark.in_turns
@pytest.mark.parametrize("value_dim", ["equal", "smaller", "larger"])
@pytest.mark.parametrize("head_dim", [1, 3, 16, 20, 64, 80, 128, 255, 256])
def test_dims(device, head_dim, value_dim):
    other = {"equal": head_dim, "smaller": -(-head_dim // 3), "larger": min(256, head_dim + 37)}[value_dim]
    sizes = {"batch": 1, "q_heads": 1, "q_len": 17, "kv_len": 35, "head_dim": head_dim, "value_dim": other}
    draw(device, DTYPES[(head_dim + other) % 3], "causal", **sizes)


@pytest.mark.parametrize("q_heads, kv_heads", [(6, 2), (8, 1), (9, 3), (1, 1), (3, 3), (6, 3), (5, 1)])
def test_heads(device, q_heads, kv_heads):
    sizes = SMALL | {"batch": 2 if q_heads < 6 else 1, "q_heads": q_heads, "kv_heads": kv_heads}
    p = build(device, random.Random(13), ["alibi", "float16"], **sizes)
    p.mask = Dense(p.randn(q_heads, p.q_len, p.kv_len) > -0.5)
    judge(p, backward=True)


@pytest.mark.in_turns
@pytest.mark.parametrize("q_len, kv_len", [(0, 0), (0, 7), (7, 0), (1, 1), (1, 20), (20, 1)])
@pytest.mark.parametrize(
    "features",
    [
        "",
        "causal sink",
        "bias sink dropout",
        "cosine scattered_documents user_score",
        "relative_position alibi",
    ],
)
def test_lengths_of_zero_and_one(device, q_len, kv_len, features):
    p = build(device, random.Random(14), features.split(), **(SMALL | {"q_len": q_len, "kv_len": kv_len}))
    judge(p, backward=True)


@pytest.mark.parametrize("features", ["", "bias sink relative_position", "alibi tensor_scale cosine"])
def test_no_sequence(device, features):
    p = build(device, random.Random(15), ["no_batch", *features.split()], **(SMALL | {"batch": 0}))
    assert not any(gradient.any() for gradient in judge(p, backward=True).values())


@pytest.mark.in_turns
@pytest.mark.parametrize("q_len", [15, 16, 32, 33])
@pytest.mark.parametrize("kv_len", [16, 17, 48])
def test_lengths_around_tiles_with_both_causal_corners(device, q_len, kv_len):
    p = build(
        device, random.Random(16), ["bfloat16"], q_len=q_len, kv_len=kv_len, batch=1, q_heads=1, kv_heads=1
    )
    for align in ("bottom_right", "top_left"):
        p.mask = Causal(align)
        judge(p, backward=True)


@pytest.mark.in_turns
@pytest.mark.parametrize("tile_q", [16, 32, 64])
@pytest.mark.parametrize("tile_kv", [16, 32, 64])
def test_tiles(device, tile_q, tile_kv):
    sizes = {"batch": 1, "q_heads": 2, "kv_heads": 1, "tile": Tile(tile_q, tile_kv)} | lengths(
        device, (45, 71)
    )
    draw(device, "window", "causal", "bias_modifier", "softcap", "dropout", "float16", **sizes)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_the_table(device, dtype):
    sizes = {"batch": 1, "q_heads": 2, "kv_heads": 1, "tile": None} | lengths(device, (70, 90))
    run(device, dtype, "causal", "bias", backward=True, **sizes)


@pytest.mark.in_turns
@pytest.mark.parametrize("layout", [entry.name for entry in of_kind("layout")])
@pytest.mark.parametrize("dims", [(16, 16), (20, 24)], ids=str)
def test_layout(device, layout, dims):
    """q, k, v and dO in each layout."""
    dtype = DTYPES[(len(layout) + dims[0]) % 3]
    draw(device, layout, dtype, "causal", head_dim=dims[0], value_dim=dims[1], kv_heads=2)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
def test_expanded(device, axes):
    """Stride 0 along each dimension of q, k, v, dO, bias, sink, slopes and temperature."""

    def expanded(*shape: int) -> torch.Tensor:
        sizes = [1 if axis in axes else n for axis, n in enumerate(shape)]
        return torch.randn(sizes, device=device).expand(shape)

    q, k, v, do = (
        expanded(2, 2, 17, 20),
        expanded(2, 1, 20, 20),
        expanded(2, 1, 20, 24),
        expanded(2, 2, 17, 24),
    )
    one = torch.randn(3, 1, device=device).expand(3, 2)
    arguments = dict(bias=expanded(2, 2, 17, 20), sink=one[0], similarity=Cosine(one[1]), score=ALiBi(one[2]))
    with tilewise.tiles.use(Tile(16, 16)), sanitize():
        check_gradients(q, k, v, do, **arguments)


def test_sum_backward(device):
    """out.sum().backward() hands on a dO whose strides are all 0."""
    q, k, v = (torch.randn(1, 2, 20, 20, device=device, requires_grad=True) for _ in range(3))
    with tilewise.tiles.use(Tile(16, 16)), sanitize():
        tilewise.attention(q, k, v, mask=Causal(), impl="portable").sum().backward()
        ones = check_gradients(
            q, k, v, torch.ones_like(q), torch.zeros(1, 2, 20, device=device), mask=Causal()
        )
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        assert torch.equal(x.grad, ones[name]), name


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)], ids=str)
def test_gradients_have_the_memory_order_of_their_tensors(device, order):
    """A caller who transposed [batch, length, heads, dim] inputs transposes back without a copy."""
    inverse = [order.index(axis) for axis in range(3)]

    def stored(*sizes: int) -> torch.Tensor:
        x = torch.randn(*(sizes[axis] for axis in order), 16, device=device).permute(*inverse, 3)
        return x.detach().requires_grad_()

    q, k, v = stored(2, 4, 17), stored(2, 2, 20), stored(2, 2, 20)
    tilewise.attention(q, k, v, impl="portable").sum().backward()
    for x in (q, k, v):
        assert x.grad.permute(*order, 3).is_contiguous()


# ---- Rows without a key


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_key(device, dtype):
    p = build(device, random.Random(17), [dtype, "sink"], **(SMALL | {"q_len": 40, "kv_len": 17}))
    p.mask = Causal()  # bottom right: the first 23 rows stand before every key
    p.arguments["bias"] = p.randn(2, 40, 17)
    got = judge(p, backward=True)
    assert not got["q"][:, :, :23].any() and not got["Bias.bias (1)"][:, :23].any()
    p.arguments["bias"] = p.randn(2, 40, 1)
    del p.arguments["sink"]
    got = judge(p, backward=True)
    assert not got["q"][:, :, :23].any() and not got["Bias.bias (0)"][:, :23].any()
    p.mask = Padding(0)
    assert not any(gradient.any() for gradient in judge(p, backward=True).values())


def test_rows_without_a_key_and_a_sink_of_minus_infinity(device):
    """Such a row has no weight at all, and its sink no gradient: not -inf - -inf."""
    p = build(device, random.Random(18), [], **(SMALL | {"q_len": 40, "kv_len": 17}))
    p.mask = Causal()  # bottom right: the first 23 rows stand before every key
    p.arguments["sink"] = torch.tensor([0.5, -torch.inf], device=device)
    assert judge(p, backward=True)["sink (0)"][1] == 0
