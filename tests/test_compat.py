"""The functions of other libraries: their signatures, and what their documentation says."""

import inspect

import pytest
import torch
from torch.nn.attention import varlen

import tilewise
from harness.gradients import assert_gradients_match, trained
from harness.interpreted import set_interpreted
from harness.oracle import _assert_close, errors_of_pytorch, exact
from tilewise import ALiBi, Softcap, compat
from tilewise.plan.request import Request, make_request

Tensor = torch.Tensor
BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 8
LENGTHS, KV_LENGTHS = (5, 0, 17, 1), (3, 2, 20, 0)


@pytest.fixture(autouse=True)
def small_tiles():
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        yield


# ---- Signatures

OPTIONS_2_8 = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
OFFSETS_2_8 = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    # flash-attn 2.8.3
    "flash_attn_func": f"q, k, v, {OPTIONS_2_8}",
    "flash_attn_kvpacked_func": f"q, kv, {OPTIONS_2_8}",
    "flash_attn_qkvpacked_func": f"qkv, {OPTIONS_2_8}",
    "flash_attn_varlen_func": f"q, k, v, {OFFSETS_2_8}, {OPTIONS_2_8}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {OFFSETS_2_8}, {OPTIONS_2_8}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {OPTIONS_2_8}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
    # PyTorch 2.12 and 2.13; 2.11 ends with window_size
    "varlen_attn": (
        "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, "
        "window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None"
    ),
}


def parameters(function) -> list[tuple]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


@pytest.mark.oldest
@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    scope: dict = {}
    exec(f"def {name}({SIGNATURES[name]}): ...", scope)
    assert parameters(getattr(compat, name)) == parameters(scope[name])


def test_every_function_has_its_signature_written_here():
    assert {*compat.__all__} == {*SIGNATURES, "AuxRequest"}
    assert tilewise.compat is compat


@pytest.mark.oldest
def test_signature_is_that_of_the_installed_pytorch():
    """An older one may have fewer arguments; one that ours lacks is a drift to look at."""
    theirs, ours = parameters(varlen.varlen_attn), parameters(compat.varlen_attn)
    assert theirs == ours[: len(theirs)] and len(theirs) >= 10
    assert varlen.AuxRequest._field_defaults == compat.AuxRequest._field_defaults


# ---- What FlashAttention's documentation says, pair by pair

OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(2, 1)),
    "window to the left": dict(window_size=(2, -1)),
    "window to the right": dict(window_size=(-1, 1)),
    "window of two keys": dict(window_size=(1, 0)),
    "window beyond all keys": dict(window_size=(2**31 - 1, 2)),
    "causal window": dict(causal=True, window_size=[3, 4]),
    "scale": dict(softmax_scale=0.7),
    "softcap": dict(softcap=0.7),
    "no softcap below 0": dict(softcap=-1.0),
    "alibi": dict(alibi_slopes=(HEADS,)),
    "alibi of each batch": dict(alibi_slopes=(BATCH, HEADS)),
    "all": dict(
        softmax_scale=0.7, causal=True, window_size=(4, -1), softcap=0.7, alibi_slopes=(HEADS,),
        deterministic=True,
    ),
}  # fmt: skip


def with_slopes(options: dict, device, batch: int = BATCH) -> dict:
    """The options with slopes in place of their shape."""
    shape = options.get("alibi_slopes")
    if shape is None:
        return options
    shape = (batch, HEADS) if len(shape) == 2 else shape
    return options | dict(alibi_slopes=torch.rand(shape, device=device, requires_grad=True))


def documented_pairs(q_len: int, kv_len: int, device, causal=False, window_size=(-1, -1), **_) -> Tensor:
    """Query i sees keys from i + kv_len - q_len - left to i + kv_len - q_len + right, both included."""
    row = torch.arange(q_len, device=device)[:, None] + kv_len - q_len
    key = torch.arange(kv_len, device=device)
    left, right = window_size
    keep = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if left >= 0:
        keep &= key >= row - left
    if causal or right >= 0:
        keep &= key <= row + (0 if causal else right)
    return keep


