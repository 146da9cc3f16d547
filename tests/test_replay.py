"""A call that repeats an earlier one gives what the long way gives: the same bits, from its own tensors."""

import contextlib
import sys
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad

import tilewise
from harness.calls import even_keys
from harness.features import FEATURES
from harness.replays import (
    Watching,
    alive,
    attend,
    drawn,
    like,
    long_way,
    no_long_way,
    nothing_runs,
    qkv,
    repeating,
    replays,
    results,
    same,
)
from tilewise import api
from tilewise.kernels.launch import ALIGNMENT
from tilewise.plan import repeated
from tilewise.plan.replay import program
from tilewise.plan.tape import record

SMALL = dict(batch=1, q_heads=2, kv_heads=1)
# Whose gradients take the same way through the host, whatever they are.
ALIKE = ("dtype", "heads", "dims", "lengths", "tile")


def is_aligned(request) -> bool:
    tensors = [request.q, request.k, request.v, *[x for _, x in request.other_tensors]]
    return all(x.storage_offset() * x.element_size() % ALIGNMENT == 0 for x in tensors)


def assert_repeats(request, device, trained=False) -> None:
    """Twice the long way, then replays, each like the long way. A GPU's kernels are others for addresses that
    are not aligned: such calls are right, but not repeated."""
    with replays(device) as known:
        results(like(request, 0.5, trained)), results(like(request, 0.75, trained))
        short = no_long_way if device.type == "cpu" or is_aligned(request) else contextlib.nullcontext
        third = like(request, -1.25, trained)
        with short():
            found = results(third)
        with repeating():
            same(found, results(like(request, -1.25, trained)))
        assert len(known) == 1 + trained


@pytest.mark.parametrize("feature", FEATURES.values(), ids=str)
def test_every_feature(feature, device):
    assert_repeats(drawn(device, feature), device)


TRAINED = [f for f in FEATURES.values() if "cache" not in f.text and f.kind not in ALIKE]


@pytest.mark.in_turns
@pytest.mark.parametrize("feature", TRAINED, ids=str)
def test_every_feature_with_gradients(feature, device):
    sizes = dict(batch=2) if feature.kind in ("rows", "layout", "mask") else SMALL
    assert_repeats(drawn(device, feature, **sizes), device, trained=True)


def test_a_tensor_given_twice_is_not_taken_for_one(device):
    x, lengths = torch.randn(1, 2, 5, 8, device=device), torch.tensor([3], device=device)
    with replays(device):
        for _ in range(2):
            attend(x, x, x, mask=tilewise.Padding(lengths) & tilewise.Prefix(lengths, "top_left"))
        tensors = qkv(device)
        one, other = (torch.tensor([n], device=device) for n in (4, 2))
        mask = tilewise.Padding(one) & tilewise.Prefix(other, "top_left")
        with no_long_way():
            found = attend(*tensors, mask=mask)
        assert torch.equal(found, long_way(*tensors, mask=mask))


def test_what_comes_once_is_not_written_down(device):
    """Keys that grow by a row with each call."""
    with replays(device) as known, mock.patch.object(repeated, "record", side_effect=AssertionError):
        q, k, v = qkv(device)
        for length in range(1, 6):
            attend(q, k[:, :, :length], v[:, :, :length])
        assert len(known) == 5


def test_no_more_steps_are_known_than_a_number(device):
    with replays(device) as known, mock.patch.object(repeated, "MOST", 3):
        q, k, v = qkv(device)
        for length in (1, 2, 3, 4, 5):
            attend(q, k[:, :, :length], v[:, :, :length])
            assert len(known) <= 3


