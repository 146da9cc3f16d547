"""aten's flash attention ops with tilewise behind them, against float64: out, lse and gradients through
aten's own derivatives. Where no GPU is, the same functions are put behind the ops for CPU tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

import tilewise
from harness.gradients import assert_gradients_match
from harness.oracle import assert_matches
from tilewise.drop_in import flash_impl
from tilewise.drop_in.flash_state import seed_of
from tilewise.plan.passes import run_forward
from tilewise.plan.request import request_of

Tensor = torch.Tensor
HEADS, KV_HEADS, DIM = 2, 1, 8
STARTS, KV_STARTS = [0, 5, 5, 22, 23], [0, 3, 5, 25, 25]  # lengths (5, 0, 17, 1) and (3, 2, 20, 0)
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def installed(device):
    handle = flash_impl.activate("CUDA" if device.type == "cuda" else "CPU")
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        yield
    handle.remove()


def rows(device, batch=1, q_len=18, kv_len=18, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, dtype=torch.float32):
    """query, key and value [batch, length, heads, dim]."""
    shapes = ((q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads))
    return [
        torch.randn(batch, *shape, dim, device=device, dtype=dtype, requires_grad=True) for shape in shapes
    ]


def tokens(device, behind=0, dtype=torch.float32):
    """query, key and value [tokens, heads, dim], with so many rows of no sequence behind the last."""
    sizes = (
        (STARTS[-1] + behind, HEADS),
        (KV_STARTS[-1] + behind, KV_HEADS),
        (KV_STARTS[-1] + behind, KV_HEADS),
    )
    return [torch.randn(*size, DIM, device=device, dtype=dtype, requires_grad=True) for size in sizes]


def offsets(device) -> list[Tensor]:
    return [torch.tensor(starts, dtype=torch.int32, device=device) for starts in (STARTS, KV_STARTS)]


def heads_first(*given: Tensor) -> list[Tensor]:
    return [flash_impl.heads_first(x) for x in given]


def hold(inputs, out, lse, asked: dict, grads=None, do=None) -> None:
    """out [.., length, heads, dim], lse and gradients against float64, for what `asked` says in tilewise's
    words."""
    q, k, v = inputs
    dense = "q_offsets" not in asked
    request = request_of(*(heads_first(q, k, v) if dense else (q, k, v)), **asked, impl="portable")
    with torch.no_grad():
        assert_matches(*heads_first(out), lse if dense else lse[None], request)
    if grads is not None:
        found = dict(zip("qkv", heads_first(*grads), strict=True))
        dlse = torch.zeros(request.q.shape[:3], device=out.device)
        assert_gradients_match(found, request, *heads_first(do), dlse)


OPTIONS = {
    "plain": ({}, {}),
    "causal": (dict(is_causal=True), dict(mask=tilewise.Causal())),
    "scale": (dict(scale=0.7), dict(scale=0.7)),
    "scale below 0": (dict(scale=-0.7), dict(scale=-0.7)),
    "window": (dict(window_size_left=3, window_size_right=1), dict(mask=tilewise.Window(3, 1))),
    "window to the left": (
        dict(window_size_left=3, window_size_right=-1), dict(mask=tilewise.Window(3, None))
    ),
    "no window": (dict(window_size_left=-1, window_size_right=-1), {}),
    "causal window": (
        dict(is_causal=True, window_size_left=3, window_size_right=4), dict(mask=tilewise.Window(3, 0))
    ),
}  # fmt: skip


def flash(inputs, starts=(None, None), dropout_p=0.0, is_causal=False, **options):
    """The five results of the op."""
    sizes = (inputs[0].shape[1], inputs[1].shape[1]) if starts[0] is None else (17, 20)
    return aten._flash_attention_forward(*inputs, *starts, *sizes, dropout_p, is_causal, False, **options)


DENSE = [
    *[(name, (18, 5)) for name in OPTIONS],
    ("causal", (18, 18)),
    ("causal", (5, 18)),
    ("window", (5, 18)),
]


@pytest.mark.oldest
@pytest.mark.parametrize(("name", "sizes"), DENSE, ids=str)
def test_dense(name, sizes, device):
    options, asked = OPTIONS[name]
    inputs = rows(device, q_len=sizes[0], kv_len=sizes[1])
    out, lse, *_ = flash(inputs, **options)
    do = torch.randn_like(out)
    hold(inputs, out, lse, asked, torch.autograd.grad(out, inputs, do), do)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dense_in_16_bits(dtype, device):
    inputs = rows(device, dtype=dtype)
    out, lse, *_ = flash(inputs, is_causal=True)
    do = torch.randn_like(out)
    hold(inputs, out, lse, dict(mask=tilewise.Causal()), torch.autograd.grad(out, inputs, do), do)


@pytest.mark.oldest
@pytest.mark.parametrize(("name", "behind"), [("plain", 0), ("causal", 3), ("causal window", 0)])
def test_ragged(name, behind, device):
    (options, asked), inputs, starts = OPTIONS[name], tokens(device, behind), offsets(device)
    out, lse, *_ = flash(inputs, starts, **options)
    do = torch.randn_like(out)
    asked = asked | dict(q_offsets=starts[0], kv_offsets=starts[1])
    hold(inputs, out, lse, asked, torch.autograd.grad(out, inputs, do), do)


@pytest.mark.oldest
@pytest.mark.parametrize("is_ragged", [False, True])
def test_forward_and_backward_drop_the_pairs_of_the_state(is_ragged, device):
    starts = offsets(device) if is_ragged else (None, None)
    inputs = tokens(device) if is_ragged else rows(device)
    out, lse, state, *_ = flash(inputs, starts, dropout_p=0.3, is_causal=True)
    asked = dict(mask=tilewise.Causal(), dropout_p=0.3, dropout_seed=seed_of(state))
    if is_ragged:
        asked |= dict(q_offsets=starts[0], kv_offsets=starts[1])
    do = torch.randn_like(out)
    hold(inputs, out, lse, asked, torch.autograd.grad(out, inputs, do), do)
    assert not torch.equal(flash(inputs, starts, dropout_p=0.3, is_causal=True)[0], out)
    torch.manual_seed(7)
    one = flash(inputs, starts, dropout_p=0.3)
    torch.manual_seed(7)
    assert torch.equal(flash(inputs, starts, dropout_p=0.3)[0], one[0])


@pytest.mark.oldest
@pytest.mark.parametrize(("sizes", "dropout_p"), [((18, 18), 0.0), ((18, 5), 0.3)], ids=str)
def test_the_op_that_the_chooser_calls(sizes, dropout_p, device):
    q_len, kv_len = sizes
    inputs = [x.detach().transpose(1, 2).requires_grad_() for x in rows(device, q_len=q_len, kv_len=kv_len)]
    found = aten._scaled_dot_product_flash_attention(*inputs, dropout_p, True, scale=0.4)
    out, lse, state = found[0], found[1], found[6]
    assert found[2] is None and found[3] is None and found[4:6] == (q_len, kv_len)
    asked = dict(mask=tilewise.Causal(), scale=0.4)
    if dropout_p:
        asked |= dict(dropout_p=dropout_p, dropout_seed=seed_of(state))
    do = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, do)
    as_rows = [x.transpose(1, 2) for x in (*inputs, out, *grads, do)]
    hold(as_rows[:3], as_rows[3], lse, asked, as_rows[4:7], as_rows[7])


def test_the_backward_does_not_run_the_forward(monkeypatch, device):
    inputs = rows(device)
    out, *_ = flash(inputs, is_causal=True)
    monkeypatch.setattr("tilewise.plan.passes.launch_forward", lambda *_: pytest.fail("the forward ran"))
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(grad.isfinite().all() for grad in grads)


def test_an_infinite_lse_of_either_sign_is_a_row_that_sees_nothing(device):
    """FlashAttention says inf: a forward of its kernel may meet a backward of this one."""
    inputs = rows(device, q_len=18, kv_len=5)
    with torch.no_grad():
        out, lse, state, unused, _ = flash(inputs, is_causal=True)
        assert lse.isneginf().sum() == HEADS * 13
        given = (None, None, 18, 5, 0.0, True, state, unused)
        some = aten._flash_attention_backward(torch.ones_like(out), *inputs, out, lse, *given)
        theirs = aten._flash_attention_backward(
            torch.ones_like(out), *inputs, out, lse.where(lse.isfinite(), torch.inf), *given
        )
        assert all(map(torch.equal, some, theirs))
        request = request_of(*heads_first(*inputs), mask=tilewise.Causal(), impl="portable")
        _, _, kept = run_forward(request, return_lse=False, for_backward=True)
        for found in (flash_impl.statistics_of(lse), flash_impl.statistics_of(lse.abs())):
            assert torch.equal(found[:, :, :, :13], kept[:, :, :, :13])


# ---- Keys of which only some are there


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_only_the_used_keys(is_ragged, is_causal, device):
    mask = dict(mask=tilewise.Causal()) if is_causal else {}
    with torch.no_grad():
        if is_ragged:
            inputs, starts = tokens(device), offsets(device)
            used = torch.tensor([2, 0, 11, 0], dtype=torch.int32, device=device)
            out, lse, *_ = flash(inputs, starts, is_causal=is_causal, seqused_k=used)
            taken = [
                torch.arange(start, start + n) for start, n in zip(KV_STARTS, used.tolist(), strict=False)
            ]
            kept = torch.cat(taken).to(device)
            inputs = [inputs[0], *(x[kept] for x in inputs[1:])]
            ends = torch.cat([used.new_zeros(1), used.cumsum(0, dtype=torch.int32)])
            hold(inputs, out, lse, mask | dict(q_offsets=starts[0], kv_offsets=ends))
        else:
            inputs, used = rows(device, 2, q_len=3), torch.tensor([9, 0], dtype=torch.int32, device=device)
            out, lse, *_ = flash(inputs, is_causal=is_causal, seqused_k=used)
            hold(inputs, out, lse, mask | dict(kv_lens=used))


@pytest.mark.parametrize("num_splits", [None, 1, 2])
@pytest.mark.parametrize("by_offsets", [False, True])
def test_pages(by_offsets, num_splits, device):
    """Called as a function: PyTorch 2.11's op has no pages."""
    query = torch.randn(6, HEADS, DIM, device=device)
    key, value = torch.randn(2, 5, 16, KV_HEADS, DIM, device=device)
    table = torch.tensor([[4, 0], [1, 3]], dtype=torch.int32, device=device)
    used = torch.tensor([30, 17], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    lengths = dict(seqused_k=used)
    kv_starts = None
    if by_offsets:
        lengths, kv_starts = {}, torch.tensor([0, 30, 47], dtype=torch.int32, device=device)
    out, lse, *_ = flash_impl.flash_forward(
        query, key, value, starts, kv_starts, 4, 32, 0.0, True, False, block_table=table,
        num_splits=num_splits, **lengths,
    )  # fmt: skip
    asked = dict(mask=tilewise.Causal(), q_offsets=starts, kv_lens=used, pages=table)
    hold((query, key, value), out, lse, asked)
    dense = flash_impl.flash_forward(
        query.view(2, 3, HEADS, DIM), key, value, None, None, 3, 32, 0.0, True, False, block_table=table,
        seqused_k=used,
    )[0]  # fmt: skip
    by_hand = tilewise.cached_attention(
        query.view(2, 3, HEADS, DIM).transpose(1, 2), key, value, kv_lens=used, pages=table,
        mask=tilewise.Causal(),
    )  # fmt: skip
    torch.testing.assert_close(dense, by_hand.transpose(1, 2))


@pytest.mark.parametrize(("num_splits", "size"), [(None, None), (0, None), (1, 48), (2, 32), (99, 16)])
def test_one_split_walks_all_keys(num_splits, size, monkeypatch, device):
    """So that a sequence's bits do not depend on the batch, which PyTorch promises for num_splits=1."""
    query = torch.randn(1, 1, HEADS, DIM, device=device)
    key, value = torch.randn(2, 3, 16, KV_HEADS, DIM, device=device)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=device)
    splits, run = [], flash_impl.run_forward

    def noted(request, **options):
        splits.append(request.cache.split_size)
        return run(request, **options)

    monkeypatch.setattr(flash_impl, "run_forward", noted)
    given = (query, key, value, None, None, 1, 48, 0.0, False, False)
    used = torch.tensor([45], dtype=torch.int32, device=device)
    options = dict(seqused_k=used, block_table=table, num_splits=num_splits)
    out, lse, *_ = flash_impl.flash_forward(*given, **options)
    assert splits == [size]
    by_hand = tilewise.cached_attention(
        query.transpose(1, 2), key, value, kv_lens=used, pages=table, split_size=size
    )
    assert torch.equal(out.transpose(1, 2), by_hand) and lse.shape == (1, HEADS, 1)