def documented(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Request:
    """The same call of `attention`, with a bool tensor for everything that says who sees what."""
    score = [Softcap(options["softcap"])] if options.get("softcap", 0) > 0 else []
    if "alibi_slopes" in options:
        score.append(ALiBi(options["alibi_slopes"]))
    return make_request(
        *(x.detach().transpose(1, 2) for x in (q, k, v)),
        mask=documented_pairs(q.shape[1], k.shape[1], q.device, **options),
        score=score,
        scale=options.get("softmax_scale"),
    )


def rows(device, *sizes: int) -> Tensor:
    return torch.randn(BATCH, *sizes, DIM, device=device, requires_grad=True)


def assert_documented(call, given, q, k, v, options) -> None:
    """That call(*given) answers for q, k and v made of `given`, and its gradients do."""
    out = call(*given, **options)
    assert out.shape == q.shape and out.is_contiguous()
    do = torch.randn_like(out)
    request = documented(q, k, v, options)
    leaves = [q, k, v]
    names = ["q", "k", "v"]
    for name, tensor in trained(request).items():
        names.append(name)
        leaves.append(tensor)
    gradients = torch.autograd.grad(out, leaves, do)
    with torch.no_grad():
        want, want_lse = exact(request)
        error, _ = errors_of_pytorch(request, want, want_lse)
        _assert_close("out", out.detach().transpose(1, 2), want, error)
    found = dict(zip(names, gradients, strict=True))
    found |= {name: found[name].transpose(1, 2) for name in "qkv"}
    dlse = torch.zeros(BATCH, HEADS, q.shape[1], device=q.device)
    assert_gradients_match(found, request, do.transpose(1, 2), dlse)


@pytest.mark.in_turns
@pytest.mark.parametrize("lengths", [(5, 5), (5, 8), (8, 5), (1, 6)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_func(name, lengths, device):
    options = with_slopes(OPTIONS[name], device)
    q, k, v = rows(device, lengths[0], HEADS), *(rows(device, lengths[1], KV_HEADS) for _ in "kv")
    assert_documented(compat.flash_attn_func, (q, k, v), q, k, v, options)


@pytest.mark.in_turns
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_into_one_tensor(name, device):
    """Out and gradients, in one tensor, are those of the parts, to the bit."""
    options = with_slopes(OPTIONS[name], device)
    q, kv, qkv = rows(device, 5, HEADS), rows(device, 8, 2, KV_HEADS), rows(device, 5, 3, HEADS)
    for packed, parts, given in (
        (compat.flash_attn_kvpacked_func, (q, *kv.unbind(2)), (q, kv)),
        (compat.flash_attn_qkvpacked_func, qkv.unbind(2), (qkv,)),
    ):
        out, want = packed(*given, **options), compat.flash_attn_func(*parts, **options)
        do = torch.randn_like(out)
        assert out.is_contiguous() and torch.equal(out, want)
        for one, other in zip(*(torch.autograd.grad(x, given, do) for x in (out, want)), strict=True):
            assert one.any() and torch.equal(one, other)


def test_a_window_of_zero_is_the_key_at_the_same_place(device):
    q, k, v = rows(device, 5, HEADS), rows(device, 5, HEADS), rows(device, 5, HEADS)
    assert torch.equal(compat.flash_attn_func(q, k, v, window_size=(0, 0)), v)


@pytest.mark.oldest
def test_rows_above_the_first_key_are_zero(device):
    """The picture in its documentation: 5 queries, 2 keys."""
    q, k, v = rows(device, 5, HEADS), rows(device, 2, HEADS), rows(device, 2, HEADS)
    out = compat.flash_attn_func(q, k, v, causal=True)
    assert (out[:, :3] == 0).all() and torch.equal(out[:, 3], v[:, 0])
    assert out[:, 4].any()


def test_dropout_is_that_of_attention(device):
    q, k, v = rows(device, 5, HEADS), rows(device, 8, KV_HEADS), rows(device, 8, KV_HEADS)
    torch.manual_seed(7)
    out = compat.flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(7)
    want = tilewise.attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.5).transpose(1, 2)
    assert torch.equal(out, want)
    assert not torch.equal(out, compat.flash_attn_func(q, k, v))


# ---- Sequences one behind the other


def offsets(lengths: tuple[int, ...], device, dtype=torch.int32) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def tokens(device, lengths: tuple[int, ...], *sizes: int) -> Tensor:
    return torch.randn(sum(lengths), *sizes, DIM, device=device, requires_grad=True)


def one_by_one(q, k, v, lengths, kv_lengths, options) -> Tensor:
    """What each sequence gives alone."""
    outs = []
    parts = zip(q.split(lengths), k.split(kv_lengths), v.split(kv_lengths), strict=True)
    for batch, (q_one, k_one, v_one) in enumerate(parts):
        own = dict(options)
        if "alibi_slopes" in own and own["alibi_slopes"].dim() == 2:
            own["alibi_slopes"] = own["alibi_slopes"][batch]
        outs.append(compat.flash_attn_func(q_one[None], k_one[None], v_one[None], **own)[0])
    return torch.cat(outs)


def assert_close(got: Tensor, want: Tensor) -> None:
    """Other tiles, so other roundings: those of sums of up to 20 numbers of size 1."""
    torch.testing.assert_close(got, want, rtol=0, atol=64 * 2.0**-23 * max(1.0, want.abs().max().item()))


def assert_same(out: Tensor, want: Tensor, leaves) -> None:
    do = torch.randn_like(want)
    assert_close(out, want)
    for got, wanted in zip(*(torch.autograd.grad(x, leaves, do) for x in (out, want)), strict=True):
        assert wanted.any()
        assert_close(got, wanted)


@pytest.mark.in_turns
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_varlen_func(name, device):
    options = with_slopes(OPTIONS[name], device, len(LENGTHS))
    q, k, v = tokens(device, LENGTHS, HEADS), *(tokens(device, KV_LENGTHS, KV_HEADS) for _ in "kv")
    starts = offsets(LENGTHS, device), offsets(KV_LENGTHS, device)
    out = compat.flash_attn_varlen_func(q, k, v, *starts, max(LENGTHS), max(KV_LENGTHS), **options)
    leaves = [q, k, v, *(x for x in options.values() if isinstance(x, Tensor))]
    assert_same(out, one_by_one(q, k, v, LENGTHS, KV_LENGTHS, options), leaves)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_sequences_packed_into_one_tensor(name, device):
    options = with_slopes(OPTIONS[name], device)
    q, kv = tokens(device, LENGTHS, HEADS), tokens(device, KV_LENGTHS, 2, KV_HEADS)
    starts = offsets(LENGTHS, device), offsets(KV_LENGTHS, device, torch.int64)
    out = compat.flash_attn_varlen_kvpacked_func(q, kv, *starts, 17, 20, **options)
    assert_same(out, one_by_one(q, *kv.unbind(1), LENGTHS, KV_LENGTHS, options), (q, kv))
    qkv = tokens(device, LENGTHS, 3, HEADS)
    out = compat.flash_attn_varlen_qkvpacked_func(qkv, starts[0], 17, **options)
    assert_same(out, one_by_one(*qkv.unbind(1), LENGTHS, LENGTHS, options), (qkv,))


def test_one_tensor_of_offsets_for_tensors_with_different_rows_behind(device):
    q, k, v = tokens(device, (9,), HEADS), tokens(device, (8,), HEADS), tokens(device, (8,), HEADS)
    starts = offsets((3, 4), device)
    out = compat.flash_attn_varlen_func(q, k, v, starts, starts, 4, 4, causal=True)
    want = compat.flash_attn_varlen_func(q[:7], k[:7], v[:7], starts, starts, 4, 4, causal=True)
    assert_close(out[:7], want)
    assert (out[7:] == 0).all()


WINDOWS = [(-1, -1), (-1, 0), (3, 0), (2, 1), (2, -1)]


@pytest.mark.parametrize("window_size", WINDOWS, ids=str)
def test_varlen_attn(window_size, device):
    """PyTorch's function is FlashAttention's under other names: (-1, 0) is causal, at the bottom right."""
    q, k, v = tokens(device, LENGTHS, HEADS), *(tokens(device, KV_LENGTHS, KV_HEADS) for _ in "kv")
    given = q, k, v, offsets(LENGTHS, device), offsets(KV_LENGTHS, device), 17, 20
    out = compat.varlen_attn(*given, scale=0.7, window_size=window_size, enable_gqa=True, num_splits=1)
    options = dict(causal=window_size == (-1, 0), softmax_scale=0.7, window_size=window_size)
    assert torch.equal(out, compat.flash_attn_varlen_func(*given, **options))
    assert_same(out, one_by_one(q, k, v, LENGTHS, KV_LENGTHS, options), (q, k, v))


class OtherRequest:
    """As PyTorch's own AuxRequest is another class."""

    lse = True


@pytest.mark.parametrize(
    "request_of", [lambda: compat.AuxRequest(lse=True), OtherRequest], ids=["ours", "theirs"]
)
def test_varlen_attn_returns_lse(request_of, device):
    """[heads, tokens], with its gradient."""
    q, k, v = (tokens(device, LENGTHS, HEADS) for _ in "qkv")
    starts = offsets(LENGTHS, device)
    out, lse = compat.varlen_attn(q, k, v, starts, starts, 17, 17, return_aux=request_of())
    want = tilewise.packed_attention(q, k, v, q_offsets=starts, return_lse=True)
    assert lse.shape == (HEADS, sum(LENGTHS)) and lse.dtype == torch.float32
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    assert torch.autograd.grad(lse.sum(), q)[0].any()
    assert isinstance(
        compat.varlen_attn(q, k, v, starts, starts, 17, 17, return_aux=compat.AuxRequest()), Tensor
    )


@pytest.mark.parametrize(
    ("dtype", "window_size"),
    [*((torch.int32, window) for window in WINDOWS), (torch.int64, WINDOWS[-1])],
    ids=str,
)
def test_only_the_used_keys_of_each_sequence(dtype, window_size, device):
    """The last query stands at the last key that is used; a count beyond the sequence is its length."""
    used = (2, 0, 13, 0)
    q, k, v = tokens(device, LENGTHS, HEADS), *(tokens(device, KV_LENGTHS, HEADS) for _ in "kv")
    starts, kv_starts = offsets(LENGTHS, device), offsets(KV_LENGTHS, device)
    unused = [range(start + n, end) for start, n, end in zip(kv_starts, used, kv_starts[1:], strict=False)]
    with torch.no_grad():
        k[[i for each in unused for i in each]] = torch.nan
    given = torch.tensor((2, 0, 13, 5), dtype=dtype, device=device)
    out = compat.varlen_attn(q, k, v, starts, kv_starts, 17, 20, seqused_k=given, window_size=window_size)
    lengths = zip(k.split(KV_LENGTHS), v.split(KV_LENGTHS), used, strict=True)
    k_used, v_used = map(torch.cat, zip(*((k[:n], v[:n]) for k, v, n in lengths), strict=True))
    want = compat.varlen_attn(
        q, k_used, v_used, starts, offsets(used, device), 17, 13, window_size=window_size
    )
    assert_same(out, want, (q, k, v))


# ---- Plain PyTorch, and torch.compile


@pytest.mark.oldest
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_flash_attn_func_in_plain_pytorch(is_compiled, device, monkeypatch, forget_graphs):
    q, k, v = rows(device, 5, HEADS), rows(device, 8, KV_HEADS), rows(device, 8, KV_HEADS)
    given = q, k, v, torch.rand(HEADS, device=device), None
    want = flash(*given)
    set_interpreted(monkeypatch, False)
    call = torch.compile(flash, fullgraph=True, backend="aot_eager") if is_compiled else flash
    assert_same(call(*given), want, (q, k, v))


@pytest.mark.parametrize("call", ["flash_varlen", "varlen_with_used"])
def test_sequences_in_plain_pytorch(call, device, monkeypatch):
    q, k, v = rows(device, 6, HEADS), rows(device, 6, KV_HEADS), rows(device, 6, KV_HEADS)
    given = q, k, v, torch.rand(HEADS, device=device), offsets((5, 0, 7), device)
    want = globals()[call](*given)
    set_interpreted(monkeypatch, False)
    assert_same(globals()[call](*given), want, (q, k, v))


@pytest.fixture
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def flash(q, k, v, slopes, _):
    return compat.flash_attn_func(
        q, k, v, softmax_scale=0.7, causal=True, window_size=(4, -1), softcap=0.7, alibi_slopes=slopes
    )


def flash_varlen(q, k, v, slopes, starts):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return compat.flash_attn_varlen_func(
        q, k, v, starts, starts, 6, 6, causal=True, softcap=0.7, alibi_slopes=slopes
    )


def varlen_with_used(q, k, v, slopes, starts):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    used = starts.diff() - 1
    return compat.varlen_attn(
        q, k, v, starts, starts, 6, 6, window_size=(-1, 0), enable_gqa=True, seqused_k=used
    )


@pytest.mark.in_turns
@pytest.mark.oldest
@pytest.mark.parametrize("call", [flash, flash_varlen, varlen_with_used], ids=lambda call: call.__name__)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_same_bits_compiled(call, dynamic, device, forget_graphs):
    q, k, v = rows(device, 6, HEADS), rows(device, 6, KV_HEADS), rows(device, 6, KV_HEADS)
    given = q, k, v, torch.rand(HEADS, device=device), offsets((5, 0, 7), device)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got, want = compiled(*given), call(*given)
    do = torch.randn_like(want)
    assert want.any() and torch.equal(got, want)
    for one, other in zip(*(torch.autograd.grad(x, (q, k, v), do) for x in (got, want)), strict=True):
        assert one.any() and torch.equal(one, other)
