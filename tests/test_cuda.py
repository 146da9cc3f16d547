"""What only a GPU can show: graphs, streams, devices, synchronisation, memory, races."""

import gc
import math
import random

import pytest
import torch
import triton

import tilewise
from harness.features import FEATURES, build
from harness.gradients import check_gradients
from harness.graphs import captured
from tilewise.plan.request import make_request

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA or ROCm GPU, and torch.cuda.is_available() is False", allow_module_level=True)
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 is set: no kernel runs on the GPU", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
LATE = 200_000_000  # cycles that a producer sleeps: about 0.1 s, far longer than a launch takes


def qkv(q_len=300, kv_len=400, heads=4, kv_heads=2, dim=64, batch=2, dtype=torch.float16, device=DEVICE):
    shapes = ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim))
    return [torch.randn(batch, *shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def refill(*tensors: torch.Tensor) -> None:
    with torch.no_grad():
        for x in tensors:
            x.copy_(torch.randn_like(x))


def assert_same_bits(some, others) -> None:
    for i, (one, other) in enumerate(zip(some, others, strict=True)):
        assert one.isfinite().any() and torch.equal(one, other), f"result {i}"


# ---- CUDA graphs


@pytest.mark.parametrize("kind", ["plain", "masks made inside", "trained scores", "seeded dropout"])
def test_a_captured_step_answers_new_data(kind):
    q, k, v = qkv()
    lengths = torch.tensor([400, 123], device=DEVICE)
    ids = torch.randint(0, 3, (300,), device=DEVICE), torch.randint(0, 3, (400,), device=DEVICE)
    slopes = torch.rand(4, device=DEVICE).requires_grad_()
    bias = torch.randn(300, 400, device=DEVICE).requires_grad_()
    table = tilewise.RelativePosition(torch.randn(4, 16, device=DEVICE).requires_grad_())
    seed = torch.tensor([3], device=DEVICE)
    leaves, changing = [q, k, v], [q, k, v]

    def arguments() -> dict:
        if kind == "masks made inside":
            return dict(
                mask=tilewise.Causal(lengths - 300) & tilewise.Padding(lengths) & tilewise.Documents(*ids)
            )
        if kind == "trained scores":
            return dict(score=[tilewise.ALiBi(slopes), table], bias=bias)
        return dict(dropout_p=0.3, dropout_seed=seed) if kind == "seeded dropout" else {}

    if kind == "trained scores":
        leaves, changing = [q, k, v, slopes, bias, table.table], [q, k, v, slopes, bias]
    do, dlse = torch.randn(2, 4, 300, 64, device=DEVICE).half(), torch.randn(2, 4, 300, device=DEVICE)

    def step():
        out, lse = tilewise.attention(q, k, v, **arguments(), return_lse=True)
        return [out, lse, *torch.autograd.grad((out, lse), leaves, (do, dlse))]

    graph, results = captured(step)
    previous = None
    for lens, number in (([400, 123], 3), ([7, 350], 4)):
        refill(*changing, do, dlse)
        lengths.copy_(torch.tensor(lens))
        seed.fill_(number)
        for x in ids:
            x.copy_(torch.randint(0, 3, x.shape))
        graph.replay()
        found = [x.clone() for x in results]
        assert_same_bits(found, step())
        assert previous is None or not torch.equal(previous, found[0])
        previous = found[0]


def test_dropout_in_a_captured_step_draws_anew():
    """Scores of 0 and V = identity, so that out shows the pairs kept, and dV = outᵀ those of the backward."""
    n, p = 128, 0.3
    q, k = torch.zeros(2, 4, n, 64, device=DEVICE), torch.zeros(2, 4, n, 64, device=DEVICE)
    v = torch.eye(n, device=DEVICE).expand(2, 4, n, n).clone().requires_grad_()
    do = v.detach().clone()

    def step():
        out = tilewise.attention(q, k, v, dropout_p=p)
        return [out, *torch.autograd.grad(out, v, do)]

    graph, (out, dv) = captured(step)
    seen = []
    for _ in range(4):
        graph.replay()
        assert torch.equal(out != 0, dv.mT != 0)
        seen.append((out == 0).clone())
    deviation = math.sqrt(p * (1 - p) / out.numel())
    for dropped in seen:
        assert abs(dropped.double().mean().item() - p) < 5 * deviation
    for i, one in enumerate(seen):
        for other in seen[:i]:
            both = (one & other).double().mean().item()
            assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / out.numel())


# ---- Streams and devices


def test_a_late_producer_on_another_stream():
    """The kernels read what was just written on the current stream, forward and backward."""
    leaves, fresh, do = qkv(), qkv(), torch.randn(2, 4, 300, 64, device=DEVICE).half()
    want_out = tilewise.attention(*fresh, mask=tilewise.Causal())
    wanted = [want_out, *torch.autograd.grad(want_out, fresh, do)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late_do = torch.full_like(do, torch.nan)
        torch.cuda._sleep(LATE)
        with torch.no_grad():
            for x, new in zip(leaves, fresh, strict=True):
                x.copy_(new)
        out = tilewise.attention(*leaves, mask=tilewise.Causal())
        torch.cuda._sleep(LATE)
        late_do.copy_(do)
        found = [out, *torch.autograd.grad(out, leaves, late_do)]
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(found, wanted)


def test_backward_called_from_another_stream_than_forward():
    leaves, do = qkv(), torch.randn(2, 4, 300, 64, device=DEVICE).half()
    out = tilewise.attention(*leaves)
    wanted = torch.autograd.grad(out, leaves, do)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LATE)
        out = tilewise.attention(*[x * 1 for x in leaves])
    late_do = torch.full_like(do, torch.nan)
    torch.cuda._sleep(LATE)
    late_do.copy_(do)
    found = torch.autograd.grad(out, leaves, late_do)
    assert_same_bits(found, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current", [0, 1])
def test_tensors_on_the_second_gpu(current):
    with torch.cuda.device(current):
        leaves = qkv(device=torch.device("cuda", 1))
        slopes = torch.rand(4, device="cuda:1").requires_grad_()
        lengths = torch.tensor([400, 99], device="cuda:1")
        arguments = dict(
            mask=tilewise.Padding(lengths), score=tilewise.ALiBi(slopes, lengths - 300), dropout_p=0.1
        )
        out, lse = tilewise.attention(*leaves, **arguments, return_lse=True)
        grads = torch.autograd.grad((out.sum(), lse.sum()), (*leaves, slopes))
        assert {x.device for x in (out, lse, *grads)} == {torch.device("cuda", 1)}
        assert torch.cuda.current_device() == current
        assert all(x.isfinite().all() and x.any() for x in (out, *grads))
        plain = dict(mask=tilewise.Padding(lengths), score=tilewise.ALiBi(slopes.detach(), lengths - 300))
        check_gradients(*[x.detach() for x in leaves], **plain)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_two_gpus_are_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"devices q: cuda:0, k: cuda:1"):
        tilewise.attention(q, k.detach().to("cuda:1"), v.detach().to("cuda:1"))


# ---- No host synchronisation


@pytest.fixture
def no_synchronisation():
    """A context in which PyTorch raises where it would wait for the GPU."""

    class Context:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    yield Context()
    torch.cuda.set_sync_debug_mode("default")


def test_synchronisation_is_noticed(no_synchronisation):
    """Or the next tests could not fail."""
    x = torch.ones(1, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchronizing"), no_synchronisation:
        x.item()


KINDS = ("mask", "score", "bias", "sink", "dropout", "similarity", "scale", "heads", "layout")
FREE = [feature for feature in FEATURES.values() if feature.kind in KINDS]


@pytest.mark.parametrize("feature", FREE, ids=str)
def test_no_synchronisation(feature, no_synchronisation):
    problem = build(DEVICE, random.Random(feature.name), [feature], tile=None, q_len=190, kv_len=260)
    leaves, keywords = [x.detach().requires_grad_() for x in problem.tensors()], problem.keywords()
    for _, tensor in make_request(*leaves, **keywords).other_tensors:
        if tensor.is_floating_point():
            leaves.append(tensor.requires_grad_())

    def step():
        out, lse = tilewise.attention(*leaves[:3], **keywords, return_lse=True)
        torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))

    step()
    with no_synchronisation:
        step()


