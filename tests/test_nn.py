"""The modules of tilewise.nn against textbook attention and PyTorch's own modules."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import tilewise
from tilewise.nn import AttentionCore, CrossAttention, SelfAttention

pytestmark = pytest.mark.oldest
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}  # fp32 sums of a few hundred terms of about 1, in another order


@pytest.fixture
def no_grad():
    """For the kernel, which has no backward yet."""
    with torch.no_grad():
        yield


def rand(*shape, **kwargs):
    return torch.randn(*shape, device=DEVICE, **kwargs)


def linear(inputs, outputs, **kwargs):
    return nn.Linear(inputs, outputs, device=DEVICE, **kwargs)


def textbook(q, k, v, keep=None):
    """softmax(QKᵀ/√d)V; keep: bool, True where a pair counts."""
    s = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if keep is not None:
        s = s.masked_fill(~keep, -math.inf)
    return torch.softmax(s, dim=-1) @ v


def heads_of(x, heads):
    """[..., length, heads · dim] -> [..., heads, length, dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def joined(x):
    return x.transpose(-3, -2).flatten(-2)


# ---- The beginner's model


@pytest.mark.parametrize("impl", [None, "torch"])
def test_beginners_model_to_rounding(no_grad, impl):
    q, k, v = (linear(512, 256) for _ in range(3))
    x = rand(10, 512)
    out = SelfAttention.from_linears(q, k, v, impl=impl)(x)
    assert out.shape == (10, 256)
    torch.testing.assert_close(out, textbook(q(x), k(x), v(x)), **ROUNDING)


def test_self_attention_is_one_matmul():
    module = SelfAttention(12, 8, heads=2)
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 1
    assert linears[0].weight.shape == (24, 12)


def test_heads_are_views_and_join_without_a_copy(no_grad):
    module = SelfAttention(12, 8, heads=2, device=DEVICE)
    q, k, v = module.project(rand(2, 5, 12))
    storage = q.untyped_storage().data_ptr()
    assert k.untyped_storage().data_ptr() == storage == v.untyped_storage().data_ptr()
    out = module.core(q, k, v)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def test_batch_dimension_is_optional(no_grad):
    module = SelfAttention(12, 8, heads=2, out_projection=True, device=DEVICE)
    x = rand(5, 12)
    torch.testing.assert_close(module(x), module(x[None])[0], rtol=0, atol=0)
    cross = CrossAttention(12, 8, context_dim=6, device=DEVICE)
    context = rand(7, 6)
    torch.testing.assert_close(cross(x, context), cross(x[None], context[None])[0], rtol=0, atol=0)


def test_empty_sequence_and_empty_batch(no_grad):
    module = SelfAttention(12, 8, heads=2, out_projection=True, device=DEVICE)
    assert module(rand(0, 12)).shape == (0, 8)
    assert module(rand(0, 3, 12)).shape == (0, 3, 8)
    cross = CrossAttention(12, 8, heads=2, device=DEVICE)
    torch.testing.assert_close(cross(rand(3, 12), rand(0, 12)), torch.zeros(3, 8, device=DEVICE))


# ---- Weights taken over from other modules


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (6, 2), (4, 1)])
def test_from_linears_with_grouped_heads(no_grad, heads, kv_heads):
    q, k, v = linear(10, heads * 5), linear(10, kv_heads * 5), linear(10, kv_heads * 3)
    out = linear(heads * 3, 7)
    x = rand(2, 6, 10)
    module = SelfAttention.from_linears(q, k, v, heads=heads, kv_heads=kv_heads, out=out)
    group = heads // kv_heads
    keys = heads_of(k(x), kv_heads).repeat_interleave(group, 1)
    values = heads_of(v(x), kv_heads).repeat_interleave(group, 1)
    expected = out(joined(textbook(heads_of(q(x), heads), keys, values)))
    torch.testing.assert_close(module(x), expected, **ROUNDING)