@pytest.mark.parametrize("shape", [(HEADS,), (4, HEADS)], ids=str)
@pytest.mark.parametrize("with_used", [False, True])
def test_slopes(with_used, shape, device):
    inputs, starts, slopes = tokens(device), offsets(device), torch.rand(shape, device=device)
    full = torch.tensor(KV_STARTS, device=device).diff().int()
    options = dict(seqused_k=full) if with_used else {}
    with torch.no_grad():
        out, lse, *_ = flash(inputs, starts, alibi_slopes=slopes, **options)
        asked = dict(score=tilewise.ALiBi(slopes), q_offsets=starts[0], kv_offsets=starts[1])
        hold(inputs, out, lse, asked)


def test_the_op_that_fills_out(device):
    inputs = rows(device)
    with torch.no_grad():
        wanted, want_lse, *_ = flash(inputs, is_causal=True)
        out = torch.empty(HEADS, 1, 18, DIM, device=device).permute(1, 2, 0, 3)
        given = (None, None, 18, 18, 0.0, True, False)
        lse = flash_impl.flash_forward_inplace(out, *inputs, *given)
        assert torch.equal(out, wanted) and torch.equal(lse, want_lse)
        with pytest.raises(ValueError, match=r"out is \(1, 18, 8\).*it must be as query is"):
            flash_impl.flash_forward_inplace(out[:, :, 0], *inputs, *given)
        with pytest.raises(ValueError, match=r"dropout_p=0.3 must be 0.0"):
            flash_impl.flash_forward_inplace(out, *inputs, None, None, 18, 18, 0.3, True, False)