def test_no_synchronisation_where_masks_are_made_and_seeds_drawn(no_synchronisation):
    q, k, v = qkv()
    lengths = torch.tensor([400, 123], device=DEVICE)
    start, ids = torch.randint(0, 300, (300,), device=DEVICE), torch.randint(0, 3, (300,), device=DEVICE)
    kv_ids = torch.randint(0, 3, (2, 400), device=DEVICE)

    def step():
        mask = (
            tilewise.Padding(lengths)
            & tilewise.Prefix(lengths, lengths - 300)
            & tilewise.Intervals(start, start + 40)
        )
        mask = mask & tilewise.Documents(ids, kv_ids) & (kv_ids[:, None, None] > 0)
        tilewise.attention(q, k, v, mask=mask, dropout_p=0.1).sum().backward()

    step()
    with no_synchronisation:
        step()


def test_no_synchronisation_in_modules_and_under_autocast(no_synchronisation):
    module = tilewise.nn.SelfAttention(64, heads=4, kv_heads=2, qk_norm="rms", sink=True, device=DEVICE)
    x = torch.randn(2, 200, 64, device=DEVICE)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            out = module(x, mask=tilewise.Causal())
        out.sum().backward()

    step()
    with no_synchronisation:
        step()


# ---- Races


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_two_hundred_times(dtype):
    q, k, v = qkv(q_len=700, kv_len=900, dtype=dtype)
    slopes = torch.rand(4, device=DEVICE).requires_grad_()
    bias = torch.randn(1, 900, device=DEVICE).requires_grad_()
    table = torch.randn(4, 16, device=DEVICE).requires_grad_()
    score = [tilewise.ALiBi(slopes), tilewise.RelativePosition(table)]
    seed, sink = torch.tensor([5], device=DEVICE), torch.randn(4, device=DEVICE).requires_grad_()
    leaves = [q, k, v, slopes, bias, table, sink]
    do, dlse = torch.randn(2, 4, 700, 64, device=DEVICE, dtype=dtype), torch.randn(2, 4, 700, device=DEVICE)

    def step():
        out, lse = tilewise.attention(
            q, k, v, mask=tilewise.Causal(), score=score, bias=bias, sink=sink, dropout_p=0.1,
            dropout_seed=seed, return_lse=True,
        )  # fmt: skip
        return [out, lse, *torch.autograd.grad((out, lse), leaves, (do, dlse))]

    first = step()
    differ = torch.zeros(len(first), dtype=torch.int64, device=DEVICE)
    for _ in range(200):
        differ += torch.stack([(one != other).any() for one, other in zip(first, step(), strict=True)])
    assert all(x.isfinite().all() and x.any() for x in first)
    assert differ.tolist() == [0] * len(first)