@pytest.mark.parametrize("with_bias", [(False, False, False), (True, False, True), (False, True, False)])
def test_from_linears_with_some_biases(no_grad, with_bias):
    q, k, v = (linear(10, 6, bias=bias) for bias in with_bias)
    x = rand(4, 10)
    for cls, inputs in ((SelfAttention, (x,)), (CrossAttention, (x, x))):
        module = cls.from_linears(q, k, v)
        torch.testing.assert_close(module(*inputs), textbook(q(x), k(x), v(x)), **ROUNDING)
    assert (SelfAttention.from_linears(q, k, v).qkv.bias is not None) == any(with_bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_from_linears_keeps_dtype_copies_weights_and_keeps_frozen_ones_frozen(dtype):
    q, k, v = (linear(10, 6, dtype=dtype).requires_grad_(False) for _ in range(3))
    module = SelfAttention.from_linears(q, k, v, sink=True)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert not module.qkv.weight.requires_grad and not module.qkv.bias.requires_grad
    assert module.core.sink.requires_grad
    before = module.qkv.weight.clone()
    q.weight.zero_()
    torch.testing.assert_close(module.qkv.weight, before, rtol=0, atol=0)
    k.requires_grad_(True)
    assert SelfAttention.from_linears(q, k, v).qkv.weight.requires_grad


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_from_multihead_attention(no_grad, batch_first, bias):
    mha = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first, device=DEVICE).eval()
    for parameter in mha.parameters():  # PyTorch starts biases at 0, which would hide a forgotten one
        nn.init.normal_(parameter, std=0.5)
    x, lengths = rand(3, 7, 12), torch.tensor([7, 4, 1], device=DEVICE)
    padding = torch.arange(7, device=DEVICE) >= lengths[:, None]
    theirs = x if batch_first else x.transpose(0, 1)
    expected = mha(theirs, theirs, theirs, key_padding_mask=padding, need_weights=False)[0]
    module = SelfAttention.from_multihead_attention(mha)
    out = module(x, mask=tilewise.Padding(lengths))
    torch.testing.assert_close(out, expected if batch_first else expected.transpose(0, 1), **ROUNDING)
    assert not module.training
    torch.testing.assert_close(module(x[0]), out[0], **ROUNDING)


@pytest.mark.parametrize("kdim, vdim", [(None, None), (8, 8), (8, 5)])
def test_cross_attention_from_multihead_attention(no_grad, kdim, vdim):
    mha = nn.MultiheadAttention(12, 3, kdim=kdim, vdim=vdim, batch_first=True, device=DEVICE)
    for parameter in mha.parameters():
        nn.init.normal_(parameter, std=0.5)
    query, key, value = rand(2, 4, 12), rand(2, 7, kdim or 12), rand(2, 7, vdim or 12)
    module = CrossAttention.from_multihead_attention(mha)
    expected = mha(query, key, value, need_weights=False)[0]
    torch.testing.assert_close(module(query, key, values=value), expected, **ROUNDING)
    torch.testing.assert_close(module(query[0], key[0], values=value[0]), expected[0], **ROUNDING)
    if kdim == vdim:
        expected = mha(query, key, key, need_weights=False)[0]
        torch.testing.assert_close(module(query, key), expected, **ROUNDING)


def test_cross_attention_boolean_mask_is_the_inverse_of_pytorchs(no_grad):
    mha = nn.MultiheadAttention(12, 3, batch_first=True, device=DEVICE)
    query, key = rand(2, 4, 12), rand(2, 7, 12)
    attn_mask = torch.rand(4, 7, device=DEVICE) < 0.4
    attn_mask[:, 0] = False
    expected = mha(query, key, key, attn_mask=attn_mask, need_weights=False)[0]
    out = CrossAttention.from_multihead_attention(mha)(query, key, mask=~attn_mask)
    torch.testing.assert_close(out, expected, **ROUNDING)


# ---- Options


@pytest.mark.parametrize("qk_norm", ["rms", "layer"])
@pytest.mark.parametrize("cls", [SelfAttention, CrossAttention])
def test_qk_norm(no_grad, cls, qk_norm):
    module = cls(12, 8, heads=2, kv_heads=1, qk_norm=qk_norm, device=DEVICE)
    for parameter in module.core.parameters():
        nn.init.normal_(parameter)
    x = rand(2, 5, 12)
    inputs = (x,) if cls is SelfAttention else (x, x)
    q, k, v = module.project(*inputs)

    def normed(t, norm):
        if qk_norm == "rms":
            return t / t.square().mean(-1, keepdim=True).add(1e-6).sqrt() * norm.weight
        centred = t - t.mean(-1, keepdim=True)
        return centred / centred.square().mean(-1, keepdim=True).add(1e-6).sqrt() * norm.weight + norm.bias

    q, k = normed(q, module.core.q_norm), normed(k, module.core.k_norm)
    expected = joined(textbook(q, k.expand_as(q), v.expand(-1, 2, -1, -1)))
    torch.testing.assert_close(module(*inputs), expected, **ROUNDING)


