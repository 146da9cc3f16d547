"""The library ops attention_forward and attention_backward, as PyTorch's own checks and tools see them."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import tilewise
from harness.features import build
from tilewise.plan.request import make_request
from tilewise.pytorch.encoding import encode

FORWARD, BACKWARD = torch.ops.tilewise.attention_forward, torch.ops.tilewise.attention_backward

# Every layout, and every kind of thing that a request is encoded from.
CASES = [
    "contiguous_layout",
    "transposed_layout causal float16",
    "expanded_layout right_padding softcap",
    "sliced_layout bias cosine_with_temperature sink",
    "inner_strided_layout user_score user_mask value_dim_differs",
    "mixed_layout relative_position documents tensor_scale bfloat16",
    "transposed_layout dropout intervals alibi window strided_bias",
    "no_key sink",
    "no_query bias",
]


def request_of(features: str, device, trained: bool = False):
    """A small request for the kernels with these features; if trained, all that can requires a gradient."""
    sizes = dict(batch=1, q_heads=2, kv_heads=1, q_len=5, kv_len=7, tile=None)
    problem = build(device, random.Random(features), features.split(), **sizes)
    q, k, v = (x.detach().requires_grad_(trained) for x in problem.tensors())
    request = make_request(q, k, v, **problem.keywords(), impl="portable")
    for _, tensor in request.other_tensors:
        if tensor.is_floating_point():
            tensor.requires_grad_(trained)
    return request


def forward_arguments(request) -> tuple:
    tensors, *words = encode(request)
    return request.q, request.k, request.v, tensors, *words


def backward_arguments(request) -> tuple:
    """The forward's, around gradients of out and lse in layouts of their own, one of them expanded."""
    q, k, v, tensors, *words = forward_arguments(request)
    out, lse, statistics = FORWARD(q, k, v, tensors, *words)
    do, dlse = torch.randn_like(out).mT.contiguous().mT, torch.randn_like(lse[:1]).expand_as(lse)
    needs = [True] * 3 + [tensor.is_floating_point() for tensor in tensors]
    return do, dlse, q, k, v, out, statistics, tensors, *words, needs


def described(tensors) -> list[tuple]:
    return [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors]


def test_the_cases_fill_every_argument_of_the_ops_and_leave_it_empty(device):
    encoded = [encode(request_of(case, device)) for case in CASES]
    for field in ("tensors", "ints", "floats"):
        assert len({bool(getattr(each, field)) for each in encoded}) == 2, field


@pytest.mark.parametrize("case", CASES)
def test_opcheck_forward(case, device):
    torch.library.opcheck(FORWARD, forward_arguments(request_of(case, device, trained=True)))


OLDEST = [pytest.param(case, marks=[pytest.mark.oldest] * ("user_score" in case)) for case in CASES]


@pytest.mark.parametrize("case", OLDEST)
def test_opcheck_backward(case, device):
    torch.library.opcheck(BACKWARD, backward_arguments(request_of(case, device)))


@pytest.mark.parametrize("case", CASES)
def test_fake_results_are_described_as_real_ones(case, device):
    request = request_of(case, device)
    with FakeTensorMode() as mode:

        def fake(given):
            if isinstance(given, list):
                return [fake(each) for each in given]
            return mode.from_tensor(given) if isinstance(given, torch.Tensor) else given

        def run_fake(op, arguments):
            return op(*[fake(each) for each in arguments])

    for op, arguments in (
        (FORWARD, forward_arguments(request)),
        (BACKWARD, backward_arguments(request)),
        (
            BACKWARD,
            (*backward_arguments(request)[:-1], [False, True] + [False] * (1 + len(encode(request)[0]))),
        ),
    ):
        with mode:
            dreamt = described(run_fake(op, arguments))
        assert dreamt == described(op(*arguments)), op


@pytest.mark.parametrize("case", CASES)
def test_op_path_and_eager_path_give_the_same_bits(case, device):
    request = request_of(case, device, trained=True)
    similarity, dropout = request.similarity, request.dropout
    out, lse = tilewise.attention(
        request.q, request.k, request.v, mask=joined(request.masks), score=request.scores,
        scale=request.scale,
        similarity=similarity, sink=request.sink, return_lse=True, impl="portable",
        **({} if dropout is None else dict(dropout_p=dropout.p, dropout_seed=dropout.seed)),
    )  # fmt: skip
    assert type(out.grad_fn).__name__ == "AttentionBackward"
    op_out, op_lse, _ = FORWARD(*forward_arguments(request))
    assert torch.equal(out, op_out) and torch.equal(lse, op_lse)
    assert out.stride() == op_out.stride()

    do, dlse = torch.randn_like(out), torch.randn_like(lse)
    others = [tensor for _, tensor in request.other_tensors if tensor.requires_grad]
    leaves = (request.q, request.k, request.v, *others)
    eager = torch.autograd.grad((out, lse), leaves, (do, dlse))
    ops = torch.autograd.grad((op_out, op_lse), leaves, (do, dlse))
    for leaf, one, other in zip(leaves, eager, ops, strict=True):
        assert one.shape == leaf.shape and one.dtype == leaf.dtype
        assert torch.equal(one, other) and one.stride() == other.stride()
    assert any(gradient.any() for gradient in eager) or not case.startswith("contiguous")


