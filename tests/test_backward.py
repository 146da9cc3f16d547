"""The backward kernels against float64: every feature alone and with others, on small odd sizes.

What is compared: out, lse and the gradients of q, k, v, the sink and every parameter of a score, given
gradients of both results at once.
"""

import itertools
import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from harness.features import FEATURES, Problem, block_interval, build, of_kind
from harness.gradients import check_gradients
from harness.oracle import kept_pairs
from harness.problem import keeps_pairs, lengths, run
from harness.sanitizer import sanitize
from tilewise import (
    ALiBi,
    Bias,
    Causal,
    Cosine,
    Dense,
    Padding,
    RelativePosition,
    Softcap,
    UserMask,
    UserScore,
    Window,
)
from tilewise.kernels.tile import Tile
from tilewise.plan.request import make_request

DTYPES = ("float32", "float16", "bfloat16")
MASKS = [entry.name for entry in of_kind("mask")]
SCORES = [entry.name for entry in of_kind("score")]
# q_len, kv_len: none a multiple of a tile; equal, decoding with a cache, and more queries than keys.
LENGTHS = ((33, 33), (19, 37), (37, 19))
SMALL = {"batch": 2, "q_heads": 2, "kv_heads": 1, "q_len": 17, "kv_len": 20}
U = torch.finfo(torch.float32).eps / 2


def judge(p: Problem) -> dict[str, torch.Tensor]:
    """Hold the gradients of this problem against float64, every address checked; returns them by name."""
    with tilewise.tiles.use(p.tile), sanitize():
        return check_gradients(*p.tensors(), p.gradient_of_out(), **p.keywords())


def draw(device: torch.device, *features: str, seed: object = 0, **sizes: Any) -> None:
    """Judge a small problem that has these features and keeps some pairs."""
    for attempt in range(100):
        p = build(device, random.Random(str((features, seed, attempt))), features, **(SMALL | sizes))
        if keeps_pairs(p):
            judge(p)
            return
    raise AssertionError(f"no pair counts under {features} in 100 draws")


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
    p.mask = Causal() & Window(25, 3) & tilewise.Prefix(p.kv_len // 3) & Padding(p.kv_len - 4)
    judge(p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_score(device, score, dtype):
    draw(device, score, dtype, seed=dtype, **lengths(device, LENGTHS[DTYPES.index(dtype)]))


@pytest.mark.parametrize("first, second", [(a, b) for a in SCORES for b in SCORES if a != b])
def test_scores_apply_in_order(device, first, second):
    draw(device, first, second, DTYPES[SCORES.index(first) % 3], batch=1)


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
        & Causal()
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
    got = judge(p)
    assert len(got) == 3 + 8 and all(gradient.any() for gradient in got.values())


# ---- Similarity, scale, sink


@pytest.mark.parametrize("similarity", ["scaled_dot", "dot", "cosine", "a number", "a tensor"])
@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0, "tensor", "half tensor"])
def test_similarity_with_scale(device, similarity, scale):
    p = build(device, random.Random(4), [DTYPES[len(str(scale)) % 3]], **SMALL)
    if isinstance(scale, str):
        scale = torch.tensor(-0.7, device=device, dtype=torch.float16 if "half" in scale else torch.float32)
    temperature = {"a number": 4.0, "a tensor": torch.tensor([5.0, -2.0], device=device)}.get(similarity)
    p.arguments = {"similarity": similarity if temperature is None else Cosine(temperature), "scale": scale}
    p.batch = 1
    judge(p)


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
        judge(p)


# ---- Bias


def broadcast_shape(axes: str, sizes: tuple[int, ...] = (2, 2, 17, 20)) -> tuple[int, ...]:
    return tuple(size if axis in axes else 1 for axis, size in zip("bhqk", sizes, strict=True))


SUBSETS = ["".join(axes) for n in range(5) for axes in itertools.combinations("bhqk", n)]