# ---- Memory and sizes


def extra_memory(length: int, trained: bool) -> int:
    """Bytes that one forward and backward need at their peak, beside the inputs."""
    q, k, v = qkv(q_len=length, kv_len=length, batch=1)
    slopes, table = torch.rand(4, device=DEVICE), torch.randn(4, 32, device=DEVICE)
    score = [
        tilewise.ALiBi(slopes.requires_grad_(trained)),
        tilewise.RelativePosition(table.requires_grad_(trained)),
    ]
    leaves = [q, k, v, slopes, table] if trained else [q, k, v]

    def step():
        out, lse = tilewise.attention(
            q, k, v, mask=tilewise.Causal(), score=score, dropout_p=0.1, return_lse=True
        )
        torch.autograd.grad((out.sum(), lse.sum()), leaves)

    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("trained", [False, True], ids=["plain", "trained scores"])
def test_memory_is_linear_in_length(trained):
    length = 8192
    once, twice = extra_memory(length, trained), extra_memory(2 * length, trained)
    assert once > 4 * length * 64 * 2, "less than the output alone: nothing was measured"
    assert twice < 2.5 * once
    # One byte a pair would be N² a head; there are 4 heads.
    assert twice < (2 * length) ** 2 / 2


def test_no_memory_growth():
    """With Python's garbage collector off: no reference cycle may hold a tensor of a call."""
    q, k, v = qkv()
    bias = torch.randn(300, 400, device=DEVICE).requires_grad_()

    def step():
        out = tilewise.attention(q * 1, k * 1, v * 1, bias=bias * 1, mask=tilewise.Causal(), dropout_p=0.1)
        torch.autograd.grad(out.sum(), (q, k, v, bias))

    step()
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        for _ in range(20):
            step()
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("batch, heads, kv_heads", [(70_000, 1, 1), (2, 40_000, 20_000)])
def test_more_than_65535_batches_times_heads(batch, heads, kv_heads):
    """A grid's second and third dimension would end there."""
    q, k, v = qkv(q_len=3, kv_len=5, heads=heads, kv_heads=kv_heads, dim=16, batch=batch)
    check_gradients(q.detach(), k.detach(), v.detach(), mask=tilewise.Causal())