def joined(masks):
    mask = None
    for part in masks:
        mask = part if mask is None else mask & part
    return mask


@pytest.mark.oldest
@pytest.mark.parametrize("of", ["out", "lse"])
def test_op_path_gradient_of_one_result_alone(of, device):
    """PyTorch hands the other result's gradient over as None."""
    request = request_of("contiguous_layout sink", device, trained=True)
    leaves = (request.q, request.k, request.v, request.sink)
    out, lse, _ = FORWARD(*forward_arguments(request))
    zeros = torch.zeros_like(lse if of == "out" else out)
    given = torch.randn_like(out if of == "out" else lse)
    grads = torch.autograd.grad(out if of == "out" else lse, leaves, given, retain_graph=True)
    both = torch.autograd.grad((out, lse), leaves, (given, zeros) if of == "out" else (zeros, given))
    assert all(torch.equal(one, other) for one, other in zip(grads, both, strict=True))
    assert grads[0].any() and grads[3].any() and grads[2].any() == (of == "out")


# ---- Tensors without data


def meta_call(device_name: str, grouped: bool):
    kv_heads = 2 if grouped else 4
    q = torch.randn(2, 5, 4, 8, device=device_name).transpose(1, 2)
    k, v = (torch.randn(2, kv_heads, 7, dim, device=device_name) for dim in (8, 3))
    bias, sink = torch.randn(5, 7, device=device_name), torch.randn(4, device=device_name)
    leaves = [x.requires_grad_() for x in (q, k, v, bias, sink)]
    out, lse = tilewise.attention(
        q, k, v, mask=tilewise.Causal(), bias=bias, sink=sink, return_lse=True, impl="portable"
    )
    return [out, lse, *torch.autograd.grad((out.sum(), lse.sum()), leaves)]


@pytest.mark.oldest
@pytest.mark.parametrize("grouped", [False, True])
def test_meta_tensors(grouped, device):
    found, real = meta_call("meta", grouped), meta_call(device, grouped)
    assert all(x.is_meta for x in found)
    assert [entry[:3] for entry in described(found)] == [entry[:3] for entry in described(real)]


@pytest.mark.oldest
def test_meta_tensors_without_gradients_and_what_they_refuse():
    q, k, v = (torch.empty(2, 4, n, 8, device="meta") for n in (5, 7, 7))
    out = tilewise.attention(q, k, v, score=tilewise.ALiBi(torch.empty(4, device="meta")), dropout_p=0.5)
    assert out.is_meta and out.shape == q.shape and out.grad_fn is None
    with pytest.raises(ValueError, match=r"head_dim of q: 8, k: 7"):
        tilewise.attention(q, k[..., :7], v)


@pytest.mark.oldest
@pytest.mark.parametrize("grouped", [False, True])
def test_fake_tensor_mode(grouped, device):
    real = meta_call(device, grouped)
    with FakeTensorMode():
        found = meta_call(device, grouped)
    assert described(found) == described(real)


# ---- FLOPs


def counted(run) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.oldest
@pytest.mark.parametrize("q_heads, kv_heads, head_dim, value_dim", [(2, 2, 8, 8), (6, 2, 8, 8), (4, 1, 5, 3)])
def test_flops(q_heads, kv_heads, head_dim, value_dim, device):
    batch, q_len, kv_len = 2, 5, 7
    q = torch.randn(batch, q_heads, q_len, head_dim, device=device, requires_grad=True)
    k, v = (
        torch.randn(batch, kv_heads, kv_len, dim, device=device, requires_grad=True)
        for dim in (head_dim, value_dim)
    )
    pairs = 2 * batch * q_heads * q_len * kv_len  # masked or not, as PyTorch counts
    found = counted(
        lambda: tilewise.attention(q, k, v, mask=tilewise.Causal(), impl="portable").sum().backward()
    )
    assert found == {
        "tilewise.attention_forward": pairs * (head_dim + value_dim),
        "tilewise.attention_backward": pairs * (3 * head_dim + 2 * value_dim),
    }


@pytest.mark.oldest
def test_flops_are_those_of_pytorchs_attention(device):
    q, k, v = (torch.randn(2, 3, n, 8, device=device, requires_grad=True) for n in (5, 7, 7))
    found = counted(lambda: tilewise.attention(q, k, v, impl="portable").sum().backward())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = counted(lambda: F.scaled_dot_product_attention(q, k, v))
    assert found["tilewise.attention_forward"] == sum(theirs.values()) > 0
    shapes = [tuple(x.shape) for x in (q, k, v)]
    assert found["tilewise.attention_forward"] == sdpa_flop_count(*shapes)
    assert found["tilewise.attention_backward"] == sdpa_backward_flop_count(shapes[0], *shapes)
