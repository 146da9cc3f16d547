"""Likely first tries get a remedy: names of other libraries, classes for objects, shapes of other layouts."""

import inspect
import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import tilewise
from harness.calls import BARE, BOOL, DIM, KV_LEN, Q_LEN, good, zeros
from tilewise.plan.names import ARGUMENTS, ELSEWHERE
from tilewise.plan.request import make_request

NAMES = {
    "is_causal": ("mask=tilewise.Causal()", "Causal('top_left')"),
    "causal": ("mask=tilewise.Causal()",),
    "attn_mask": ("mask=", "True where the pair counts", "bias="),
    "key_padding_mask": ("tilewise.Padding(lengths)", "[:, None, None, :]"),
    "seqlens": ("tilewise.Padding(lengths)",),
    "cu_seqlens": ("tilewise.packed_attention(q, k, v, q_offsets=", "[tokens, heads, dim]"),
    "cu_seqlens_q": ("tilewise.packed_attention(q, k, v, q_offsets=", "compat.flash_attn_varlen_func"),
    "max_seqlen_k": ("leave it out", "tilewise.packed_attention(q, k, v, q_offsets="),
    "segment_ids": ("tilewise.Documents(ids)", "tilewise.packed_attention(q, k, v, q_offsets="),
    "window_size": ("tilewise.Window(left, right)",),
    "block_mask": ("mask=", "keep(q_idx, kv_idx, batch, head, args)"),
    "score_mod": ("score=", "score(s, batch, head, q_idx, kv_idx, args)"),
    "softmax_scale": ("give scale=",),
    "sm_scale": ("give scale=",),
    "softcap": ("tilewise.Softcap(cap)",),
    "alibi_slopes": ("tilewise.ALiBi(slopes)",),
    "attn_bias": ("give bias=",),
    "dropout": ("give dropout_p=",),
    "training": ("give dropout_p=",),
    "enable_gqa": ("leave it out", "grouped by themselves"),
    "need_weights": ("never stored", "return_stats="),
    "return_attn_probs": ("never stored",),
    "sinks": ("give sink=",),
    "backend": ("give impl=",),
    "Causal": ("mask=tilewise.Causal()",),
    "biases": ("did you mean bias=?", "it takes mask, bias"),
    "return_lses": ("did you mean return_lse=?",),
    "xyzzy": ("it takes mask, bias, score", "return_lse, return_stats, impl, strict, deterministic"),
}


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_that_it_does_not_have_is_told_what_it_is_here(name, device, nothing_runs):
    arguments = good(device)
    with pytest.raises(TypeError) as raised:
        tilewise.attention(**arguments, **{name: True})
    for word in (f"attention() has no {name}=", *NAMES[name]):
        assert word in str(raised.value)
    assert tilewise.why_not(**arguments, **{name: True}) == [str(raised.value)]
    with pytest.raises(TypeError, match=rf"explain\(\) has no {name}="):
        tilewise.explain(**arguments, **{name: True})


def test_every_unknown_name_is_told_at_once(device):
    with pytest.raises(TypeError, match=r"no causal=.*; attention.* no sm_scale="):
        tilewise.attention(**good(device), causal=True, sm_scale=1.0)


def test_no_name_of_another_library_is_one_of_ours():
    taken = inspect.signature(tilewise.attention).parameters
    assert [
        name for name, parameter in taken.items() if parameter.kind is parameter.KEYWORD_ONLY
    ] == ARGUMENTS
    assert set(ELSEWHERE).isdisjoint(taken)
    assert {*ARGUMENTS} - {*inspect.signature(make_request).parameters} == {"return_lse", "return_stats"}


def test_packed_attention_says_what_its_offsets_are_called(device):
    q, starts = torch.zeros(3, 1, 16, device=device), torch.tensor([0, 3], device=device)
    with pytest.raises(TypeError, match=r"packed_attention\(\) has no cu_seqlens_k=: .* kv_offsets=\.\.\."):
        tilewise.packed_attention(q, q, q, q_offsets=starts, cu_seqlens_k=starts)


def test_modules_name_what_they_take(device):
    x = torch.zeros(3, 16, device=device)
    alone, cross = (make(16, device=device) for make in (tilewise.nn.SelfAttention, cross_attention))
    for call in (lambda **a: alone(x, **a), lambda **a: cross(x, x, **a)):
        with pytest.raises(TypeError, match=r"forward\(\) has no is_causal=: give mask=tilewise.Causal"):
            call(is_causal=True)
        with pytest.raises(TypeError, match=r"no need_weights=: give return_stats=tilewise\.Stats"):
            call(need_weights=False)  # not: give return_lse=, which they do not have
    q = torch.zeros(1, 1, 3, 16, device=device)
    with pytest.raises(TypeError, match=r"no key_padding_mask=: give mask=tilewise\.Padding"):
        tilewise.nn.AttentionCore(1, 16)(q, q, q, key_padding_mask=None)


