"""Dropout: the pairs that the kernels drop are those of the reference, forward and backward, no others."""

import math
import random
from typing import Any

import pytest
import torch

import tilewise
import tilewise_reference
from harness.features import build, of_kind
from harness.gradients import check_gradients
from harness.problem import keeps_pairs
from harness.sanitizer import sanitize
from tilewise import Bias, Causal, Padding, Softcap, Window
from tilewise.kernels.tile import Tile
from tilewise.plan.request import draw_seed

DTYPES = ("float32", "float16", "bfloat16")
MASKS = [entry.name for entry in of_kind("mask")]
SEEDS = (0, 1, -1, 2**32, 2**32 + 1, -(2**63), 2**63 - 1, 0x1234_5678_9ABC_DEF0)
SMALL = {"batch": 2, "q_heads": 2, "kv_heads": 1, "q_len": 17, "kv_len": 20}


def seeded(number: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([number], device=device)


def keep_of(seed: torch.Tensor, p: float, *shape: int) -> torch.Tensor:
    return tilewise_reference.dropout_keep(seed, p, shape, seed.device)


# ---- The mask


@pytest.mark.oldest
@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_that_of_the_reference(device, seed):
    for shape in ((1, 1, 1, 1), (2, 3, 5, 37), (1, 2, 33, 6)):
        p = (0.1, 0.5, 0.93)[len(str(seed)) % 3]
        got = tilewise.dropout_mask(shape, p, seeded(seed, device), impl="portable")
        assert got.dtype == torch.bool and torch.equal(got, keep_of(seeded(seed, device), p, *shape))
        assert torch.equal(got, tilewise.dropout_mask(shape, p, seeded(seed, device), impl="torch"))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 1, 0, 4), (1, 1, 4, 0)], ids=str)
def test_mask_of_nothing(device, shape):
    assert tilewise.dropout_mask(shape, 0.5, seeded(1, device)).shape == shape


def test_seeds_differ_in_every_half(device):
    """Each of the 64 bits counts, the sign too."""
    masks = [tilewise.dropout_mask((1, 1, 8, 8), 0.5, seeded(seed, device)) for seed in SEEDS]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(SEEDS)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1e-12, 1 - 1e-6])
def test_statistics(device, p):
    """The share of dropped pairs, and of neighbours dropped together along each dimension, within 5 standard
    deviations of what independent draws give."""
    shape = (2, 2, 96, 64)
    dropped = ~tilewise.dropout_mask(shape, p, seeded(20, device)).cpu()
    count = dropped.numel()
    assert abs(dropped.double().mean() - p) <= 5 * math.sqrt(p * (1 - p) / count) + 2.0**-31
    for axis, size in enumerate(shape):
        both = dropped.narrow(axis, 1, size - 1) & dropped.narrow(axis, 0, size - 1)
        spread = 5 * math.sqrt(p * p * (1 - p * p) * 3 / both.numel())  # neighbouring products share a factor
        assert abs(both.double().mean() - p * p) <= spread + 2.0**-31, f"axis {axis}"


def test_expectation_is_that_without_dropout(device):
    """Averaged over seeds, the output is that without dropout: its spread over S seeds is known."""
    q, k, v = (torch.randn(1, 1, n, 16, device=device) for n in (3, 16, 16))
    p, times = 0.4, 64
    q, k, v = (x.expand(times, 1, *x.shape[2:]) for x in (q, k, v))  # batch neighbours draw apart
    out = tilewise.attention(q, k, v, dropout_p=p, dropout_seed=seeded(3, device), impl="portable").double()
    weights = torch.softmax(q[0].double() @ k[0].double().mT / 4, -1)
    want = weights @ v[0].double()
    spread = (weights.square() @ v[0].double().square() * p / (1 - p) / times).sqrt()
    assert ((out.mean(0) - want).abs() <= 5 * spread).all()


# ---- The mask as the kernels use it