def test_no_tensor_is_kept(device):
    def once():
        q, k, v = qkv(device, trained=True)
        bias, sink, numbers = (
            torch.randn(5, 5, device=device, requires_grad=True),
            torch.randn(2, device=device, requires_grad=True),
            torch.randn(3, device=device),
        )
        mask = tilewise.UserMask(even_keys, (numbers,)) & tilewise.Causal()
        out, lse = attend(q, k, v, mask=mask, bias=bias, sink=sink, return_lse=True)
        (out.sum() + lse.sum()).backward()
        return alive(q, k, v, bias, sink, numbers, out, lse, q.grad)

    with replays(device) as known:
        left = [once() for _ in range(3)]
        assert [count() for count in left] == [0, 0, 0]
        assert len(known) == 2 and all([step.replay for step in known.values()])
    kept = torch.randn(3, device=device)
    assert alive(kept)() == 1


def test_rows_that_are_written_into_a_cache(device):
    """With turns of either style and without one, in turns."""
    tables = [tilewise.nn.Rotary(8, style=style).table(16, device) for style in ("half", "interleaved")]
    tables.append(None)
    new = [[torch.randn(2, 2, 1, 8, device=device) for _ in range(3)] for _ in range(4)]

    def decode(short):
        caches = [[torch.zeros(2, 2, 16, 8, device=device) for _ in range(2)] for _ in tables]
        found = []
        for number, (q, k, v) in enumerate(new):
            for table, cache in zip(tables, caches, strict=True):
                lens = torch.tensor([3, 9], device=device) + number
                with short() if number > 1 else contextlib.nullcontext():
                    given = dict(kv_lens=lens, new_k=k, new_v=v, rotary=table)
                    found.append(tilewise.cached_attention(q, *cache, **given, impl="portable"))
        return [*found, *[x for cache in caches for x in cache]]

    with replays(device) as known:
        found = decode(no_long_way)
        assert all([step.replay for step in known.values()]) and len(known) == 6  # one answer for all
    with repeating():
        same(found, decode(contextlib.nullcontext))


def test_dropout_is_drawn_anew(device):
    with replays(device):
        tensors = qkv(device)
        drawn = [attend(*tensors, dropout_p=0.5) for _ in range(2)]
        with no_long_way():
            drawn += [attend(*tensors, dropout_p=0.5) for _ in range(2)]
        assert len({str(each) for each in drawn}) == 4


def test_autocast_and_inference_mode(device):
    with replays(device):
        for around in (lambda: torch.autocast(device.type, torch.bfloat16), torch.inference_mode):
            for number in range(3):
                tensors = qkv(device)
                with around(), no_long_way() if number == 2 else contextlib.nullcontext():
                    found = attend(*tensors)
                with around():
                    assert torch.equal(found, long_way(*tensors))


def test_what_is_no_tensor_is_refused_in_words(device):
    _, k, v = qkv(device)
    with replays(device), pytest.raises(ValueError, match="must be"):
        attend("q", k, v)


def test_what_the_emulator_runs_is_not_repeated():
    """On a CPU, Hopper's kernel is no launch of Triton's."""
    with replays(torch.device("cpu")) as known:
        for _ in range(3):
            q, k, v = (torch.randn(1, 1, 8, 16, dtype=torch.float16) for _ in range(3))
            found = tilewise.attention(q, k, v, impl="hopper")
            with repeating():
                assert torch.equal(found, tilewise.attention(q, k, v, impl="hopper"))
        assert [step.is_in_vain for step in known.values()] == [True]


class Subclass(torch.Tensor):
    pass


def observers(q, k, v):
    """Ways to watch or transform a call, which must not be repeated then."""

    def transformed():
        return torch.func.grad(lambda factor: (attend(q, k, v) * factor).sum())(torch.ones_like(q))

    def with_a_mode():
        with Watching() as mode:
            out = attend(q, k, v)
        assert mode.seen
        return out

    def compiled():
        return torch.compile(attend, backend="eager")(q, k, v)

    def subclassed():
        return attend(q, k.as_subclass(Subclass), v).as_subclass(torch.Tensor)

    return transformed, with_a_mode, compiled, subclassed


