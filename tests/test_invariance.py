"""Same inputs, same bits: a result does not depend on repeats, neighbours, padding, order or old memory."""

import itertools
from typing import Any

import pytest
import torch

import tilewise

ON_GPU = torch.cuda.is_available()
REPEATS = 200 if ON_GPU else 2
BATCH, Q_HEADS, KV_HEADS, Q_LEN, KV_LEN, DIM = (4, 8, 2, 200, 333, 64) if ON_GPU else (2, 4, 2, 19, 35, 8)
DTYPES = [torch.float32, torch.bfloat16]
U = 2.0**-24  # half a unit in the last place of fp32


@pytest.fixture(autouse=True)
def small_tiles():
    with tilewise.tiles.use(tilewise.tiles.Tile(16, 16)):
        yield


def qkv(device, dtype=torch.float32, q_len=Q_LEN, kv_len=KV_LEN) -> tuple[torch.Tensor, ...]:
    shapes = ((Q_HEADS, q_len), (KV_HEADS, kv_len), (KV_HEADS, kv_len))
    return tuple(torch.randn(BATCH, *shape, DIM, device=device).to(dtype) for shape in shapes)


def run(*tensors: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tilewise.attention(*tensors, **arguments, return_lse=True, impl="portable")


def gradients(*tensors: torch.Tensor, do: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, ...]:
    """The gradients of q, k, v and every other float tensor given, from out and lse together."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    floats = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    own = {name: x.detach().requires_grad_() for name, x in floats.items()}
    out, lse = run(*leaves, **(arguments | own))
    return torch.autograd.grad((out, lse), [*leaves, *own.values()], (do, torch.ones_like(lse)))


def gradient_of_out(device, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(BATCH, Q_HEADS, Q_LEN, DIM, device=device).to(dtype)


def assert_same_bits(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def everything(device) -> dict[str, Any]:
    """A call in which every part of the kernel has work."""
    return dict(
        mask=tilewise.Causal("bottom_right") & tilewise.Documents(torch.arange(Q_LEN, device=device) // 7,
                                                                  torch.arange(KV_LEN, device=device) // 11),
        score=[tilewise.Softcap(3.0), tilewise.ALiBi(tilewise.alibi_slopes(Q_HEADS, device), "bottom_right")],
        bias=torch.randn(Q_HEADS, 1, KV_LEN, device=device),
        similarity="cosine",
        sink=torch.randn(Q_HEADS, device=device),
    )  # fmt: skip


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [False, True], ids=["plain", "everything"])
def test_repeats_give_the_same_bits(dtype, features, device):
    tensors, arguments = qkv(device, dtype), everything(device) if features else {}
    first = run(*tensors, **arguments)
    for _ in range(REPEATS - 1):
        assert_same_bits(run(*tensors, **arguments), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_row_ignores_its_neighbours(dtype, device):
    """Alone, beside others, or beside NaN: the same bits."""
    tensors = qkv(device, dtype)
    out, lse = run(*tensors, mask=tilewise.Causal())
    for row in range(BATCH):
        alone = run(*(t[row : row + 1] for t in tensors), mask=tilewise.Causal())
        assert_same_bits(alone, (out[row : row + 1], lse[row : row + 1]))
    spoilt = [t.clone() for t in tensors]
    for t in spoilt:
        t[1:] = torch.nan
    assert_same_bits([x[:1] for x in run(*spoilt, mask=tilewise.Causal())], (out[:1], lse[:1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal, as_tensor", [(False, False), (True, True)])
def test_padding_on_the_right_changes_no_bit(dtype, causal, as_tensor, device):
    """The real keys lie in the same tiles, so nothing may differ, whatever the padding holds."""
    q, k, v = qkv(device, dtype)
    corner = tilewise.Causal("top_left")
    want = run(q, k, v, mask=corner if causal else None)
    length = torch.tensor([KV_LEN] * BATCH, device=device) if as_tensor else KV_LEN
    for more in (1, 29):
        filling = torch.full((BATCH, KV_HEADS, more, DIM), torch.nan, device=device, dtype=dtype)
        padded = [torch.cat([t, filling], dim=2) for t in (k, v)]
        mask = tilewise.Padding(length)
        assert_same_bits(run(q, *padded, mask=mask & corner if causal else mask), want)


def test_padding_on_the_left_by_whole_tiles_changes_no_bit(device):
    q, k, v = qkv(device)
    filling = torch.full((BATCH, KV_HEADS, 32, DIM), torch.nan, device=device)
    padded = [torch.cat([filling, t], dim=2) for t in (k, v)]
    assert_same_bits(run(q, *padded, mask=tilewise.Padding(KV_LEN, "left")), run(q, k, v))


def test_padded_queries_change_no_bit_of_the_others(device):
    q, k, v = qkv(device)
    out, lse = run(q, k, v, mask=tilewise.Causal("top_left"))
    longer = torch.cat([q, torch.full((BATCH, Q_HEADS, 13, DIM), torch.nan, device=device)], dim=2)
    more_out, more_lse = run(longer, k, v, mask=tilewise.Causal("top_left"))
    assert_same_bits((more_out[:, :, :Q_LEN], more_lse[:, :, :Q_LEN]), (out, lse))


# ---- The same of gradients


def lengthened(x: torch.Tensor, more: int, fill: float = torch.nan) -> torch.Tensor:
    """x with `more` rows of this number behind it."""
    return torch.cat(
        [x, torch.full((*x.shape[:2], more, x.shape[3]), fill, device=x.device, dtype=x.dtype)], dim=2
    )


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [False, True], ids=["plain", "everything"])
def test_repeated_gradients_have_the_same_bits(dtype, features, device):
    tensors, arguments = qkv(device, dtype), {"do": gradient_of_out(device, dtype)}
    if features:
        arguments |= everything(device) | {"dropout_p": 0.2, "dropout_seed": torch.tensor([3], device=device)}
    first = gradients(*tensors, **arguments)
    assert len(first) == (5 if features else 3)
    for _ in range(REPEATS - 1):
        assert_same_bits(gradients(*tensors, **arguments), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_batch_row_ignore_its_neighbours(dtype, device):
    """Alone, beside others, or beside NaN: the same bits."""
    tensors, do = qkv(device, dtype), gradient_of_out(device, dtype)
    bias = torch.randn(BATCH, Q_HEADS, Q_LEN, KV_LEN, device=device)
    call = dict(mask=tilewise.Causal(), similarity="cosine")
    want = gradients(*tensors, do=do, bias=bias, **call)
    for row in range(BATCH):
        own = slice(row, row + 1)
        alone = gradients(*(t[own] for t in tensors), do=do[own], bias=bias[own], **call)
        assert_same_bits(alone, [x[own] for x in want])
    spoilt = [t.clone() for t in (*tensors, do, bias)]
    for t in spoilt:
        t[1:] = torch.nan
    beside = gradients(*spoilt[:3], do=spoilt[3], bias=spoilt[4], **call)
    assert_same_bits([x[:1] for x in beside], [x[:1] for x in want])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal, as_tensor", [(False, False), (True, True)])
def test_padding_on_the_right_changes_no_bit_of_gradients(dtype, causal, as_tensor, device):
    """The real keys lie in the same tiles, so nothing may differ; the gradient of padding is 0."""
    (q, k, v), do = qkv(device, dtype), gradient_of_out(device, dtype)
    corner = tilewise.Causal("top_left")
    want = gradients(q, k, v, do=do, mask=corner if causal else None)
    length = torch.tensor([KV_LEN] * BATCH, device=device) if as_tensor else KV_LEN
    for more in (1, 29):
        mask = tilewise.Padding(length)
        mask = mask & corner if causal else mask
        dq, dk, dv = gradients(q, lengthened(k, more), lengthened(v, more), do=do, mask=mask)
        assert_same_bits((dq, dk[:, :, :KV_LEN], dv[:, :, :KV_LEN]), want)
        assert not dk[:, :, KV_LEN:].any() and not dv[:, :, KV_LEN:].any()


def test_padded_queries_change_no_bit_of_gradients(device):
    """Queries that see no key, of NaN and with a gradient of NaN, behind the others, in tiles of their own
    (in a tile with others they would make it one that is masked, and masked tiles are summed last)."""
    q_len = 32
    q, k, v = qkv(device, q_len=q_len)
    do, row = torch.randn_like(q), torch.arange(q_len + 21, device=device)
    start, end = row // 2, torch.where(row < q_len, KV_LEN, 0)
    want = gradients(q, k, v, do=do, mask=tilewise.Intervals(start[:q_len], end[:q_len]))
    mask = tilewise.Intervals(start, end)
    dq, dk, dv = gradients(lengthened(q, 21), k, v, do=lengthened(do, 21), mask=mask)
    assert_same_bits((dq[:, :, :q_len], dk, dv), want)
    assert not dq[:, :, q_len:].any()


@pytest.mark.any_cpu
def test_heads_may_be_permuted(device):
    q, k, v = qkv(device)
    out, lse = run(q, k, v)
    group = Q_HEADS // KV_HEADS
    order = list(reversed(range(KV_HEADS)))
    q_order = [head * group + i for head in order for i in range(group)]
    assert_same_bits(run(q[:, q_order], k[:, order], v[:, order]), (out[:, q_order], lse[:, q_order]))


@pytest.mark.any_cpu
def test_keys_may_be_permuted_by_whole_tiles(device):
    """Sums are taken in another order, so equal to rounding: each of kv_len terms and rescalings rounds."""
    q, k, v = qkv(device, kv_len=48)
    out, lse = run(q, k, v)
    order = torch.cat([torch.arange(32, 48), torch.arange(16), torch.arange(16, 32)]).to(device)
    other, other_lse = run(q, k[:, :, order], v[:, :, order])
    s = (q.double() @ k.double().repeat_interleave(Q_HEADS // KV_HEADS, 1).mT).abs().amax() * DIM**-0.5
    # Scores are the same bits; their exponentials have arguments rounded at another maximum.
    relative = 2 * (48 + 8 + 4 * s) * U
    assert ((out - other).abs() <= 2 * relative * v.abs().amax()).all()
    assert ((lse - other_lse).abs() <= relative + 2 * U * lse.abs()).all()


@pytest.mark.parametrize("shift", [2.0, -8.0, 1024.0])
def test_shifting_all_scores_of_a_row_shifts_lse_alone(shift, device):
    """softmax(s + c) = softmax(s): the rounding of s + c is all that may show."""
    q, k, v = qkv(device)
    bias = torch.full((Q_HEADS, Q_LEN, 1), shift, device=device)
    out, lse = run(q, k, v, bias=torch.zeros_like(bias))
    shifted, shifted_lse = run(q, k, v, bias=bias)
    s = (q.double() @ k.double().repeat_interleave(Q_HEADS // KV_HEADS, 1).mT).abs().amax() * DIM**-0.5
    # s + c rounds, and so does its product with log2 e and that of the maximum.
    score = 3 * U * (s + abs(shift))
    assert ((lse + shift - shifted_lse).abs() <= score + 4 * U * (s + abs(shift))).all()
    assert ((out - shifted).abs() <= 2 * (2 * score + (KV_LEN + 8) * U) * v.abs().amax()).all()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_the_output_lies_in_memory_as_q_does(order, device):
    """Every order of batch, heads and length in memory: the same bits, in the order of q."""
    q, k, v = qkv(device)
    inverse = [order.index(axis) for axis in range(3)]

    def stored(t: torch.Tensor) -> torch.Tensor:
        return t.permute(*order, 3).contiguous().permute(*inverse, 3)

    want = run(q, k, v)
    got = run(stored(q), stored(k), stored(v))
    assert_same_bits(got, want)
    assert got[0].permute(*order, 3).is_contiguous()
    assert got[1].is_contiguous()
    torch_out = tilewise.attention(stored(q), stored(k), stored(v), impl="torch")
    assert torch_out.permute(*order, 3).is_contiguous()


def test_the_forced_tile_changes_rounding_only(device):
    """Another tile sums in another order: within the bound of a reordered sum."""
    q, k, v = qkv(device)
    out, lse = run(q, k, v)
    with tilewise.tiles.use(tilewise.tiles.Tile(32, 64)):
        other, other_lse = run(q, k, v)
    s = (q.double() @ k.double().repeat_interleave(Q_HEADS // KV_HEADS, 1).mT).abs().amax() * DIM**-0.5
    relative = 2 * (KV_LEN + 8 + 4 * s + DIM * s) * U
    assert ((out - other).abs() <= 2 * relative * v.abs().amax()).all()
    assert ((lse - other_lse).abs() <= relative + 2 * U * lse.abs()).all()


@pytest.mark.parametrize("fill", [torch.nan, 1e30], ids=str)
def test_memory_used_before_shows_nowhere(fill, device, monkeypatch):
    """Fresh tensors hold whatever was there: the same bits over every filling."""
    tensors, arguments = qkv(device), everything(device)
    want = run(*tensors, **arguments)
    new_empty, empty = torch.Tensor.new_empty, torch.empty
    filled = []

    def dirty(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            if tensor.is_floating_point():
                filled.append(tensor.fill_(fill))
            return tensor

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", dirty(new_empty))
    monkeypatch.setattr(torch, "empty", dirty(empty))
    got = run(*tensors, **arguments)
    assert len(filled) >= 2, "out and lse should have been made here"
    assert_same_bits(got, want)


def directly(call):
    return call()


def on_another_stream(call):
    """The call on a stream of its own, whose inputs it waits for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = call()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def replayed(call):
    """The call captured in a CUDA graph after a warm-up, and replayed."""
    on_another_stream(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for tensor in result:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return result


# Streams and graphs are a GPU's; without one there is one way to launch, and one device.
LAUNCHES = [directly, on_another_stream, replayed] if ON_GPU else [directly]
DEVICES = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda f: f.__name__)
def test_streams_and_graphs_give_the_same_bits(launch, device):
    tensors, arguments = qkv(device, torch.bfloat16), everything(device)
    assert_same_bits(launch(lambda: run(*tensors, **arguments)), run(*tensors, **arguments))


@pytest.mark.parametrize("other", DEVICES, ids=str)
def test_the_launch_happens_on_the_tensors_device(other):
    """Tensors on any device while the first is current: as the first itself answers."""
    tensors = qkv(other)
    out, lse = run(*tensors)
    assert out.device == lse.device == other
    assert_same_bits(run(*(t.to(DEVICES[0]) for t in tensors)), (out.to(DEVICES[0]), lse.to(DEVICES[0])))