TILES = [Tile(16, 16), Tile(32, 16), Tile(16, 64), None]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_forward_drops_the_pairs_of_the_mask(device, tile):
    """V = identity shows the probabilities: 0 where dropped, above 0 elsewhere."""
    q, k = torch.randn(2, 2, 19, 16, device=device), torch.randn(2, 1, 45, 16, device=device)
    v, seed = torch.eye(45, device=device).expand(2, 1, 45, 45), seeded(77, device)
    with tilewise.tiles.use(tile) if tile else sanitize():
        out = tilewise.attention(q, k, v, dropout_p=0.3, dropout_seed=seed, impl="portable")
    assert torch.equal(out != 0, keep_of(seed, 0.3, 2, 2, 19, 45))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_backward_drops_the_pairs_of_the_mask(device, tile):
    """dV = Pᵀ dO with dO = identity shows Pᵀ as the kernel of dK and dV has it; a bias's gradient, dS, shows
    dP as the kernel of parameters has it."""
    q, k = torch.randn(1, 2, 19, 16, device=device), torch.randn(1, 2, 45, 16, device=device)
    v, seed = torch.randn(1, 2, 45, 19, device=device), seeded(78, device)
    keep = keep_of(seed, 0.3, 1, 2, 19, 45)
    v.requires_grad_()
    with tilewise.tiles.use(tile) if tile else sanitize():
        out = tilewise.attention(q, k, v, dropout_p=0.3, dropout_seed=seed, impl="portable")
        (dv,) = torch.autograd.grad(out, v, torch.eye(19, device=device).expand(1, 2, 19, 19))
    assert torch.equal(dv != 0, keep.mT)

    # One value of two dimensions a key, (1, 1), dO = (1, -1): dP = 0 but at key 7, whose value is (1, -1).
    v = torch.ones(1, 2, 45, 2, device=device)
    v[:, :, 7, 1] = -1
    do = torch.tensor([1.0, -1.0], device=device).expand(1, 2, 19, 2)
    k.requires_grad_()
    bias = torch.zeros(1, 2, 19, 45, device=device, requires_grad=True)
    with tilewise.tiles.use(tile) if tile else sanitize():
        out = tilewise.attention(q, k, v, bias=bias, dropout_p=0.3, dropout_seed=seed, impl="portable")
        dk, ds = torch.autograd.grad(out, (k, bias), do)
    # Where key 7 is dropped, dO · O = 0 and every dS of the row is 0 to rounding; else delta is not.
    rows = ds.abs().amax(-1)
    assert (rows[~keep[..., 7]] <= 1e-6).all() and (rows[keep[..., 7]] > 1e-6).all()
    assert dk.any()


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES[:3], ids=str)
def test_gradients(device, tile, dtype):
    p = build(device, random.Random(1), [dtype], **(SMALL | {"q_len": 19, "kv_len": 37}))
    with tilewise.tiles.use(tile), sanitize():
        check_gradients(*p.tensors(), p.gradient_of_out(), mask=Causal(), bias=p.randn(2, 19, 37),
                        dropout_p=0.4, dropout_seed=seeded(-5, device))  # fmt: skip


@pytest.mark.in_turns
@pytest.mark.parametrize("mask", MASKS)
def test_with_every_mask(device, mask):
    for attempt in range(100):
        rng = random.Random(str((mask, attempt)))
        p = build(device, rng, [mask, "dropout", DTYPES[MASKS.index(mask) % 3]], **SMALL)
        if keeps_pairs(p):
            break
    with tilewise.tiles.use(p.tile), sanitize():
        check_gradients(*p.tensors(), p.gradient_of_out(), **p.keywords())


@pytest.mark.parametrize(
    "features",
    [
        "sink",
        "bias_modifier bias",
        "softcap",
        "relative_position alibi",
        "user_score tensor_scale",
        "cosine sink",
    ],
)
@pytest.mark.parametrize("heads", [(2, 1), (3, 3)], ids=str)
def test_with_scores(device, features, heads):
    sizes = SMALL | {"batch": 1, "q_heads": heads[0], "kv_heads": heads[1]}
    p = build(device, random.Random(features), ["dropout", *features.split()], **sizes)
    with tilewise.tiles.use(p.tile), sanitize():
        check_gradients(*p.tensors(), p.gradient_of_out(), **p.keywords())


@pytest.mark.parametrize("p", [1e-3, 0.99, 1])
def test_extreme_probabilities(device, p):
    problem = build(device, random.Random(2), [], **SMALL)
    if p == 1:
        p = 1 - 2.0**-20  # everything goes; the factor is 2²⁰
    with tilewise.tiles.use(Tile(16, 16)), sanitize():
        check_gradients(
            *problem.tensors(), problem.gradient_of_out(), dropout_p=p, dropout_seed=seeded(6, device)
        )