@pytest.mark.oldest
def test_varlen_attn_goes_through_it(device):
    inputs, starts = tokens(device), offsets(device)
    given = (*starts, 17, 20)
    # 2.11 takes the place of causal for a window; both say that nothing to the right is seen.
    results = [f(*inputs, *given, **more) for f, more in (
        (varlen.varlen_attn, dict(window_size=(-1, 0)) | GROUPED), (tilewise.compat.varlen_attn, OURS),
    )]  # fmt: skip
    do = torch.randn_like(results[0])
    for theirs, ours in zip(
        (results[0], *torch.autograd.grad(results[0], inputs, do)),
        (results[1], *torch.autograd.grad(results[1], inputs, do)),
        strict=True,
    ):
        torch.testing.assert_close(theirs, ours)


if hasattr(varlen, "varlen_attn_out"):  # PyTorch 2.12 and newer

    def test_varlen_attn_into_a_tensor_and_over_pages(device):
        inputs, starts = [x.detach() for x in tokens(device)], offsets(device)
        out = torch.empty_like(inputs[0])
        returned = varlen.varlen_attn_out(out, *inputs, *starts, 17, 20, window_size=(-1, 0), enable_gqa=True)
        wanted = flash(inputs, starts, is_causal=True)[0]
        assert torch.equal(out, wanted) and returned.data_ptr() == out.data_ptr()
        pages = torch.randn(2, 5, 16, KV_HEADS, DIM, device=device)
        table = torch.tensor([[4, 0], [1, 3], [2, 2], [0, 1]], dtype=torch.int32, device=device)
        used = torch.tensor([30, 17, 20, 5], dtype=torch.int32, device=device)
        given = (inputs[0], *pages, starts[0], None, 17, 32)
        more = dict(window_size=(-1, 0), enable_gqa=True, seqused_k=used, block_table=table)
        for theirs, ours in zip(
            varlen.varlen_attn(*given, **more, return_aux=varlen.AuxRequest(lse=True)),
            tilewise.compat.varlen_attn(*given, **more, return_aux=tilewise.compat.AuxRequest(lse=True)),
            strict=True,
        ):
            torch.testing.assert_close(theirs, ours)