def test_mask_bias_and_score_reach_the_kernel(no_grad):
    module = SelfAttention(12, 8, heads=2, device=DEVICE)
    x, bias = rand(2, 5, 12), rand(2, 1, 5, 5)
    arguments = {"mask": tilewise.Causal(), "bias": bias, "score": tilewise.Softcap(0.5)}
    s = module.project(x)[0] @ module.project(x)[1].transpose(2, 3) / 2
    s = 0.5 * torch.tanh(s / 0.5) + bias
    s = s.masked_fill(~torch.ones(5, 5, dtype=torch.bool, device=DEVICE).tril(), -math.inf)
    expected = joined(torch.softmax(s, -1) @ module.project(x)[2])
    torch.testing.assert_close(module(x, **arguments), expected, **ROUNDING)
    cross = CrossAttention.from_linears(*split_qkv(module), heads=2)
    torch.testing.assert_close(cross(x, x, **arguments), expected, **ROUNDING)


def split_qkv(module):
    """The fused projection as three Linears."""
    linears = [linear(module.input_dim, width) for width in module.widths]
    weights, biases = module.qkv.weight.split(module.widths), module.qkv.bias.split(module.widths)
    for part, weight, bias in zip(linears, weights, biases, strict=True):
        part.weight.copy_(weight)
        part.bias.copy_(bias)
    return linears


def test_similarity_scale_and_sink(no_grad):
    temperature = nn.Parameter(torch.tensor([2.0, 7.0], device=DEVICE))
    module = SelfAttention(
        12, 8, heads=2, similarity=tilewise.Cosine(temperature), scale=0.5, sink=True, device=DEVICE
    )
    assert module.core.sink.tolist() == [0.0, 0.0]
    module.core.sink.copy_(torch.tensor([1.0, -1.0]))
    q, k, v = module.project(x := rand(2, 5, 12))
    unit_q, unit_k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
    s = 0.5 * temperature[:, None, None] * (unit_q @ unit_k.transpose(2, 3))
    s = torch.cat([s, module.core.sink[:, None, None].expand(2, 2, 5, 1)], dim=-1)
    expected = joined(torch.softmax(s, -1)[..., :-1] @ v)
    torch.testing.assert_close(module(x), expected, **ROUNDING)
    assert {"core.temperature", "core.sink"} <= {name for name, _ in module.named_parameters()}


def test_a_plain_tensor_as_scale_is_a_buffer(no_grad):
    module = SelfAttention(12, scale=torch.tensor(0.25, device=DEVICE), similarity="dot", device=DEVICE)
    assert "core.scale" in module.state_dict() and "core.scale" not in dict(module.named_parameters())
    q, k, v = module.project(x := rand(1, 4, 12))
    expected = joined(torch.softmax(0.25 * q @ k.transpose(2, 3), -1) @ v)
    torch.testing.assert_close(module(x), expected, **ROUNDING)


def test_autocast_runs_in_the_narrow_type(no_grad):
    module = SelfAttention(12, 8, heads=2, qk_norm="layer", device=DEVICE)
    x = rand(2, 5, 12)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x), rtol=0.03, atol=0.03)


