"""A request taken apart for the library ops and built again is the same request."""

import itertools
import random

import pytest
import torch
import triton

import tilewise
from harness.features import FEATURES, KINDS, build, of_kind
from tilewise.parts.dropout import Dropout
from tilewise.parts.similarity import Cosine
from tilewise.plan.request import make_request, request_of
from tilewise.pytorch import names
from tilewise.pytorch.encoding import decode, encode
from tilewise.pytorch.names import registered_name

NOT_ENCODED = {"_twin"}  # a plain PyTorch function, which no kernel needs


@triton.jit
def every_other_keep(q_idx, kv_idx, batch, head, args):
    return (q_idx + kv_idx) % 2 == 0


@triton.jit
def every_third_keep(q_idx, kv_idx, batch, head, args):
    return (q_idx + kv_idx) % 3 == 0


@triton.jit
def shifted_score(s, batch, head, q_idx, kv_idx, args):
    return s + args[0]


def drawn_request(features, device, **arguments):
    rng = random.Random(str(features))
    problem = build(device, rng, features, q_len=5, kv_len=7)
    return request_of(*problem.tensors(), **problem.keywords(), **arguments)


def same(a, b) -> bool:
    """Equality where tensors and functions must be the very same."""
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (tilewise.Mask, tilewise.Score)):
        names = vars(a).keys() - NOT_ENCODED
        return (
            type(a) is type(b)
            and names == vars(b).keys()
            and all(same(vars(a)[n], vars(b)[n]) for n in names)
        )
    if a is None or isinstance(a, (bool, int, float, str)):
        return type(a) is type(b) and a == b
    return a is b


def assert_round_trip(request) -> None:
    encoded = encode(request)
    found = decode(request.q, request.k, request.v, encoded)
    for name in ("q", "k", "v", "masks", "scores", "scale", "similarity", "sink", "dropout", "impl"):
        assert same(getattr(request, name), getattr(found, name)), name
    others = [tensor for _, tensor in request.other_tensors]
    assert len(others) == len(encoded.tensors)
    assert all(one is other for one, other in zip(others, encoded.tensors, strict=True))
    assert found.shape == request.shape
    assert encode(found)[1:] == encoded[1:]


@pytest.mark.parametrize("feature", FEATURES.values(), ids=str)
def test_every_feature(feature, device):
    assert_round_trip(drawn_request([feature], device))


def test_every_pair_of_features_that_arguments_come_from(device):
    kinds = ("similarity", "scale", "score", "bias", "sink", "dropout", "mask")
    features = [feature for kind in kinds for feature in of_kind(kind)]
    for pair in itertools.combinations(features, 2):
        assert_round_trip(drawn_request(pair, device))


def test_features_of_every_kind_at_once(device):
    rng = random.Random(0)
    for _ in range(100):
        chosen = [rng.choice(of_kind(kind)) for kind in KINDS]
        chosen += [rng.choice(of_kind(kind)) for kind in ("mask", "mask", "score")]
        assert_round_trip(drawn_request(chosen, device))


def test_every_class_lists_its_attributes(device):
    """Of each Mask and Score of tilewise, by objects that the features make."""
    seen = {tilewise.Dense: None}
    for feature in (*of_kind("mask"), *of_kind("score"), *of_kind("bias")):
        for part in drawn_request([feature], device).plugs:
            seen[type(part)] = part
            assert set(part.FIELDS) == vars(part).keys() - NOT_ENCODED, type(part)
    exported = [getattr(tilewise, name) for name in tilewise.__all__]
    bases = (tilewise.Mask, tilewise.Score)
    parts = [each for each in exported if isinstance(each, type) and issubclass(each, bases)]
    assert {part for part in parts if part not in bases} == seen.keys()
    assert seen[tilewise.Dense] is not None


