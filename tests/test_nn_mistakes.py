"""Mistakes with the modules of tilewise.nn: each is refused with words that name it."""

import pytest
import torch
from torch import nn

from tilewise.nn import AttentionCore, CrossAttention, SelfAttention


def mha(**options):
    return nn.MultiheadAttention(12, 3, **options)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SelfAttention(0), "input_dim=0 must be an int of at least 1"),
        (lambda: SelfAttention(12, 8.0), "output_dim=8.0 must be an int"),
        (lambda: SelfAttention(12, heads=5), "input_dim=12 must be a multiple of heads=5"),
        (lambda: SelfAttention(12, 8, heads=3), "output_dim=8 must be a multiple of heads=3"),
        (lambda: SelfAttention(12, heads=4, kv_heads=3), "heads=4 must be a multiple of kv_heads=3"),
        (lambda: SelfAttention(12, heads=4, kv_heads=0), "kv_heads=0 must be an int"),
        (lambda: SelfAttention(12, 8, heads=2, value_dim=3), r"output_dim=8 must be heads \* value_dim"),
        (lambda: SelfAttention(12, qk_norm="batch"), "qk_norm='batch' must be None, 'rms' or 'layer'"),
        (lambda: SelfAttention(12, similarity="cos"), "similarity='cos' must be"),
        (lambda: CrossAttention(12, context_dim=0), "context_dim=0 must be"),
        (lambda: CrossAttention(12, values_dim=-1), "values_dim=-1 must be"),
        (lambda: AttentionCore(2, 0), "head_dim=0 must be"),
        (lambda: from_linears((12, 8), (12, 8), (9, 8)), "v.in_features=9 must equal q.in_features=12"),
        (lambda: from_linears((12, 8), (12, 6), (12, 8)), r"k.out_features=6 must be kv_heads \* head_dim"),
        (
            lambda: from_linears((12, 8), (12, 8), (12, 8), heads=3),
            "q.out_features=8 must be a multiple of heads=3",
        ),
        (
            lambda: from_linears((12, 8), (12, 4), (12, 3), heads=4, kv_heads=2),
            "v.out_features=3 must be a multiple of kv_heads=2",
        ),
        (lambda: from_linears((12, 8), (12, 8), (12, 8), heads=0), "heads=0 must be"),
        (
            lambda: from_linears((12, 8), (12, 8), (12, 8), out=nn.Linear(7, 3)),
            r"out.in_features=7 must be heads \* value_dim = 8",
        ),
        (lambda: SelfAttention.from_linears(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2)), "k=Identity"),
        (
            lambda: SelfAttention.from_linears(nn.Linear(2, 2), nn.Linear(2, 2).half(), nn.Linear(2, 2)),
            "k's dtype torch.float16 must be that of the others, torch.float32",
        ),
        (lambda: SelfAttention.from_multihead_attention(nn.Linear(2, 2)), "mha=Linear must be"),
        (
            lambda: SelfAttention.from_multihead_attention(mha(kdim=5)),
            "use CrossAttention.from_multihead_attention",
        ),
    ],
)
def test_what_cannot_be_built_says_why(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def from_linears(q, k, v, **options):
    return SelfAttention.from_linears(nn.Linear(*q), nn.Linear(*k), nn.Linear(*v), **options)


@pytest.mark.parametrize("cls", [SelfAttention, CrossAttention])
@pytest.mark.parametrize(
    "options, words",
    [
        ({"add_bias_kv": True}, "add_bias_kv=True"),
        ({"add_zero_attn": True}, "add_zero_attn=True"),
    ],
)
def test_options_of_multihead_attention_that_are_not_built(cls, options, words):
    with pytest.raises(NotImplementedError, match=words):
        cls.from_multihead_attention(mha(**options))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m, c, w: m(torch.zeros(12)), r"x.shape=\(12,\) must be \[length, 12\]"),
        (lambda m, c, w: m(torch.zeros(2, 3, 4, 12)), r"x.shape=\(2, 3, 4, 12\) must be"),
        (lambda m, c, w: m(torch.zeros(5, 11)), r"x.shape=\(5, 11\) must be \[length, 12\]"),
        (
            lambda m, c, w: m(torch.zeros(5, 12).half()),
            "x.dtype=torch.float16 must be the module's, torch.float32",
        ),
        (lambda m, c, w: m(torch.zeros(5, 12, device="meta")), "x.device=meta must be the module's, cpu"),
        (
            lambda m, c, w: c(torch.zeros(5, 12), torch.zeros(5, 12)),
            r"context.shape=\(5, 12\) must be \[length, 6\]",
        ),
        (
            lambda m, c, w: c(torch.zeros(1, 5, 12), torch.zeros(5, 6)),
            "the same batch dimension, or both none",
        ),
        (lambda m, c, w: c(torch.zeros(2, 5, 12), torch.zeros(3, 5, 6)), "the same batch dimension"),
        (
            lambda m, c, w: c(torch.zeros(5, 12), torch.zeros(7, 6), values=torch.zeros(8, 6)),
            r"values.shape=\(8, 6\) must equal context.shape=\(7, 6\) in all but",
        ),
        (lambda m, c, w: w(torch.zeros(5, 12), torch.zeros(7, 6)), "values must be given"),
        (
            lambda m, c, w: w(torch.zeros(5, 12), torch.zeros(7, 6), values=torch.zeros(7, 6)),
            r"values.shape=\(7, 6\) must be \[length, 3\]",
        ),
    ],
)
def test_inputs_that_do_not_fit_say_why(call, words):
    self_attention = SelfAttention(12, 8)
    cross = CrossAttention(12, 8, context_dim=6)
    with_values = CrossAttention(12, 8, context_dim=6, values_dim=3)
    with pytest.raises(ValueError, match=words):
        call(self_attention, cross, with_values)
