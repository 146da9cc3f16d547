"""What a call looks like decides what is launched for it: calls that look alike launch the same, at other
addresses. So everything that changes a launch must be in the look."""

import collections
import dataclasses
import itertools
from inspect import signature

import pytest
import torch
import triton

import tilewise
from harness.around import AROUND
from harness.calls import doubled, even_keys
from harness.features import FEATURES
from harness.replays import drawn, launches_of, like
from tilewise.parts.similarity import Cosine
from tilewise.plan import tiles
from tilewise.plan.look import FIELDS, PARTS, look
from tilewise.plan.request import Request, cached_request, make_request, request_of

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 2, 4, 5, 8, 16


@triton.jit
def odd_keys(q_idx, kv_idx, batch, head, args):
    return (q_idx >= 0) & (kv_idx % 2 == 1)


@triton.jit
def halved(s, batch, head, q_idx, kv_idx, args):
    return s * 0.5


def randn(device, *shape, **options):
    return torch.randn(*shape, device=device, **options)


def base(device):
    return dict(
        q=randn(device, BATCH, HEADS, Q_LEN, DIM), k=randn(device, BATCH, HEADS, KV_LEN, DIM),
        v=randn(device, BATCH, HEADS, KV_LEN, DIM),
    )  # fmt: skip


def of_q(device):
    """q, each unlike the others in one thing."""
    q = randn(device, BATCH, HEADS, Q_LEN, DIM)
    return [
        q,
        randn(device, BATCH, HEADS, Q_LEN + 1, DIM),
        randn(device, BATCH, Q_LEN, HEADS, DIM).transpose(1, 2),
        randn(device, BATCH, HEADS, Q_LEN, 2 * DIM)[..., :DIM],
        randn(device, 1, HEADS, Q_LEN, DIM).expand(BATCH, -1, -1, -1),
        torch.nn.Parameter(q),
    ]


def of_kv(device):
    return [
        randn(device, BATCH, HEADS, KV_LEN, DIM),
        randn(device, BATCH, HEADS, KV_LEN, 2 * DIM)[..., :DIM],
        randn(device, BATCH, KV_LEN, HEADS, DIM).transpose(1, 2),
    ]


def lengths(device, *numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype, device=device)


def scales_of(device, *sizes, **options):
    """Those of q, k and v, all of these sizes."""
    return tilewise.Scales(*(torch.randn(sizes, device=device) for _ in range(3)), **options)


