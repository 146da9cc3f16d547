"""Second derivatives and forward mode of every feature, against float64: `harness.second`.

Each line is one call; together they have all masks, scores, similarities, layouts and dtypes. More are drawn
in tests/test_properties.py.
"""

import random

import pytest
import torch

import tilewise
from harness.features import build
from harness.problem import SMALL
from harness.second import check_second

CALLS = (
    "float16 softcap bias causal grouped_heads",
    "bfloat16 alibi relative_position sink window oblong_tile",
    "cosine_with_temperature tensor_scale user_score prefix expanded_layout",
    "cosine float16 right_padding grouped_heads",
    "dot other_scale bias_modifier dropout bool_mask",
    "packed_rows sink relative_position softcap positive_scale",
    "packed_apart strided_bias intervals dropout",
    "odd_dims sliced_layout left_padding user_interval tensor_scale",
    "value_dim_differs transposed_layout scattered_documents one_kv_head user_mask",
    "blocks inner_strided_layout documents",
    "causal_top_left no_key sink",
    "no_query causal_from_a_position",
)


@pytest.mark.parametrize("features", CALLS)
def test_second_derivatives(features, device):
    p = build(device, random.Random(features), features.split(), **(SMALL | {"batch": 1}))
    with tilewise.tiles.use(p.tile):
        check_second(*p.tensors(), **p.keywords())


def test_what_nobody_sees_has_no_part_in_it(device):
    """Keys, values and their tangents are NaN where no row sees them."""
    seen = 11
    q, k, v = (torch.randn(1, 2, n, 16, device=device) for n in (17, 20, 20))
    u = [torch.randn_like(x) for x in (q, k, v)]

    def derivatives(hidden):
        leaves, moves = ([each[0].clone(), *(x.clone() for x in each[1:])] for each in ((q, k, v), u))
        for x in (*leaves[1:], *moves[1:]):
            x[:, :, seen:] = hidden
        leaves = [x.requires_grad_() for x in leaves]
        mask = torch.arange(20, device=device) < seen
        attend = lambda *qkv: tilewise.attention(*qkv, mask=mask, impl="portable")  # noqa: E731
        out, tangent = torch.func.jvp(attend, tuple(leaves), tuple(moves))
        return [out, tangent, *torch.autograd.grad(tangent.square().sum(), leaves)]

    for found, want in zip(derivatives(torch.nan), derivatives(0.0), strict=True):
        assert torch.equal(found, want)
