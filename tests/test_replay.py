"""A call that repeats an earlier one gives what the long way gives: the same bits, from its own tensors."""

import gc
import weakref

import pytest
import torch

from harness.features import FEATURES
from harness.replays import drawn, elsewhere, like, no_long_way, repeating, replays, results
from tilewise.kernels.launch import ALIGNMENT

IN_CACHES = ("cached_rows", "cached_pages")


def assert_repeats(request, device, trained) -> None:
    """Twice the long way, then two replays, each like the long way."""
    with replays(device) as known:
        results(like(request, 0.5, trained)), results(like(request, 0.75, trained))
        for factor in (1.0, -1.25):
            third = like(request, factor, trained)
            with no_long_way():
                found = results(third)
            with repeating():
                expected = results(like(request, factor, trained))
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == other.dtype and one.stride() == other.stride()
                assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        assert len(known) == 1 + trained


def is_aligned(request) -> bool:
    tensors = [request.q, request.k, request.v, *[x for _, x in request.other_tensors]]
    return all(like.data_ptr() % ALIGNMENT == 0 for like in (elsewhere(x, 1.0) for x in tensors))


def is_cached(request) -> bool:
    return request.cache is not None


@pytest.mark.parametrize("feature", FEATURES.values(), ids=str)
def test_every_feature(feature, device):
    request = drawn(device, feature)
    assert_repeats(request, device, trained=False)


@pytest.mark.parametrize("feature", [f for f in FEATURES.values() if "cache" not in f.text], ids=str)
def test_every_feature_with_gradients(feature, device):
    assert_repeats(drawn(device, feature), device, trained=True)