def test_a_norm_may_widen_queries_and_keys(no_grad):
    """As norms do under autocast on a GPU: the kernel still gets three tensors of one type."""

    class Widen(nn.Module):
        def forward(self, x):
            return x.float()

    core = AttentionCore(2, 4, qk_norm="rms")
    core.q_norm, core.k_norm = Widen(), Widen()
    q, k, v = rand(3, 1, 2, 5, 4, dtype=torch.float16)
    plain = AttentionCore(2, 4)
    torch.testing.assert_close(core(q, k, v), plain(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize(
    "arguments, sizes",
    [
        ({"output_dim": None}, (12, 12, 12)),
        ({"output_dim": 8, "heads": 2}, (8, 4, 4)),
        ({"heads": 2, "head_dim": 5}, (10, 5, 5)),
        ({"heads": 2, "value_dim": 5}, (10, 6, 5)),
        ({"output_dim": 8, "heads": 2, "head_dim": 5}, (8, 5, 4)),
        ({"heads": 2, "out_projection": True}, (12, 6, 6)),
        ({"output_dim": 7, "heads": 2, "head_dim": 5, "out_projection": True}, (7, 5, 5)),
        ({"heads": 3, "head_dim": 5, "value_dim": 2, "out_projection": True}, (12, 5, 2)),
    ],
)
def test_sizes_follow_from_those_given(no_grad, arguments, sizes):
    for cls, inputs in ((SelfAttention, 1), (CrossAttention, 2)):
        module = cls(12, **arguments, device=DEVICE)
        assert (module.output_dim, module.head_dim, module.value_dim) == sizes
        assert module(*[rand(3, 12)] * inputs).shape == (3, sizes[0])


# ---- Being a PyTorch module


def every_option():
    return SelfAttention(
        12, 8, heads=4, kv_heads=2, out_projection=True, qk_norm="rms", sink=True, device=DEVICE,
        similarity=tilewise.Cosine(rand(4)), scale=torch.tensor(3.0, device=DEVICE),
    )  # fmt: skip


def test_state_dict_deepcopy_and_pickle_round_trips(no_grad):
    module, x = every_option(), rand(2, 5, 12)
    expected = module(x)
    other = every_option()
    assert not torch.equal(other(x), expected)
    other.load_state_dict(module.state_dict())
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for copied in (other, copy.deepcopy(module), torch.load(saved, weights_only=False)):
        torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)


def test_gradients_on_the_plain_path():
    q, k, v, out = linear(12, 8), linear(12, 8), linear(12, 8), linear(8, 6)
    module = SelfAttention.from_linears(q, k, v, heads=2, out=out, impl="torch", sink=True, qk_norm="rms")
    x = rand(2, 5, 12, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in module.parameters())

    plain = SelfAttention.from_linears(q, k, v, heads=2, out=out, impl="torch")
    plain(x := rand(2, 5, 12)).square().sum().backward()
    textbook_out = out(joined(textbook(*(heads_of(part(x), 2) for part in (q, k, v)))))
    textbook_out.square().sum().backward()
    expected = torch.cat([part.weight.grad for part in (q, k, v)])
    torch.testing.assert_close(plain.qkv.weight.grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.out.weight.grad, out.weight.grad, rtol=1e-4, atol=1e-5)


def test_hooks_on_the_core_see_attention():
    module, seen = SelfAttention(12, 8, heads=2, impl="torch", device=DEVICE), []
    module.core.register_forward_hook(lambda core, inputs, out: seen.append((*inputs, out)))
    module(rand(5, 12))
    assert [tuple(t.shape) for t in seen[0]] == [(1, 2, 5, 4)] * 4


def test_repr_shows_sizes_and_options():
    module = SelfAttention(12, 8, heads=4, kv_heads=2, sink=True, impl="torch", similarity="dot")
    shown = repr(module)
    for words in (
        "input_dim=12, output_dim=8",
        "heads=4, head_dim=2, kv_heads=2",
        "similarity='dot'",
        "sink=True",
    ):
        assert words in shown
    assert "temperature=tensor[4]" in repr(every_option())
    assert "context_dim=5, values_dim=3" in repr(CrossAttention(12, context_dim=5, values_dim=3))


def test_statistics_beside_the_result():
    torch.manual_seed(0)
    layer = SelfAttention(32, heads=4, kv_heads=2, out_projection=True)
    x = torch.randn(2, 9, 32)
    stats = tilewise.Stats(max_logit=True, key_mass=True)
    out, found = layer(x, mask=tilewise.Causal(), return_stats=stats)
    assert torch.equal(out, layer(x, mask=tilewise.Causal()))
    assert found.max_logit.shape == (2, 4, 9) and found.entropy is None
    torch.testing.assert_close(found.key_mass.sum((1, 2)), torch.full((2,), 36.0))
    one, alone = layer(x[1], mask=tilewise.Causal(), return_stats=stats)
    assert one.shape == (9, 32)
    torch.testing.assert_close(alone.key_mass, found.key_mass[1])