# For each argument of `attention` values that are unlike each other. An argument without a row here fails the
# test below: ask what it changes in a launch, and whether `look` sees it.
VARIED = {
    "q": of_q,
    "k": of_kv,
    "v": lambda device: [*of_kv(device), randn(device, BATCH, HEADS, KV_LEN, 2 * DIM)],
    "mask": lambda device: [
        None, tilewise.Causal("top_left"), tilewise.Causal("bottom_right"), tilewise.Causal(1),
        tilewise.Causal(2), tilewise.Causal(lengths(device, 1, 2)),
        tilewise.Causal(lengths(device, 1, 2, dtype=torch.int64)),
        tilewise.Window(1, 0), tilewise.Window(2, 0),
        tilewise.Window(None, 2), tilewise.Prefix(2), tilewise.Prefix(3), tilewise.Padding(3),
        tilewise.Padding(4), tilewise.Padding(3, "left"), tilewise.Padding(lengths(device, 3, 4)),
        tilewise.Padding(lengths(device, 3, 0, 4)[::2]),
        tilewise.Causal("top_left") & tilewise.Padding(3), tilewise.Padding(3) & tilewise.Causal("top_left"),
        tilewise.Padding(3) | tilewise.Causal("top_left"), ~tilewise.Padding(3), ~tilewise.Padding(4),
        ~(tilewise.Padding(3) & tilewise.Causal("top_left")),
        tilewise.BlockCausal(2), tilewise.BlockCausal(3), tilewise.BlockCausal(2, 1),
        *[tilewise.Neighborhood(*sizes, shape=(2, 4)) for sizes in ((1,), (2,), (1, 2))],
        tilewise.Neighborhood(2, shape=(2, 4), causal=True), tilewise.Neighborhood(2, shape=(4, 2)),
        torch.ones(Q_LEN, KV_LEN, dtype=torch.bool, device=device),
        torch.ones(KV_LEN, Q_LEN, dtype=torch.bool, device=device).T,
        torch.ones(KV_LEN, dtype=torch.bool, device=device), even_keys, odd_keys,
        *[tilewise.UserMask(even_keys, (each,)) for each in (1, 1.0, True, 0.0, -0.0, (1,), None)],
        tilewise.UserMask(even_keys, (lengths(device, 1),)), tilewise.UserMask(odd_keys, (1,)),
    ],
    "bias": lambda device: [
        None, randn(device, Q_LEN, KV_LEN), randn(device, KV_LEN, Q_LEN).T, randn(device, HEADS, 1, KV_LEN),
        randn(device, Q_LEN, KV_LEN, dtype=torch.float16),
    ],
    "score": lambda device: [
        None, tilewise.Softcap(3.0), tilewise.Softcap(4.0),
        [tilewise.Softcap(3.0), tilewise.Softcap(4.0)], [tilewise.Softcap(4.0), tilewise.Softcap(3.0)],
        tilewise.ALiBi(randn(device, HEADS), "top_left"), tilewise.ALiBi(randn(device, HEADS), 1),
        tilewise.RelativePosition(randn(device, HEADS, 8), 16, align="top_left"),
        tilewise.RelativePosition(randn(device, HEADS, 8), 8, align="top_left"),
        *[tilewise.UserScore(doubled, args, derivative=halved) for args in ((), (1,), (2,))],
        *[tilewise.UserScore(halved, derivative=function) for function in (doubled, halved)],
    ],
    "scale": lambda device: [None, 0.5, 0.25, 1, -1.0, 0.0, torch.tensor(0.5, device=device)],
    "similarity": lambda device: [
        "scaled_dot", "dot", "cosine", Cosine(), Cosine(2.0), Cosine(randn(device, HEADS)),
        Cosine(randn(device, 2 * HEADS)[::2]),
    ],
    "sink": lambda device: [None, randn(device, HEADS), randn(device, 2 * HEADS)[::2]],
    "scales": lambda device: [
        None, scales_of(device), scales_of(device, dtype=torch.float16), scales_of(device, BATCH, HEADS),
        scales_of(device, BATCH, HEADS, 1, rows=KV_LEN), scales_of(device, 1, HEADS, 1, rows=KV_LEN),
        scales_of(device, 1, rows=KV_LEN + 1), scales_of(device, 1, rows=KV_LEN),
        scales_of(device, 1)._replace(q=randn(device, 1, 1)),
    ],
    "dropout_p": lambda device: [0.0, 0.25, 0.5, 1.0],
    "dropout_seed": lambda device: [None, torch.zeros(1, dtype=torch.int64, device=device)],
    "impl": lambda device: ["portable"],  # the others launch nothing, or what the emulator runs
    "strict": lambda device: [False, True],
    "deterministic": lambda device: [True, False],
    "packing": lambda device: [None],  # of `packed_attention`, below
    "cache": lambda device: [None],  # of `cached_attention`, below
}  # fmt: skip


def dense_calls(device):
    for name, values in VARIED.items():
        for value in values(device):
            given = base(device) | dict(impl="portable") | {name: value}
            if name == "dropout_seed" and value is not None:
                given["dropout_p"] = 0.5
            if name == "scales" and value is not None:
                given |= {name: given[name].to(torch.float8_e4m3fn) for name in "qkv"}
            yield make_request(**given)


def packed_calls(device):
    q, k, v = (randn(device, 12, HEADS, DIM) for _ in range(3))
    for offsets, kv_offsets, mask in itertools.product(
        (
            lengths(device, 0, 5, 12),
            lengths(device, 0, 5, 12, dtype=torch.int64),
            lengths(device, 0, 5, 8, 12),
        ),
        (None, lengths(device, 0, 4, 12)),
        (None, tilewise.Causal()),
    ):
        if kv_offsets is None or len(offsets) == len(kv_offsets):
            yield request_of(q, k, v, q_offsets=offsets, kv_offsets=kv_offsets, mask=mask, impl="portable")


