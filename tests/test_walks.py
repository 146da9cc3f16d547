"""In how many walks does a backward make dQ, dK and dV? The rule, the way to ask, and what `explain` says."""

import pytest
import torch

import tilewise
from tilewise.parts.shape import Shape
from tilewise.plan.tiles import arch_walks, choose_walks

pytestmark = pytest.mark.oldest


def shape(dim: int) -> Shape:
    return Shape(1, 2, 2, 64, 64, dim, dim)


def test_one_walk_is_for_any_order_where_the_model_finds_it_faster():
    asked = [("sm_90", 2, 64), ("sm_90", 2, 40), ("sm_90", 2, 128), ("sm_90", 4, 64), ("sm_80", 2, 64)]
    assert [arch_walks(*key[:2], shape(key[2]), False) for key in asked] == [1, 1, 2, 2, 2]
    assert {arch_walks(*key[:2], shape(key[2]), True) for key in asked} == {2}


def test_use_walks(device):
    q = torch.empty(1, device=device)
    for walks in (1, 2):
        with tilewise.tiles.use_walks(walks):
            assert choose_walks(q, shape(64), True) == arch_walks("sm_90", 2, shape(64), False) == walks
    with pytest.raises(ValueError, match="walks=3 must be 1 or 2"), tilewise.tiles.use_walks(3):
        pass


@pytest.mark.parametrize("deterministic", [True, False])
def test_explain_says_which(deterministic, device, monkeypatch):
    torch.use_deterministic_algorithms(False)
    q, k, v = (torch.empty(1, 2, 512, 64, device="meta", dtype=torch.bfloat16) for _ in range(3))
    found = tilewise.explain(q, k, v, deterministic=deterministic, gpu="H100", work="training")
    names = [kernel.name for kernel in found.kernels]
    assert names == ["forward", "prepare", *(["dq", "dkv"] if deterministic else ["dqkv", "finish dq"])]
    assert ("in two walks" if deterministic else "in one walk") in str(found)
    sums = [each.bytes for each in found.memory if each.name == "sums of dq"]
    assert sums == ([] if deterministic else [4 * 2 * 512 * 64])


def test_explain_follows_pytorchs_switch():
    q, k, v = (torch.empty(1, 2, 512, 64, device="meta", dtype=torch.bfloat16) for _ in range(3))
    found = tilewise.explain(q, k, v, deterministic=False, gpu="H100", work="training")
    assert "dqkv" not in [kernel.name for kernel in found.kernels]