GROUPED = dict(enable_gqa=True) if "enable_gqa" in varlen.varlen_attn.__kwdefaults__ else {}
OURS = dict(window_size=(-1, 0), enable_gqa=True)


# ---- What PyTorch's compiler counts on

LAYOUTS = {
    "rows": lambda d: torch.randn(2, 5, HEADS, DIM, device=d),
    "heads": lambda d: torch.randn(2, HEADS, 5, DIM, device=d).transpose(1, 2),
    "one of three": lambda d: torch.randn(2, 5, 3, HEADS, DIM, device=d)[:, :, 1],
    "dim outermost": lambda d: torch.randn(DIM, 2, 5, HEADS, device=d).permute(1, 2, 3, 0),
    "expanded": lambda d: torch.randn(1, 5, 1, DIM, device=d).expand(2, 5, HEADS, DIM),
    "one of everything": lambda d: torch.randn(1, 1, 1, DIM, device=d).transpose(0, 1),
    "every other": lambda d: torch.randn(2, 5, HEADS, 2 * DIM, device=d)[..., ::2],
}


def described(results) -> list:
    return [
        (tuple(x.shape), x.dtype, x.stride(), x.device.type) if isinstance(x, Tensor) else x for x in results
    ]


@pytest.mark.oldest
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["rows", "heads", "ragged"])
def test_results_are_what_the_meta_functions_promise(kind, layout, device):
    x = LAYOUTS[layout](device)
    starts = (None, None)
    if kind == "heads":
        x = x.transpose(1, 2)
    if kind == "ragged":
        x, starts = x[0], 2 * (torch.tensor([0, x.shape[1]], dtype=torch.int32, device=device),)

    def step(q, k, v, do, *starts):
        if kind == "heads":
            found = aten._scaled_dot_product_flash_attention(q, k, v, 0.3, True)
            more = (*found[2:6], 0.3, True, *found[6:8])
            return *found, *aten._scaled_dot_product_flash_attention_backward(do, q, k, v, *found[:2], *more)
        found = flash((q, k, v), starts, 0.3, True)
        more = (*starts, 5, 5, 0.3, True, *found[2:4])
        return *found, *aten._flash_attention_backward(do, q, k, v, *found[:2], *more)

    given = (x, x.clone(memory_format=torch.preserve_format), x.contiguous(), torch.randn_like(x), *starts)
    real = step(*given)
    with FakeTensorMode() as mode:
        fake = step(*(t if t is None else mode.from_tensor(t) for t in given))
    assert described(real) == described(fake)