@pytest.mark.parametrize("axes", SUBSETS)
def test_bias_that_broadcasts(device, axes):
    """Sums over each set of dimensions along which a bias has size 1."""
    p = build(device, random.Random(axes), [DTYPES[SUBSETS.index(axes) % 3]], **SMALL)
    bias = p.randn(
        *broadcast_shape(axes), dtype=(torch.float32, torch.float16, torch.bfloat16)[len(axes) % 3]
    )
    p.arguments, p.mask = {"bias": bias}, Causal()
    assert judge(p)["Bias.bias (0)"].shape == bias.shape


@pytest.mark.parametrize("shape", [(), (20,), (1,), (17, 1), (17, 20), (2, 1, 20), (2, 17, 20)], ids=str)
def test_bias_of_lower_rank(device, shape):
    p = build(device, random.Random(6), [], **SMALL)
    p.arguments = {"bias": p.randn(*shape)}
    judge(p)


@pytest.mark.parametrize("view", ["transposed", "sliced", "every other", "expanded rows", "expanded heads"])
def test_bias_in_any_layout(device, view):
    p = build(device, random.Random(7), ["float16"], **SMALL)
    x = p.randn(2, 2, 17, 20)
    if view == "transposed":
        x = p.randn(20, 2, 17, 2).permute(3, 1, 2, 0)
    elif view == "sliced":
        x = torch.full((2, 3, 20, 29), torch.nan, device=device)[:, 1:, 2:19, 5:25].copy_(x)
    elif view == "every other":
        x = torch.full((2, 2, 34, 60), torch.nan, device=device)[:, :, 1::2, 2::3].copy_(x)
    else:
        x = (x[:, :, :1] if view == "expanded rows" else x[:, :1]).expand(2, 2, 17, 20)
    p.arguments = {"bias": x}
    judge(p)


def test_several_biases_between_modifiers(device):
    p = build(device, random.Random(8), [], **SMALL)
    p.scores = [Bias(p.randn(2, 1, 20)), Softcap(2.0), Bias(p.randn(17, 20)), Softcap(1.5)]
    p.arguments = {"bias": p.randn(2, 2, 17, 1), "scale": 0.5}
    assert len(judge(p)) == 6


# ---- Slopes, tables, parameters of one's own