def cross_attention(dim: int, **options) -> torch.nn.Module:
    return tilewise.nn.CrossAttention(dim, context_dim=dim, **options)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


VALUES = {
    "mask, a class": (dict(mask=tilewise.Causal), ("Causal is the class", "mask=tilewise.Causal()")),
    "mask, a class with arguments": (dict(mask=tilewise.Window), ("mask=tilewise.Window(left, right)",)),
    "mask, a class of scores": (dict(mask=tilewise.Softcap), ("give score=tilewise.Softcap(cap)",)),
    "mask, a score": (dict(mask=tilewise.Softcap(3.0)), ("it is a score: score=Softcap(3.0)",)),
    "mask, a word": (dict(mask="causal"), ("mask='causal'", "give mask=tilewise.Causal()")),
    "mask, another word": (dict(mask="Sliding Window"), ("give mask=tilewise.Window(left, right)",)),
    "mask, a word for a score": (dict(mask="alibi"), ("give score=tilewise.ALiBi(",)),
    "mask, true": (dict(mask=True), ("mask=tilewise.Causal()", "mask=None")),
    "mask, a list of masks": (
        dict(mask=[tilewise.Causal(), tilewise.Window(3, 0)]),
        ("mask=[Causal(), Window(3, 0)]", "combine masks with &"),
    ),
    "mask, a window": (dict(mask=(128, 0)), ("tilewise.Window(left, right)",)),
    "mask, numbers": (dict(mask=[[True, False]]), ("torch.tensor(",)),
    "mask, an array": (dict(mask=torch.ones(5, 7).bool().numpy()), ("torch.as_tensor(",)),
    "mask, a lambda": (
        dict(mask=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx),
        (
            "@triton.jit one, keep(q_idx, kv_idx, batch, head, args)",
            "mask_mod(b, h, q_idx, kv_idx)",
            "UserMask",
        ),
    ),
    "mask, a Python function": (dict(mask=lambda i, j: i >= j), ("module-level @triton.jit one, keep(",)),
    "mask, a BlockMask": (
        dict(mask=create_block_mask(causal, 1, 1, 128, 128, device="cpu")),
        ("FlexAttention's BlockMask", "tilewise.Causal()", "UserMask(keep)"),
    ),
    "mask, added": (dict(mask=torch.zeros(5, 7)), ("torch.bool", "bias=")),
    "mask, ones and zeros": (dict(mask=torch.ones(2, 7).long()), ("mask.bool()", "Padding(mask.sum(1))")),
    "score, a class": (dict(score=tilewise.Softcap), ("score=tilewise.Softcap(cap)",)),
    "score, a word": (dict(score="soft-cap"), ("give score=tilewise.Softcap(cap)",)),
    "score, a word in a list": (dict(score=["alibi"]), ("give score=tilewise.ALiBi(",)),
    "score, a number": (dict(score=50.0), ("score=tilewise.Softcap(50.0)", "scale=50.0")),
    "score, a tensor": (dict(score=torch.zeros(5, 7)), ("is bias=",)),
    "score, a mask": (dict(score=tilewise.Causal()), ("it is a mask: mask=Causal()",)),
    "score, a lambda": (
        dict(score=lambda score, b, h, q_idx, kv_idx: score),
        ("@triton.jit one, score(s, batch", "score_mod(score, b, h, q_idx, kv_idx)", "UserScore"),
    ),
    "bias, a bool": (dict(bias=torch.ones(5, 7).bool()), ("bias.dtype=torch.bool", "is mask=")),
    "similarity, short": (dict(similarity="cos"), ("did you mean 'cosine'?",)),
    "similarity, shorter": (dict(similarity="scaled"), ("did you mean 'scaled_dot'?",)),
    "similarity, longer": (dict(similarity="dot-product"), ("did you mean 'dot'?",)),
    "similarity, the class": (dict(similarity=tilewise.Cosine), ("tilewise.Cosine()",)),
    "impl, the language": (dict(impl="triton"), ("the Triton kernels are 'portable'",)),
    "impl, the algorithm": (dict(impl="flash"), ("'portable'",)),
    "impl, PyTorch's name": (dict(impl="sdpa"), ("plain PyTorch is 'torch'",)),
    "impl, the device": (dict(impl="cuda"), ("leave impl=None",)),
    "impl, capitals": (dict(impl="Hopper"), ("the forward for Hopper GPUs is 'hopper'",)),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_another_kind_is_told_what_it_is_here(name, device, nothing_runs):
    changes, words = VALUES[name]
    arguments = good(device) | changes
    with pytest.raises(ValueError) as raised:
        tilewise.attention(**arguments)
    for word in words:
        assert word in str(raised.value)
    assert len(str(raised.value)) < 420
    assert tilewise.why_not(**arguments) == [str(raised.value)]


def test_a_word_that_nobody_knows_has_no_remedy(device):
    for name, value in (("mask", "xyzzy"), ("score", "xyzzy"), ("similarity", "xyzzy"), ("impl", "xyzzy")):
        (reason,) = tilewise.why_not(**(good(device) | {name: value}))
        assert "xyzzy" in reason and "did you mean" not in reason and "give" not in reason


OTHER_SHAPES = {
    "mask of the keys": (dict(mask=zeros(2, 7, **BOOL)), ("Padding(lengths)", "mask[:, None, None, :]")),
    "mask without heads": (dict(mask=zeros(2, 5, 7, **BOOL)), ("mask[:, None]",)),
    "mask of keys and queries": (dict(mask=zeros(7, 5, **BOOL)), ("mask.transpose(-1, -2)",)),
    "mask of the key heads": (dict(mask=zeros(2, 2, 5, 7, **BOOL)), ("mask.repeat_interleave(2, 1)",)),
    "bias without heads": (dict(bias=zeros(2, 5, 7)), ("bias[:, None]",)),
    "bias of the keys": (dict(bias=zeros(2, 7)), ("bias[:, None, None, :]",)),
    "offsets": (
        dict(mask=lambda d: tilewise.Documents(torch.tensor([0, 2, 5], device=d))),
        ("ids.shape=(3,)", "cu_seqlens", "Documents.from_offsets(cu_seqlens, q_len=q_len)"),
    ),
    "heads side by side": (
        dict(q=zeros(2, 5, 768)), ("q.shape=(2, 5, 768)", "q.unflatten(-1, (heads, dim)).transpose(1, 2)"),
    ),
    "no batch": (dict(q=zeros(4, 5, 8)), ("q[None] for [heads, length, dim]", "q.unflatten")),
    "no batch and no heads": (dict(k=zeros(7, 8)), ("k[None, None]",)),
    "packed": (dict(q=zeros(2, 5, 3, 4, 8)), ("q.unbind(2)", "heads before length")),
    "two leading dimensions": (dict(q=zeros(2, 2, 4, 5, 8)), ("q.flatten(0, 1)",)),
    "another layout": (
        dict(q=zeros(2, 50, 4, 8), k=zeros(2, 70, 2, 8), v=zeros(2, 70, 2, 8)),
        ("q_heads=50", "transpose(1, 2)", "layout of FlashAttention"),
    ),
    "another layout, one query": (
        dict(q=zeros(2, 1, 4, 8), k=zeros(2, 70, 2, 8), v=zeros(2, 70, 2, 8)), ("layout of FlashAttention",),
    ),
    "another layout, by the mask": (
        dict(q=zeros(2, 50, 4, 8), k=zeros(2, 50, 4, 8), v=zeros(2, 50, 4, 8), mask=zeros(50, 50, **BOOL)),
        ("mask.shape=(50, 50)", "layout of FlashAttention"),
    ),
    "keys transposed": (dict(k=zeros(2, 2, 8, 7)), ("head_dim of q: 8, k: 7", "not transposed")),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_a_shape_of_another_convention_is_told_what_fits_here(name, device, nothing_runs):
    changes, words = OTHER_SHAPES[name]
    arguments = good(device) | BARE | {key: make(device) for key, make in changes.items()}
    text = "\n".join(tilewise.why_not(**arguments))
    for word in words:
        assert word in text
    with pytest.raises(ValueError):
        tilewise.attention(**arguments)


@pytest.mark.parametrize("name", ["mask of the keys", "mask without heads", "mask of keys and queries"])
def test_the_shape_that_is_named_fits(name, device):
    """The remedy for a mask, tried."""
    mask = OTHER_SHAPES[name][0]["mask"](device)
    remedies = [mask.transpose(-1, -2), mask[:, None], mask[:, None, None, :]]
    arguments = good(device) | BARE
    assert any(tilewise.why_not(**(arguments | dict(mask=m))) == [] for m in remedies)


def test_wrong_heads_of_the_usual_layout_are_not_taken_for_another(device):
    for q_heads, q_len, kv_heads, kv_len in itertools.product((3, 5), (Q_LEN, 70), (2, 4), (KV_LEN, 300)):
        q, k = (zeros(2, *sizes, DIM)(device) for sizes in ((q_heads, q_len), (kv_heads, kv_len)))
        (reason,) = tilewise.why_not(q, k, k)
        assert "multiple" in reason and "FlashAttention" not in reason


def test_what_is_combined_with_a_mask_has_the_same_remedies():
    for other, words in (("causal", "give mask=tilewise.Causal"), (tilewise.Causal, "Causal is the class")):
        with pytest.raises(ValueError, match=words):
            tilewise.Window(3, 0) & other
        with pytest.raises(ValueError, match=words):
            other & tilewise.Window(3, 0)