# ---- torch.compile


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(mode):
    """Same bits as eager; in "reduce-overhead" the third call and all later ones replay CUDA graphs."""
    torch._dynamo.reset()
    slopes = torch.rand(4, device=DEVICE).requires_grad_()
    lengths = torch.tensor([400, 123], device=DEVICE)

    def attend(q, k, v, lengths, slopes):
        mask = tilewise.Causal(lengths - 300) & tilewise.Padding(lengths)
        return tilewise.attention(q, k, v, mask=mask, score=tilewise.ALiBi(slopes, "bottom_right"))

    compiled = torch.compile(attend, fullgraph=True, mode=mode)
    for _ in range(5):
        leaves, do = qkv(), torch.randn(2, 4, 300, 64, device=DEVICE).half()
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*leaves, lengths, slopes)
        got = [out.clone(), *[x.clone() for x in torch.autograd.grad(out, (*leaves, slopes), do)]]
        want = attend(*leaves, lengths, slopes)
        assert_same_bits(got, [want, *torch.autograd.grad(want, (*leaves, slopes), do)])


def test_dropout_compiled_with_cuda_graphs_draws_anew():
    torch._dynamo.reset()
    n, p = 128, 0.3
    q, k = torch.zeros(2, 4, n, 64, device=DEVICE), torch.zeros(2, 4, n, 64, device=DEVICE)
    v = torch.eye(n, device=DEVICE).expand(2, 4, n, n).clone()
    attend = torch.compile(
        lambda q, k, v: tilewise.attention(q, k, v, dropout_p=p), fullgraph=True, mode="reduce-overhead"
    )
    seen = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        seen.append((attend(q, k, v) == 0).clone())
    for i, one in enumerate(seen):
        share = one.double().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / one.numel())
        assert not any(torch.equal(one, other) for other in seen[:i])


# ---- Autocast


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """A training step in mixed precision: narrow attention, fp32 weights and gradients, a scaled loss."""
    module = tilewise.nn.SelfAttention(
        64, heads=4, out_projection=True, qk_norm="layer", sink=True, device=DEVICE
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    x, seen = torch.randn(2, 200, 64, device=DEVICE), []
    module.core.register_forward_hook(lambda core, inputs, out: seen.extend(t.dtype for t in (*inputs, out)))
    before = [p.detach().clone() for p in module.parameters()]
    with torch.autocast("cuda", dtype):
        loss = module(x, mask=tilewise.Causal()).float().square().mean()
    scaler.scale(loss).backward()
    assert set(seen) == {dtype}
    assert all(
        p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters()
    )
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0, "a gradient overflowed and the step was skipped"
    assert all(
        not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True) if p.grad.any()
    )
    assert sum(bool(p.grad.any()) for p in module.parameters()) >= len(before) - 1


def test_autocast_casts_what_goes_in():
    q, k, v = (x.detach().requires_grad_() for x in qkv(dtype=torch.float32))
    bias, scale = torch.randn(300, 400, device=DEVICE), torch.tensor(0.2, device=DEVICE)
    for x in (bias, scale):
        x.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        out = tilewise.attention(q, k, v, bias=bias, scale=scale)
    want = tilewise.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=bias, scale=scale)
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)
    leaves, do = (q, k, v, bias, scale), torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, do)
    assert all(x.dtype == torch.float32 for x in got)
    assert_same_bits(got, torch.autograd.grad(want, leaves, do))
