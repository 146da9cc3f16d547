"""The functions of other libraries refuse in the caller's words."""

import pytest
import torch

from harness.interpreted import set_interpreted
from tilewise import compat

Q, KV = (2, 5, 4, 8), (2, 7, 2, 8)
DENSE = dict(q=Q, k=KV, v=KV)
SEQUENCES = dict(
    q=(5, 4, 8), k=(7, 2, 8), v=(7, 2, 8), cu_seqlens_q=[0, 2, 5], cu_seqlens_k=[0, 4, 7],
    max_seqlen_q=3, max_seqlen_k=4,
)  # fmt: skip
TORCH = dict(
    query=(5, 4, 8), key=(7, 4, 8), value=(7, 4, 8), cu_seq_q=[0, 2, 5], cu_seq_k=[0, 4, 7], max_q=3, max_k=4
)
WRONG = [
    ("flash_attn_func", DENSE, dict(window_size=(3,)), ValueError, ("window_size=(3,)", "(left, right)")),
    ("flash_attn_func", DENSE, dict(window_size=None), ValueError, ("window_size=None", "two ints")),
    ("flash_attn_func", DENSE, dict(window_size=[-2, 0]), ValueError, ("window_size=[-2, 0]", "-1")),
    ("flash_attn_func", DENSE, dict(window_size=(1.0, 0)), ValueError, ("window_size=(1.0, 0)", "ints")),
    ("flash_attn_func", DENSE, dict(softmax_scale="big"), ValueError, ("softmax_scale=big",)),
    ("flash_attn_func", DENSE, dict(softcap=float("nan")), ValueError, ("softcap=nan",)),
    ("flash_attn_func", DENSE, dict(softcap=None), ValueError, ("softcap=None", "0.0")),
    ("flash_attn_func", DENSE, dict(dropout_p=1.5), ValueError, ("dropout_p=1.5",)),
    ("flash_attn_func", DENSE, dict(alibi_slopes=(3,)), ValueError, ("alibi_slopes.shape=(3,)", "(2, 4)")),
    ("flash_attn_func", DENSE, dict(alibi_slopes=0.5), ValueError, ("alibi_slopes=0.5", "tensor")),
    ("flash_attn_func", DENSE, dict(q=(5, 4, 8)), ValueError, ("q.shape=(5, 4, 8)", "[batch, length, heads")),
    ("flash_attn_func", DENSE, dict(v=None), ValueError, ("v is a NoneType", "[batch, length, heads, dim]")),
    ("flash_attn_func", DENSE, dict(k=(2, 7, 3, 8)), ValueError, ("4 heads", "multiple of 3")),
    ("flash_attn_func", DENSE, dict(k=(2, 6, 2, 8)), ValueError, ("lengths k: 6, v: 7",)),
    ("flash_attn_func", DENSE, dict(return_attn_probs=True), NotImplementedError, (
        "return_attn_probs=True", "return_lse=True", "tilewise.attention", "dropout_mask")),
    ("flash_attn_qkvpacked_func", dict(qkv=(2, 5, 3, 4, 8)), dict(qkv=(2, 5, 4, 3, 8)), ValueError, (
        "qkv.shape=(2, 5, 4, 3, 8)", "[batch, length, 3, heads, dim]")),
    ("flash_attn_kvpacked_func", dict(q=Q, kv=(2, 7, 2, 2, 8)), dict(kv=KV), ValueError, (
        "kv.shape=(2, 7, 2, 8)", "[batch, length, 2, heads, dim]")),
    ("flash_attn_varlen_qkvpacked_func", dict(qkv=(5, 3, 4, 8), cu_seqlens=[0, 2, 5], max_seqlen=3),
     dict(cu_seqlens=0.5), ValueError, ("cu_seqlens=0.5", "torch.int32")),
    ("flash_attn_varlen_func", SEQUENCES, dict(cu_seqlens_q=[0]), ValueError, ("cu_seqlens_q.shape=(1,)",)),
    ("flash_attn_varlen_func", SEQUENCES, dict(cu_seqlens_k=[0, 7]), ValueError, (
        "cu_seqlens_q.shape=(3,)", "cu_seqlens_k.shape=(2,)")),
    ("flash_attn_varlen_func", SEQUENCES, dict(q=Q), ValueError, ("q.shape=", "[tokens, heads, dim]")),
    ("flash_attn_varlen_func", SEQUENCES, dict(block_table=[0]), ValueError, (
        "k.shape=(7, 2, 8)", "[pages, page_size, heads, dim]")),
    ("varlen_attn", TORCH, dict(window_size=(1, 2, 3)), ValueError, ("window_size=(1, 2, 3)",)),
    ("varlen_attn", TORCH, dict(cu_seq_k=None), ValueError, ("cu_seq_k=None",)),
    ("varlen_attn", TORCH, dict(cu_seq_q=0.5), ValueError, ("cu_seq_q=0.5", "torch.int32")),
    ("varlen_attn", TORCH, dict(seqused_k=[4]), ValueError, ("seqused_k.shape=(1,)", "[batch]")),
    ("varlen_attn", TORCH, dict(seqused_k=0.5), ValueError, ("seqused_k=0.5", "torch.int32")),
    ("varlen_attn", TORCH, dict(seqused_k=[4, 3], cu_seq_k=None), ValueError, ("cu_seq_k=None",)),
    ("varlen_attn", TORCH, dict(block_table=[0]), ValueError, ("key.shape=(7, 4, 8)", "[pages, page_size")),
    ("varlen_attn", TORCH, dict(block_table=[0], key=(2, 8, 4, 8), value=(2, 8, 4, 8)), ValueError, (
        "seqused_k=None", "torch.int32")),
    ("varlen_attn", TORCH, dict(query=(5, 8, 8)), ValueError, ("8 heads", "enable_gqa=True")),
    ("varlen_attn", TORCH, dict(query=(5, 6, 8), enable_gqa=True), ValueError, ("6 heads", "multiple of 4")),
    ("varlen_attn", TORCH, dict(key=(7, 4, 6)), ValueError, ("head_dim of query: 8, key: 6",)),
    ("varlen_attn", TORCH, dict(scale=float("inf")), ValueError, ("scale=inf",)),
]  # fmt: skip


def made(name: str, value, device):
    """Shapes as tensors of zeros, lists as tensors of offsets."""
    if isinstance(value, list) and name != "window_size":
        return torch.tensor(value, dtype=torch.int32, device=device)
    return torch.zeros(value, device=device) if isinstance(value, tuple) and name != "window_size" else value


@pytest.mark.parametrize(
    "name, arguments, changes, error, words",
    WRONG,
    ids=[f"{w[0]}-{w[4][0]}-{i}" for i, w in enumerate(WRONG)],
)
def test_errors_name_the_argument(name, arguments, changes, error, words, device, nothing_runs):
    given = {each: made(each, value, device) for each, value in (arguments | changes).items()}
    with pytest.raises(error) as raised:
        getattr(compat, name)(**given)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("name, arguments, last", [
    ("flash_attn_varlen_func", SEQUENCES, "cu_seqlens_k"), ("varlen_attn", TORCH, "cu_seq_k")
])  # fmt: skip
def test_plain_pytorch_names_the_offsets_that_lead_outside(name, arguments, last, monkeypatch):
    set_interpreted(monkeypatch, False)
    given = {each: made(each, value, "cpu") for each, value in (arguments | {last: [0, 4, 9]}).items()}
    with pytest.raises(ValueError, match=rf"{last}\[2\]=9 is outside the 7 tokens"):
        getattr(compat, name)(**given)