@pytest.mark.oldest
def test_compiled_graphs_have_the_same_bits(device):
    inputs = [x.detach().transpose(1, 2).requires_grad_() for x in rows(device)]

    def attend(q, k, v):
        return 2 * aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=0.4)[0]

    do = torch.randn_like(inputs[0])
    wanted = attend(*inputs)
    want = (wanted, *torch.autograd.grad(wanted, inputs, do))
    found = torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs)
    assert all(map(torch.equal, want, (found, *torch.autograd.grad(found, inputs, do))))


def test_autocast_leaves_the_dtype_to_the_op(device):
    inputs = rows(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, *_ = flash(inputs)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert {x.dtype for x in (out, *grads)} == {torch.float32}


@pytest.mark.parametrize("name", ["seqused_k", "alibi_slopes"])
def test_no_gradient_where_the_backward_is_not_told(name, device):
    inputs = rows(device)
    given = dict(seqused_k=torch.tensor([3], device=device), alibi_slopes=torch.rand(HEADS, device=device))
    with pytest.raises(NotImplementedError, match=f"{name}: the backward"):
        flash(inputs, **{name: given[name]})
    with torch.no_grad():
        flash(inputs, **{name: given[name]})
    flash([x.detach() for x in inputs], **{name: given[name]})