def cached_calls(device):
    q = randn(device, BATCH, HEADS, 1, DIM)
    whole = [randn(device, BATCH, HEADS, 64, DIM) for _ in range(2)]
    for split_size, lens in itertools.product(
        (None, 16, 32), (lengths(device, 3, 40), lengths(device, 3, 0, 40)[::2])
    ):
        yield cached_request(q, *whole, kv_lens=lens, split_size=split_size, impl="portable")
    pages = lengths(device, 0, 1, 2, 3).reshape(2, 2)
    for size in (16, 32):
        cache = [randn(device, 4, size, HEADS, DIM) for _ in range(2)]
        yield cached_request(q, *cache, kv_lens=lengths(device, 3, 20), pages=pages, impl="portable")
        yield cached_request(q, *cache, kv_lens=lengths(device, 3, 20), pages=pages.T, impl="portable")


def feature_calls(device):
    for feature in FEATURES.values():
        for seed in range(3):
            yield drawn(device, feature, seed=seed)


CALLS = {"dense": dense_calls, "packed": packed_calls, "cached": cached_calls, "features": feature_calls}


def test_every_argument_is_varied():
    assert VARIED.keys() == signature(make_request).parameters.keys()
    arguments = signature(tilewise.attention).parameters.keys() - {"return_lse", "return_stats", "unknown"}
    assert arguments < VARIED.keys()


def test_every_field_of_a_request_is_looked_at():
    fields = [each.name for each in dataclasses.fields(Request) if each.init]
    assert sorted((*FIELDS, *PARTS)) == sorted(fields)


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_calls_that_look_alike_launch_the_same(calls, device):
    found = collections.defaultdict(list)
    for request in calls(device):
        for trained in (False, True) if request.cache is None and request.scales is None else (False,):
            each = like(request, 1.0, trained)
            seen = look(each, True)
            found[seen[0]].append(launches_of(each))
            again = like(request, 2.0, trained)
            assert look(again, True)[0] == seen[0], "numbers and addresses decide nothing"
            found[seen[0]].append(launches_of(again))
    for launches in found.values():
        assert all(each == launches[0] for each in launches[1:])
    assert len(found) > 9 and max(map(len, found.values())) >= 2
    assert len({str(launches[0]) for launches in found.values()}) > 9


def test_the_tensors_of_a_look_are_those_of_the_request_in_order(device):
    for request in itertools.chain(*[calls(device) for calls in CALLS.values()]):
        found, named = look(request, False)[1], [x for _, x in request.other_tensors]
        assert len(found) == 3 + len(named)
        expected = [request.q, request.k, request.v, *named]
        assert all(x is y for x, y in zip(found, expected, strict=True))


def test_what_is_around_a_call_is_looked_at(device):
    request = make_request(**base(device), impl="portable")
    keys = [look(request, False)[0], look(request, True)[0]]
    for around in AROUND.values():
        with around():
            keys.append(look(request, False)[0])
    assert len(set(keys)) == 2 + len(AROUND)


def test_tables_that_were_read_again_are_looked_at(device, monkeypatch):
    request = make_request(**base(device), impl="portable")
    before = look(request, False)[0]
    monkeypatch.setattr(tiles, "reloads", tiles.reloads)
    tiles.reload_user_tables()
    assert look(request, False)[0] != before


class Holds(tilewise.Mask):
    """A mask that holds more than FIELDS say."""

    def __init__(self, keys):
        self.keys = keys

    def bind(self, shape):
        return tilewise.UserMask(even_keys).bind(shape)


def test_what_cannot_be_told_has_no_look(device):
    given = base(device)
    for mask in (Holds(3), tilewise.UserMask(even_keys, ([1],)), tilewise.UserMask(even_keys, (float,))):
        assert look(make_request(**given, mask=mask), False) is None