def test_arguments_of_user_functions(device):
    """Any number of any kind in any order, bool and None told from int, numbers that repeat."""
    x, y = torch.zeros(3, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    args = (1, x, 2.0, True, y, None, False, 1, x, 2.0, float("inf"), -0.0, (3, (x, 4.0), ()), -(2**63))
    mask = tilewise.UserMask(every_other_keep, args) & tilewise.UserMask(every_third_keep, args[::-1])
    score = [tilewise.UserScore(shifted_score, args), tilewise.UserScore(shifted_score, (0.5,))]
    q, k, v = (torch.zeros(1, 1, 2, 4, device=device) for _ in range(3))
    request = make_request(q, k, v, mask=mask, score=score)
    found = decode(q, k, v, encode(request))
    assert same(request.masks, found.masks) and same(request.scores, found.scores)
    assert found.masks[0].args[11].hex() == (-0.0).hex()


@pytest.mark.parametrize("p, scale", [(0.5, 2), (0.25, 2.0), (0.1, True)])
@pytest.mark.parametrize("temperature", [1.0, 3, None])
def test_numbers_of_the_call_itself(p, scale, temperature, device):
    q, k, v = (torch.zeros(1, 1, 2, 4, device=device) for _ in range(3))
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    similarity = "cosine" if temperature is None else Cosine(temperature)
    request = make_request(q, k, v, scale=scale, similarity=similarity, dropout_p=p, dropout_seed=seed)
    assert_round_trip(request)
    found = decode(q, k, v, encode(request))
    assert isinstance(found.dropout, Dropout) and isinstance(found.similarity, type(similarity))


def test_lengths_do_not_enter_the_spec(device):
    """Or every length would compile a graph of its own."""
    q, k, v = (torch.zeros(1, 1, 2, 4, device=device) for _ in range(3))
    masks = (
        lambda n: tilewise.Window(n, n + 1),
        lambda n: tilewise.Padding(n),
        lambda n: tilewise.Prefix(n),
        lambda n: tilewise.UserMask(every_other_keep, (n,)),
    )
    for make in masks:
        specs = {encode(make_request(q, k, v, mask=make(n))).spec for n in (1, 5, 70)}
        assert len(specs) == 1


def test_what_differs_in_kind_differs_in_the_spec(device):
    q, k, v = (torch.zeros(1, 1, 2, 4, device=device) for _ in range(3))
    given = [
        {},
        dict(mask=tilewise.Causal()),
        dict(mask=tilewise.Causal("top_left")),
        dict(mask=tilewise.Window(1, 1)),
        dict(mask=tilewise.Window(None, 1)),
        dict(mask=tilewise.Window(1, None)),
        dict(mask=tilewise.Padding(1)),
        dict(mask=tilewise.Padding(1, side="left")),
        dict(mask=tilewise.UserMask(every_other_keep)),
        dict(mask=tilewise.UserMask(every_third_keep)),
        dict(mask=tilewise.UserMask(every_other_keep, (True,))),
        dict(mask=tilewise.UserMask(every_other_keep, (False,))),
        dict(mask=tilewise.UserMask(every_other_keep, (1,))),
        dict(mask=tilewise.UserMask(every_other_keep, (1.0,))),
        dict(mask=tilewise.UserMask(every_other_keep, ((1.0,),))),
        dict(score=tilewise.Softcap(1.0)),
        dict(scale=1.0),
        dict(similarity="cosine"),
        dict(similarity=Cosine(1.0)),
        dict(similarity="dot"),
    ]
    specs = [encode(make_request(q, k, v, **each)).spec for each in given]
    assert len(set(specs)) == len(given)


# ---- Names


def test_two_functions_of_one_name_get_two_names(device, monkeypatch):
    monkeypatch.setattr(every_third_keep.fn, "__qualname__", every_other_keep.fn.__qualname__)
    monkeypatch.setattr(names, "_registry", type(names._registry)())
    told = [registered_name(f) for f in (every_other_keep, every_third_keep)]
    assert len(set(told)) == 2
    assert [registered_name(f) for f in (every_third_keep, every_other_keep)] == told[::-1]
    q, k, v = (torch.zeros(1, 1, 2, 4, device=device) for _ in range(3))
    for keep in (every_third_keep, every_other_keep):
        request = make_request(q, k, v, mask=tilewise.UserMask(keep))
        assert decode(q, k, v, encode(request)).masks[0].keep is keep
    pair = tilewise.UserMask(every_other_keep) & tilewise.UserMask(every_third_keep)
    found = decode(q, k, v, encode(make_request(q, k, v, mask=pair)))
    assert [mask.keep for mask in found.masks] == [every_other_keep, every_third_keep]


def test_the_registry_does_not_grow_with_calls(device):
    requests = [drawn_request([feature], device) for feature in of_kind("mask")]
    for request in requests:
        encode(request)
    size = len(names._registry)
    for request in requests * 3:
        encode(request)
    assert len(names._registry) == size


def test_a_spec_is_understood_where_nothing_was_encoded(device, monkeypatch):
    """As in a process that loads an exported program: names stand for what the modules hold."""
    q, k, v = (torch.zeros(1, 1, 2, 4, device=device) for _ in range(3))
    request = make_request(q, k, v, mask=tilewise.Causal(), score=tilewise.Softcap(2.0))
    encoded = encode(request)
    monkeypatch.setattr(names, "_registry", type(names._registry)())
    found = decode(q, k, v, encoded)
    assert same(request.masks, found.masks) and same(request.scores, found.scores)