@pytest.mark.parametrize("shape", [(2,), (2, 2), (1, 2), (2, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_slopes(device, shape, align):
    p = build(
        device, random.Random(9), [], **(SMALL | {"q_len": 20, "kv_len": 17 if align == "top_left" else 33})
    )
    p.scores = [ALiBi(p.randn(*shape), align)]
    judge(p)


TABLES = [  # buckets, max_distance: reached by both lengths; beyond them; below them; one bucket of each side
    (8, 12),
    (32, 128),
    (12, 7),
    (4, 5),
]


@pytest.mark.parametrize("pair", LENGTHS[1:], ids=str)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("table", [0, 1], ids=["near", "far"])
def test_table(device, table, bidirectional, align, pair):
    buckets, max_distance = TABLES[2 * table + (align == "top_left")]
    p = build(device, random.Random(10), [], **(SMALL | {"batch": 1} | lengths(device, pair)))
    p.scores = [RelativePosition(p.randn(2, buckets), max_distance, bidirectional, align)]
    p.mask = Causal() if bidirectional else None
    judge(p)


@triton.jit
def stretch_factor(s, batch, head, q_idx, kv_idx, args):
    ptr, by_batch, by_head, by_q, by_kv = args
    return 1.0 + tl.load(ptr + batch * by_batch + head * by_head + q_idx * by_q + kv_idx * by_kv)


@triton.jit
def stretch_score(s, batch, head, q_idx, kv_idx, args):
    return s * stretch_factor(s, batch, head, q_idx, kv_idx, args)


@triton.jit
def stretch_by_parameter(s, batch, head, q_idx, kv_idx, args):
    return s


def stretch_twin(s, batch, head, q_idx, kv_idx, parameter, by_batch, by_head, by_q, by_kv):
    index = batch * by_batch + head * by_head + q_idx * by_q + kv_idx * by_kv
    return s * (1 + parameter.flatten()[index].to(s.dtype))


def stretch(parameter: torch.Tensor, axes: str) -> UserScore:
    """s · (1 + parameter), the parameter's dimensions being these axes."""
    strides = dict(zip(axes, parameter.stride(), strict=True))
    return UserScore(
        stretch_score,
        (parameter, *(strides.get(axis, 0) for axis in "bhqk")),
        twin=stretch_twin,
        derivative=stretch_factor,
        parameters={0: (axes, stretch_by_parameter)},
    )


@pytest.mark.parametrize("axes", SUBSETS)
def test_parameters_of_a_user_score(device, axes):
    p = build(device, random.Random(axes), [DTYPES[SUBSETS.index(axes) % 3]], **SMALL)
    shape = [size for axis, size in zip("bhqk", (2, 2, 17, 20), strict=True) if axis in axes]
    p.scores = [stretch(p.randn(*shape), axes), Softcap(4.0)]
    judge(p)


@triton.jit
def line_score(s, batch, head, q_idx, kv_idx, args):
    return s * tl.load(args[1] + head) + tl.load(args[2] + kv_idx)


@triton.jit
def line_slope(s, batch, head, q_idx, kv_idx, args):
    return tl.load(args[1] + head)


@triton.jit
def line_by_slope(s, batch, head, q_idx, kv_idx, args):
    return s


def line_twin(s, batch, head, q_idx, kv_idx, unused, slope, offset):
    return s * slope[head].to(s.dtype) + offset[kv_idx].to(s.dtype)


def test_two_parameters_of_one_user_score(device):
    """Positions count arguments of every kind; a derivative of None stands for 1."""
    p = build(device, random.Random(11), [], **SMALL)
    parameters = {2: ("k", None), 1: ("h", line_by_slope)}
    args = (3, p.randn(2), p.randn(20))
    p.scores = [UserScore(line_score, args, twin=line_twin, derivative=line_slope, parameters=parameters)]
    got = judge(p)
    assert [tuple(gradient.shape) for gradient in got.values()][3:] == [(2,), (20,)]


@triton.jit
def tabled_keep(q_idx, kv_idx, batch, head, args):
    return tl.load(args[1][0] + kv_idx) != 0


def test_tensors_in_nested_arguments_do_not_shift_gradients(device):
    """args may hold tuples, of which the library sees no more than a function that reads them."""
    p = build(device, random.Random(12), [], **SMALL)
    kept = torch.arange(20, device=device) % 3
    (q, k, v), bias, gradients = p.tensors(), p.randn(17, 20), []
    for mask in (UserMask(tabled_keep, (1, (kept, 2))), Dense(kept != 0)):
        leaf = bias.clone().requires_grad_()
        out = tilewise.attention(q, k, v, mask=mask, bias=leaf, impl="portable")
        gradients.append(torch.autograd.grad(out.sum(), leaf, allow_unused=True)[0])
    assert gradients[0] is not None, "the bias has no gradient at all"
    assert torch.equal(*gradients)


# ---- Sizes and layouts


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
    judge(p)


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
    judge(p)


@pytest.mark.parametrize("features", ["", "bias sink relative_position", "alibi tensor_scale cosine"])
def test_no_sequence(device, features):
    p = build(device, random.Random(15), ["no_batch", *features.split()], **(SMALL | {"batch": 0}))
    assert not any(gradient.any() for gradient in judge(p).values())


@pytest.mark.parametrize("q_len", [15, 16, 32, 33])
@pytest.mark.parametrize("kv_len", [16, 17, 48])
def test_lengths_around_tiles_with_both_causal_corners(device, q_len, kv_len):
    p = build(
        device, random.Random(16), ["bfloat16"], q_len=q_len, kv_len=kv_len, batch=1, q_heads=1, kv_heads=1
    )
    for align in ("bottom_right", "top_left"):
        p.mask = Causal(align)
        judge(p)


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


# ---- What is asked for


TRAINED = ("q", "k", "v", "bias", "sink", "scale")


def leaves(device: torch.device, trained: tuple[str, ...] = TRAINED) -> dict[str, torch.Tensor]:
    """A call in which these tensors require a gradient."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, 2, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8), (2, 5, 7), (2,), ())
    made = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return {name: x.requires_grad_(name in trained) for name, x in zip(TRAINED, made, strict=True)}


def attend(tensors: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tilewise.attention(**tensors, mask=Causal(), **options, return_lse=True, impl="portable")


def results_gradients(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(shape, generator=generator).to(device) for shape in ((1, 2, 5, 8), (1, 2, 5)))


def test_every_subset_of_requires_grad(device):
    """Whatever else is trained, a gradient has the same bits; what is not trained has none."""
    everything = leaves(device)
    torch.autograd.backward(attend(everything), results_gradients(device))
    for n in range(1, len(TRAINED)):
        for subset in itertools.combinations(TRAINED, n):
            tensors = leaves(device, subset)
            torch.autograd.backward(attend(tensors), results_gradients(device))
            for name, tensor in tensors.items():
                assert (tensor.grad is not None) == (name in subset), f"{name} of {subset}"
                assert name not in subset or torch.equal(tensor.grad, everything[name].grad), (
                    f"{name} of {subset}"
                )
    out, lse = attend(leaves(device, ()))
    assert not out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("part", ["out", "lse", "both"])
def test_gradient_of_each_result(device, part):
    """Of out alone, of lse alone, of both: a result without a gradient counts as one whose gradient is 0."""
    tensors, (do, dlse) = leaves(device), results_gradients(device)
    do, dlse = do * (part != "lse"), dlse * (part != "out")
    out, lse = attend(tensors)
    results = {"out": ([out], [do]), "lse": ([lse], [dlse]), "both": ([out, lse], [do, dlse])}[part]
    torch.autograd.backward(*results)
    arguments = {name: x.detach().clone() for name, x in tensors.items() if name not in "qkv"}
    want = check_gradients(*(tensors[name].detach() for name in "qkv"), do, dlse, mask=Causal(), **arguments)
    order = ["q", "k", "v", "scale", "sink", "bias"]
    for name, gradient in zip(order, want.values(), strict=True):
        assert torch.equal(tensors[name].grad, gradient), name
        assert gradient.any() == (part != "lse" or name != "v"), f"{name} shows nothing"


def test_without_return_lse_the_gradient_is_that_of_out(device):
    one, other, (do, _) = leaves(device), leaves(device), results_gradients(device)
    tilewise.attention(**one, mask=Causal(), impl="portable").backward(do)
    attend(other)[0].backward(do)
    for name in TRAINED:
        assert torch.equal(one[name].grad, other[name].grad), name


def test_backward_twice_gives_the_same_bits_and_accumulates(device):
    tensors = leaves(device)
    results, gradients = attend(tensors), results_gradients(device)
    torch.autograd.backward(results, gradients, retain_graph=True)
    first = {name: x.grad.clone() for name, x in tensors.items()}
    torch.autograd.backward(results, gradients)
    for name, x in tensors.items():
        assert torch.equal(x.grad, 2 * first[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.backward(results, gradients)


def test_inputs_changed_in_place_are_refused(device):
    tensors = leaves(device, ("k",))
    out, _ = attend(tensors)
    tensors["bias"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_q_k_and_v_of_one_tensor_sum_their_gradients(device):
    x = torch.randn(1, 2, 20, 16, device=device)
    do, dlse = torch.randn(1, 2, 20, 16, device=device), torch.randn(1, 2, 20, device=device)
    apart = check_gradients(x.clone(), x.clone(), x.clone(), do, dlse)
    x.requires_grad_()
    torch.autograd.backward(tilewise.attention(x, x, x, return_lse=True, impl="portable"), (do, dlse))
    parts = torch.stack(list(apart.values())).double()
    assert ((x.grad - parts.sum(0)).abs() <= 2 * U * parts.abs().sum(0)).all()  # two additions round


def test_a_bias_given_twice_sums_its_gradients(device):
    """As two modifiers of one call, and in two calls."""
    tensors, (do, dlse) = leaves(device), results_gradients(device)
    bias, q, k, v = (tensors[name].detach() for name in ("bias", "q", "k", "v"))
    apart = check_gradients(q, k, v, do, dlse, score=[Bias(bias.clone()), Softcap(2.0)], bias=bias.clone())
    one, other = list(apart.values())[3:]
    bias.requires_grad_()
    call = dict(return_lse=True, impl="portable")
    results = tilewise.attention(q, k, v, score=[Bias(bias), Softcap(2.0)], bias=bias, **call)
    torch.autograd.backward(results, (do, dlse))
    assert not torch.equal(one, other) and torch.equal(bias.grad, one + other)

    bias.grad = None
    first = torch.autograd.grad(tilewise.attention(q, k, v, bias=bias, **call), bias, (do, dlse))[0]
    second = torch.autograd.grad(tilewise.attention(q, v, k, bias=bias, **call), bias, (do, dlse))[0]
    results = (
        *tilewise.attention(q, k, v, bias=bias, **call),
        *tilewise.attention(q, v, k, bias=bias, **call),
    )
    torch.autograd.backward(results, (do, dlse, do, dlse))
    assert torch.equal(bias.grad, first + second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_key(device, dtype):
    p = build(device, random.Random(17), [dtype, "sink"], **(SMALL | {"q_len": 40, "kv_len": 17}))
    p.mask = Causal()  # bottom right: the first 23 rows stand before every key
    p.arguments["bias"] = p.randn(2, 40, 17)
    got = judge(p)
    assert not got["q"][:, :, :23].any() and not got["Bias.bias (1)"][:, :23].any()
    p.arguments["bias"] = p.randn(2, 40, 1)
    del p.arguments["sink"]
    got = judge(p)
    assert not got["q"][:, :, :23].any() and not got["Bias.bias (0)"][:, :23].any()
    p.mask = Padding(0)
    assert not any(gradient.any() for gradient in judge(p).values())


# ---- Tiles that a mask rules out


@triton.jit
def count_tile(q_idx, kv_idx, counts_ptr, tile_q, tile_kv, kv_tiles):
    tile = tl.min(tl.min(q_idx, 1), 0) // tile_q * kv_tiles + tl.min(tl.min(kv_idx, 1), 0) // tile_kv
    tl.atomic_add(counts_ptr + tile, 1)


@triton.jit
def same_score(s, batch, head, q_idx, kv_idx, args):
    return s


@triton.jit
def counting_derivative(s, batch, head, q_idx, kv_idx, args):
    count_tile(q_idx, kv_idx, args[0], args[1], args[2], args[3])
    return 1.0


@triton.jit
def counting_keep(q_idx, kv_idx, batch, head, args):
    count_tile(q_idx, kv_idx, args[1], args[2], args[3], args[4])
    return q_idx // args[0] == kv_idx // args[0]


def block_twin(batch, head, q_idx, kv_idx, size, *counter):
    return q_idx // size == kv_idx // size


def tiles_of(keep: torch.Tensor, tile: Tile) -> list[list[torch.Tensor]]:
    """keep [q_len, kv_len] cut into tiles."""
    return [list(rows.split(tile.tile_kv, dim=1)) for rows in keep.split(tile.tile_q)]


def walked(device, tile, kernel, change):
    """Run one kernel of the backward on one head; returns which pairs count and how often a counter that
    `change` built into the problem saw each tile."""
    p = build(device, random.Random(11), [], batch=1, q_heads=1, kv_heads=1, q_len=77, kv_len=90, tile=tile)
    counts = torch.zeros(-(-77 // tile.tile_q), -(-90 // tile.tile_kv), dtype=torch.int32, device=device)
    change(p, (counts, tile.tile_q, tile.tile_kv, counts.shape[1]))
    q, k, v = p.tensors()
    bias = torch.zeros(77, 90, device=device)
    p.scores.insert(0, Bias(bias))
    {"dq": q, "dkv": k, "parameter": bias}[kernel].requires_grad_()
    with tilewise.tiles.use(tile):
        out = tilewise.attention(q, k, v, **p.keywords(), impl="portable")
        of_forward = counts.clone()
        out.sum().backward()
    counts -= of_forward
    return kept_pairs(make_request(q, k, v, **p.keywords()))[0, 0], counts.tolist()


def visited_tiles(keep: torch.Tensor, tile: Tile) -> list[list[bool]]:
    """For each tile of rows, the tiles of keys from the first to the last that hold a pair."""
    visited = []
    for row in tiles_of(keep, tile):
        held = [i for i, pairs in enumerate(row) if pairs.any()]
        visited.append([bool(held) and held[0] <= i <= held[-1] for i in range(len(row))])
    return visited


def walk_of(kernel: str, visited: list[list[bool]]) -> list[list[bool]]:
    """The tiles that a kernel walks: dkv those of rows from the first to the last that visit its keys."""
    if kernel != "dkv":
        return visited
    columns = []
    for column in zip(*visited, strict=True):
        held = [i for i, visits in enumerate(column) if visits]
        columns.append([bool(held) and held[0] <= i <= held[-1] for i in range(len(column))])
    return [list(row) for row in zip(*columns, strict=True)]


SKIPPING = [
    ["causal"],
    ["window"],
    ["prefix"],
    ["documents"],
    ["left_padding"],
    ["intervals"],
    ["user_interval"],
]
SKIPPING += [["scattered_documents"], ["causal", "window"], ["prefix", "left_padding", "window"]]
WALKS = [(kernel, tile) for kernel in ("dkv", "dq") for tile in (Tile(32, 16), Tile(16, 32))]
WALKS += [("parameter", Tile(32, 32))]


@pytest.mark.parametrize("kernel, tile", WALKS, ids=str)
def test_tiles_outside_a_mask_are_not_visited(device, kernel, tile):
    for masks in SKIPPING:

        def change(p: Problem, counter: tuple[Any, ...], masks: list[str] = masks) -> None:
            for name in masks:
                FEATURES[name].apply(p)
            p.scores = [UserScore(same_score, counter, twin=lambda s, *_: s, derivative=counting_derivative)]

        keep, counts = walked(device, tile, kernel, change)
        wanted = walk_of(kernel, visited_tiles(keep, tile))
        assert counts == [[int(visits) for visits in row] for row in wanted], masks


@pytest.mark.parametrize("kernel, tile", WALKS[:-1], ids=str)
def test_tiles_in_which_every_pair_counts_are_not_masked(device, kernel, tile):
    """A user's function is asked about the tiles that a mask cuts, and about no other."""

    def change(p: Problem, counter: tuple[Any, ...]) -> None:
        p.mask = UserMask(counting_keep, (64, *counter), interval=block_interval, twin=block_twin)
        p.add_mask(Causal())

    keep, counts = walked(device, tile, kernel, change)
    whole = [
        [bool(x.all()) and x.shape == (tile.tile_q, tile.tile_kv) for x in row]
        for row in tiles_of(keep, tile)
    ]
    if kernel == "dq":  # rows beyond q_len are not written, so they need no mask
        whole = [[bool(x.all()) and x.shape[1] == tile.tile_kv for x in row] for row in tiles_of(keep, tile)]
    wanted = walk_of(kernel, visited_tiles(keep, tile))
    assert any(map(any, whole))
    assert counts == [
        [int(visits and not full) for visits, full in zip(*rows, strict=True)]
        for rows in zip(wanted, whole, strict=True)
    ]


# ---- What is refused


@triton.jit
def halve(s, batch, head, q_idx, kv_idx, args):
    return 0.5 * s


@triton.jit
def offset_keep(q_idx, kv_idx, batch, head, args):
    return kv_idx > tl.load(args[0])


def test_a_user_score_without_derivative(device):
    q, k, v = (torch.randn(1, 1, 4, 8, device=device) for _ in range(3))
    score = UserScore(halve, twin=lambda s, *_: 0.5 * s)
    want = tilewise.attention(q, k, v, score=score, impl="portable")
    q.requires_grad_()
    with pytest.raises(ValueError, match="has no derivative"):
        tilewise.attention(q, k, v, score=score, impl="portable")
    assert "halve" in tilewise.why_not(q, k, v, score=score, impl="portable")[0]
    with torch.no_grad():
        assert torch.equal(tilewise.attention(q, k, v, score=score, impl="portable"), want)
    tilewise.attention(q, k, v, score=score, impl="torch").sum().backward()
    assert q.grad.any()


def test_trained_arguments_without_a_derivative(device):
    q, k, v = (torch.randn(1, 2, 4, 8, device=device) for _ in range(3))
    for trained in (1, 2):
        args = (3, torch.randn(2, device=device), torch.randn(4, device=device))
        args[trained].requires_grad_()
        parameters = {3 - trained: ("k" if trained == 1 else "h", None)}
        score = UserScore(line_score, args, derivative=line_slope, parameters=parameters)
        with pytest.raises(ValueError, match=rf"args\[{trained}\] requires a gradient"):
            tilewise.attention(q, k, v, score=score, impl="portable")
    threshold = torch.zeros(1, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"UserMask.args\[0\] requires a gradient, and a mask has none"):
        tilewise.attention(q, k, v, mask=UserMask(offset_keep, (threshold,)), impl="portable")


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({3: ("h", None)}, "key 3"),
        ({-1: ("h", None)}, "key -1"),
        ({0: ("h", None)}, "key 0"),  # a number
        ({1: ("x", None)}, "axes 'x'"),
        ({1: ("hh", None)}, "axes 'hh'"),
        ({1: ("kq", None)}, "axes 'kq'"),
    ],
)
def test_bad_parameters_of_a_user_score(parameters, message):
    with pytest.raises(ValueError, match=message):
        UserScore(line_score, (3, torch.zeros(2), torch.zeros(4)), parameters=parameters)


@pytest.mark.parametrize("axes", ["", "k", "q", "bh", "hk"])
def test_parameters_whose_shape_misfits_their_axes(device, axes):
    q, k, v = (torch.randn(1, 2, n, 8, device=device) for n in (3, 4, 4))
    args = (3, torch.zeros(2, device=device), torch.zeros(4, device=device))
    score = UserScore(line_score, args, derivative=line_slope, parameters={1: (axes, line_by_slope)})
    with pytest.raises(ValueError, match=rf"args\[1\].shape=\(2,\) must be .*axes '{axes}'"):
        tilewise.attention(q, k, v, score=score, impl="portable")


@pytest.mark.parametrize("name", TRAINED)
def test_second_order_raises(device, name):
    """Whichever tensor alone is trained: never a gradient that is silently 0."""
    tensors = leaves(device, (name,))
    out, lse = attend(tensors)
    (gradient,) = torch.autograd.grad(out.square().sum() + lse.sum(), tensors[name], create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        gradient.square().sum().backward()


def test_rows_without_a_key_and_a_sink_of_minus_infinity(device):
    """Such a row has no weight at all, and its sink no gradient: not -inf - -inf."""
    p = build(device, random.Random(18), [], **(SMALL | {"q_len": 40, "kv_len": 17}))
    p.mask = Causal()  # bottom right: the first 23 rows stand before every key
    p.arguments["sink"] = torch.tensor([0.5, -torch.inf], device=device)
    assert judge(p)["sink (0)"][1] == 0


def test_each_pass_has_its_own_tile(device, monkeypatch):
    """The table gives the passes different tiles, and the ranges that dK and dV walk are those of its own."""
    tiles = {"forward": Tile(32, 16), "dkv": Tile(16, 32), "dq": Tile(64, 16)}
    monkeypatch.setattr("tilewise.plan.passes.choose_tile", lambda q, shape, work: tiles[work])
    p = build(device, random.Random(19), [], **(SMALL | {"q_len": 70, "kv_len": 90}))
    p.mask, p.arguments["bias"] = Causal(), p.randn(2, 1, 90)
    with sanitize():
        check_gradients(*p.tensors(), p.gradient_of_out(), **p.keywords())


def test_an_argument_that_begins_to_require_a_gradient_is_judged_again(device):
    """What passed is remembered: also whether an argument required a gradient, beside others that do."""
    q, k, v = (torch.randn(1, 2, 4, 8, device=device, requires_grad=True) for _ in range(3))
    factors, offsets = torch.randn(2, device=device), torch.randn(4, device=device)
    score = UserScore(line_score, (3, factors, offsets), derivative=line_slope, parameters={2: ("k", None)})
    tilewise.attention(q, k, v, score=score, impl="portable")
    factors.requires_grad_()
    with pytest.raises(ValueError, match=r"args\[1\] requires a gradient"):
        tilewise.attention(q, k, v, score=score, impl="portable")