def test_who_looks_on_sees_the_long_way(device):
    tensors = qkv(device)
    with replays(device) as known:
        for _ in range(2):
            attend(*tensors)
        (step,) = known.values()
        step.replay = mock.Mock(side_effect=AssertionError("it was repeated"))
        with pytest.raises(AssertionError, match="repeated"):
            attend(*tensors)
        found = [observer() for observer in observers(*tensors)]
    with repeating():
        same(found, [observer() for observer in observers(*tensors)])


def test_a_tangent_goes_the_long_way(device):
    q, k, v = qkv(device)
    along = torch.ones_like(q)
    want = torch.func.jvp(lambda q: attend(q, k, v), (q,), (along,))[1]
    with replays(device):
        for _ in range(3):
            attend(q, k, v)
        with forward_ad.dual_level():
            out = attend(forward_ad.make_dual(q, along), k, v)
            assert torch.equal(forward_ad.unpack_dual(out).tangent, want)


def test_watchers_are_told_of_every_call(device):
    seen, tensors = [], qkv(device)
    with replays(device), mock.patch.object(api, "watchers", [seen.append]):
        for _ in range(4):
            attend(*tensors)
    assert len(seen) == 4


FOREIGN = torch.ones(3)
STEPS = {
    "a number that is read": lambda x: (x * float(x.sum()),),
    "a tensor from elsewhere": lambda x: (x + FOREIGN,),
    "several tensors": lambda x: (x.sort().values,),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_what_cannot_be_repeated_is_not(step):
    known = repeated.Repeated()
    for factor in (1.0, 2.0, 3.0):
        x = torch.ones(3) * factor
        assert torch.equal(known([x], step)[0], step(x)[0])
    assert known.replay is None and known.is_in_vain


def test_new_tensors_views_and_operators_are_repeated():
    def step(x, y):
        made = x.new_empty(2, 3)
        made[0].copy_(x)
        made[1].zero_()
        made[1].add_(y)
        scratch = torch.empty(4)  # that nobody uses
        assert scratch.numel() == 4
        return made.T, made[1:] * 2, None

    x, y = torch.randn(2, 3)
    results, tape = record(step, [x, y])
    replay = program(tape, results)
    for _ in range(2):
        x, y = torch.randn(2, 3)
        found, expected = replay(x, y), step(x, y)
        assert found[2] is None
        same(found[:2], expected[:2])
        assert found[0].data_ptr() != replay(x, y)[0].data_ptr()


def calls_of_python(run) -> int:
    """How many Python functions run."""
    count = 0

    def told(frame, event, argument):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(told)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def test_a_part_of_a_new_tensor_is_not_all_of_it():
    known = repeated.Repeated()
    for _ in range(4):
        (found,) = known([torch.ones(3)], lambda x: (x.new_empty(2, 3)[0],))
        assert found.shape == (3,) and found.untyped_storage().nbytes() == 24


# Of Python functions, with Triton's interpreter and all of PyTorch's autograd: what is there today, and room
# for a few more. No time is taken: what a call costs is for the bench to say.
MOST_CALLS = {"forward": 50, "training": 150}


def test_a_repeated_call_is_short(device):
    """What the host does, counted."""
    q, k, v = qkv(device)
    leaves, dout = qkv(device, trained=True), torch.randn(1, 2, 5, 8, device=device)

    def forward():
        attend(q, k, v, mask=tilewise.Causal())

    def training():
        torch.autograd.grad(attend(*leaves, mask=tilewise.Causal()), leaves, dout)

    with replays(device), nothing_runs():
        for run in (forward, training):
            run(), run()
            short, most = calls_of_python(run), MOST_CALLS[run.__name__]
            with repeating():
                assert short <= most and calls_of_python(run) > 2 * most


def test_it_can_be_switched_off():
    assert repeated.is_wanted({}) and repeated.is_wanted({"TILEWISE_REPLAY": "1"})
    assert not repeated.is_wanted({"TILEWISE_REPLAY": "0"})