# ---- What it depends on


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, seed: torch.Tensor | None, **also
):
    """out, lse and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    arguments = dict(dropout_p=0.5, dropout_seed=seed, impl="portable") | also
    out, lse = tilewise.attention(q, k, v, **arguments, return_lse=True)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), do)


@pytest.fixture
def tensors(device):
    return [torch.randn(2, 2, n, 16, device=device) for n in (19, 35, 35, 19)]


def test_same_seed_same_bits(device, tensors):
    want = attend(*tensors, seeded(9, device))
    for seed in (seeded(9, device), torch.tensor(9, device=device), torch.tensor([[9]], device=device)):
        for got, exactly in zip(attend(*tensors, seed), want, strict=True):
            assert torch.equal(got, exactly)
    other = attend(*tensors, seeded(10, device))
    assert torch.equal(other[1], want[1]), "lse knows nothing of dropout"
    assert not any(torch.equal(got, exactly) for got, exactly in zip(other[2:], want[2:], strict=True))


def test_lengths_and_batch_neighbours_play_no_part(device, tensors):
    seed = seeded(11, device)
    q, k, v, do = tensors
    with tilewise.tiles.use(Tile(16, 16)):
        want = attend(q, k, v, do, seed)
        alone = attend(*(x[:1] for x in tensors), seed)
        longer = [torch.cat([x, torch.full_like(x[:, :, :21], torch.nan)], 2) for x in (k, v)]
        padded = attend(q, *longer, do, seed, mask=Padding(35))
        more = [torch.cat([x, torch.zeros_like(x[:, :, :14])], 2) for x in (q, do)]
        taller = attend(more[0], k, v, more[1], seed)
    for got, exactly in zip(alone, want, strict=True):
        assert torch.equal(got, exactly[:1])
    for got, exactly in zip((*padded[:3], padded[3][:, :, :35], padded[4][:, :, :35]), want, strict=True):
        assert torch.equal(got, exactly)
    for got, exactly in zip((*(x[:, :, :19] for x in taller[:3]), *taller[3:]), want, strict=True):
        assert torch.equal(got, exactly)


def test_without_a_seed_calls_differ_and_manual_seed_reproduces_them(device, tensors):
    def call() -> tuple[torch.Tensor, ...]:
        return attend(*tensors, None)

    torch.manual_seed(5)
    first, second = call(), call()
    torch.manual_seed(5)
    again = call()
    assert not torch.equal(first[0], second[0])
    for got, exactly in zip(again, first, strict=True):
        assert torch.equal(got, exactly)


def test_probability_zero_is_no_dropout(device, tensors):
    for got, want in zip(
        attend(*tensors, None, dropout_p=0), attend(*tensors, None, dropout_p=0.0), strict=True
    ):
        assert torch.equal(got, want)
    q, k, v, _ = tensors
    assert torch.equal(attend(*tensors, None, dropout_p=0)[0], tilewise.attention(q, k, v, impl="portable"))


def test_a_generator_is_not_touched_by_a_given_seed(device, tensors):
    state = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    attend(*tensors, seeded(1, device))
    after = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    assert torch.equal(state, after)


@pytest.mark.parametrize(
    "arguments", [{}, {"mask": Window(9, 0)}, {"score": Softcap(2.0)}], ids=["plain", "mask", "score"]
)
def test_plain_pytorch_drops_the_same_pairs(device, tensors, arguments):
    """impl="torch" computes in fp32 too: equal but for the order and rounding of sums of 35 terms."""
    got, want = (
        attend(*tensors, seeded(12, device), **arguments, impl=impl) for impl in ("portable", "torch")
    )
    for a, b in zip(got, want, strict=True):
        finite = b.isfinite()
        assert torch.equal(finite, a.isfinite())
        allowed = 35 * 8 * torch.finfo(torch.float32).eps * b[finite].abs().max()
        assert ((a - b)[finite].abs() <= allowed).all()


def test_scaled_dot_product_attention(device):
    q, k, v = (torch.randn(2, 3, n, 16, device=device) for n in (5, 12, 12))
    sdpa = tilewise.scaled_dot_product_attention
    plain = sdpa(q, k, v)
    torch.manual_seed(8)
    dropped = sdpa(q, k, v, dropout_p=0.5)
    torch.manual_seed(8)
    assert torch.equal(sdpa(q, k, v, dropout_p=0.5), dropped) and not torch.equal(dropped, plain)
    torch.manual_seed(8)
    want = tilewise.attention(q, k, v, dropout_p=0.5, dropout_seed=draw_seed(q.device))
    assert torch.equal(dropped, want)
    assert torch.equal(sdpa(q, k, v, dropout_p=0.0), plain)
    with pytest.raises(ValueError, match="dropout_p"):
        sdpa(q, k, v, dropout_p=1.5)


@pytest.mark.parametrize("impl", ["portable", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_pairs_dropped(device, dtype, impl):
    """out and the gradients through it are 0; lse, and the gradient through it, are those without dropout."""
    q, k, v = (torch.randn(1, 2, n, 16, device=device, dtype=dtype, requires_grad=True) for n in (5, 20, 20))
    assert not tilewise.dropout_mask((1, 2, 5, 20), 1, seeded(3, device), impl=impl).any()
    out, lse = tilewise.attention(q, k, v, mask=tilewise.Causal(), dropout_p=1, return_lse=True, impl=impl)
    _, want = tilewise.attention(q, k, v, mask=tilewise.Causal(), return_lse=True, impl=impl)
    assert (out == 0).all() and torch.equal(lse, want)
    for dx in torch.autograd.grad(out, (q, k, v), torch.randn_like(out), retain_graph=True):
        assert (dx == 0).all()
    got, plain = (torch.autograd.grad(x.sin().sum(), (q, k)) for x in (lse, want))
    assert all(map(torch.equal, got, plain)) and (plain[0] != 0).any()


def test_all_pairs_dropped_as_pytorch_does(device):
    given = [torch.randn(1, 2, 6, 16, device=device, requires_grad=True) for _ in range(3)]
    sdpas = tilewise.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention
    for sdpa in sdpas:
        out = sdpa(*given, dropout_p=1.0)
        assert (out == 0).all() and not any(x.any() for x in torch.autograd.grad(out.sum(), given))


# ---- What is refused


@pytest.mark.parametrize("impl", ["portable", "torch"])
@pytest.mark.parametrize("p", [2, 1.5, -0.1, math.nan, math.inf, "0.1", None])
def test_probability_out_of_range(device, p, impl):
    q, k, v = (torch.randn(1, 1, 4, 8, device=device) for _ in range(3))
    with pytest.raises(ValueError, match="dropout_p"):
        tilewise.attention(q, k, v, dropout_p=p, dropout_seed=seeded(1, device), impl=impl)
    with pytest.raises(ValueError, match="dropout_p"):
        tilewise.dropout_mask((1, 1, 4, 4), p, seeded(1, device), impl=impl)


def wrong_seeds(device: torch.device) -> dict[str, Any]:
    return {
        "int32": torch.tensor([1], dtype=torch.int32, device=device),
        "float": torch.tensor([1.0], device=device),
        "two": torch.tensor([1, 2], device=device),
        "none": torch.zeros(0, dtype=torch.int64, device=device),
        "a number": 7,
    }


@pytest.mark.parametrize("impl", ["portable", "torch"])
@pytest.mark.parametrize("name", wrong_seeds(torch.device("cpu")))
def test_wrong_seeds(device, name, impl):
    q, k, v = (torch.randn(1, 1, 4, 8, device=device) for _ in range(3))
    seed = wrong_seeds(device)[name]
    with pytest.raises(ValueError, match="dropout_seed"):
        tilewise.attention(q, k, v, dropout_p=0.1, dropout_seed=seed, impl=impl)
    assert "dropout_seed" in tilewise.why_not(q, k, v, dropout_p=0.1, dropout_seed=seed, impl=impl)[0]
    with pytest.raises(ValueError, match="dropout_seed"):
        tilewise.dropout_mask((1, 1, 4, 4), 0.1, seed, impl=impl)


def test_seed_elsewhere(device):
    q, k, v = (torch.randn(1, 1, 4, 8, device=device) for _ in range(3))
    seed = torch.zeros(1, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="dropout_seed is on meta"):
        tilewise.attention(q, k, v, dropout_p=0.1, dropout_seed=seed, impl="portable")


def test_seed_requires_no_gradient_and_a_bias_beside_it_has_its_own(device):
    """The seed stands among the tensors of a call; nothing goes to it, and nothing is shifted by it."""
    q, k, v = (torch.randn(1, 1, 4, 8, device=device) for _ in range(3))
    bias, sink = torch.randn(4, 4, device=device), torch.randn(1, device=device)
    seed = seeded(4, device)
    got = check_gradients(
        q, k, v, score=[Softcap(2.0), Bias(bias)], sink=sink, dropout_p=0.25, dropout_seed=seed
    )
    assert [tuple(x.shape) for x in got.values()][3:] == [(1,), (4, 4)] and seed.grad is None
