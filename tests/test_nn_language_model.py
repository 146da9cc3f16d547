"""What a language model asks of `SelfAttention`: Llama's attention, and generation with a cache."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import tilewise
from harness.oracle import _assert_close
from tilewise import Causal
from tilewise.nn import Rotary, SelfAttention
from tilewise_reference.yardstick import largest_difference

pytestmark = pytest.mark.oldest
WIDTH, HEADS, KV_HEADS, DIM = 24, 4, 2, 8
THETA = 1000.0


class Llama(nn.Module):
    """Attention as Llama has it in Hugging Face's layout, by PyTorch's own function; with a norm of each head
    where `normed`, as in Qwen 3."""

    def __init__(self, normed=False):
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(WIDTH, heads * DIM, bias=False) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.q_weight, self.k_weight = (nn.Parameter(torch.rand(DIM) + 0.5) for _ in range(2))
        self.normed = normed

    def heads_of(self, x, heads, weight, positions):
        x = x.unflatten(-1, (heads, DIM)).transpose(1, 2)
        if self.normed:
            x = F.rms_norm(x, (DIM,), weight, eps=1e-6)
        frequencies = THETA ** -(torch.arange(0, DIM, 2, device=x.device, dtype=torch.float64) / DIM)
        angles = (positions[..., None, :, None] * frequencies).repeat(*[1] * positions.dim(), 1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        swapped = torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), dim=-1)
        return x * cos + swapped * sin

    def forward(self, x, positions):
        q = self.heads_of(self.q(x), HEADS, self.q_weight, positions)
        k = self.heads_of(self.k(x), KV_HEADS, self.k_weight, positions)
        v = self.v(x).unflatten(-1, (KV_HEADS, DIM)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


def ours(theirs, **options):
    module = SelfAttention.from_linears(
        theirs.q, theirs.k, theirs.v, heads=HEADS, kv_heads=KV_HEADS, out=theirs.out,
        qk_norm="rms" if theirs.normed else None, **{"rotary": Rotary(DIM, theta=THETA)} | options,
    )  # fmt: skip
    if theirs.normed:
        module.core.q_norm.weight.data.copy_(theirs.q_weight.data)
        module.core.k_norm.weight.data.copy_(theirs.k_weight.data)
    return module


def gradients_of(theirs):
    """By the names that the module under test has for its parameters."""
    found = {"qkv.weight": torch.cat([part.weight.grad for part in (theirs.q, theirs.k, theirs.v)])}
    found["out.weight"] = theirs.out.weight.grad
    if theirs.normed:
        found |= {"core.q_norm.weight": theirs.q_weight.grad, "core.k_norm.weight": theirs.k_weight.grad}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "portable"])
@pytest.mark.parametrize("normed", [False, True], ids=["llama", "qwen3"])
def test_attention_of_llama(normed, impl, dtype, device):
    """The result and every gradient, held to the rule of `harness.oracle`."""
    theirs = Llama(normed).to(device, dtype)
    x, do = torch.randn(2, 2, 11, WIDTH, device=device).to(dtype)
    positions = torch.stack((torch.arange(11), torch.arange(11) + 90)).to(device)

    def run(module, dtype, *arguments, **keywords):
        given = x.to(dtype, copy=True).requires_grad_()
        out = module(given, *arguments, **keywords)
        out.backward(do.to(dtype))
        return {"result": out.detach(), "x": given.grad}

    module = ours(theirs, impl=impl)
    found = run(module, dtype, mask=Causal(), positions=positions)
    found |= {name: parameter.grad for name, parameter in module.named_parameters()}

    def plain(dtype):
        model = copy.deepcopy(theirs).to(dtype)
        return run(model, dtype, positions) | gradients_of(model)

    exactly, in_dtype = plain(torch.float64), plain(dtype)
    assert found.keys() == exactly.keys()
    for name, got in found.items():
        _assert_close(name, got, exactly[name], largest_difference(in_dtype[name], exactly[name]))


@pytest.mark.parametrize("dim", [DIM, 6])
def test_one_style_is_the_other_with_rows_in_another_order(dim, device):
    """Checkpoints of both conventions hold one model."""
    theirs = Llama().to(device)
    rest = torch.arange(dim, DIM)
    order = torch.cat((torch.arange(dim).unflatten(0, (2, dim // 2)).T.flatten(), rest))

    def reorder(linear, heads):
        linear = copy.deepcopy(linear)
        linear.weight.data = linear.weight.data.unflatten(0, (heads, DIM))[:, order].flatten(0, 1)
        return linear

    half = ours(theirs, rotary=Rotary(DIM, rotary_dim=dim))
    theirs.q, theirs.k = reorder(theirs.q, HEADS), reorder(theirs.k, KV_HEADS)
    interleaved = ours(theirs, rotary=Rotary(DIM, rotary_dim=dim, style="interleaved"))
    x = torch.randn(2, 5, WIDTH, device=device)
    torch.testing.assert_close(interleaved(x), half(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours(theirs, rotary=Rotary(DIM, rotary_dim=dim))(x), half(x), atol=1e-3)


# ---- Generation


class Cache:
    """The shortest cache: it grows along the length."""

    def __init__(self):
        self.kept = None

    def __call__(self, k, v):
        pair = (k, v)
        if self.kept is not None:
            pair = tuple(torch.cat(both, dim=2) for both in zip(self.kept, pair, strict=True))
        self.kept = pair
        return pair


def in_pieces(module, x, pieces, positions=lambda start, stop: start, cache=None):
    """`module` on x piece by piece, with what came before in a cache."""
    cache, start, found = cache or Cache(), 0, []
    for piece in x.split(pieces, dim=-2):
        stop = start + piece.shape[-2]
        found.append(module(piece, mask=Causal(), positions=positions(start, stop), cache=cache))
        start = stop
    return torch.cat(found, dim=-2)


@pytest.mark.parametrize("impl", ["torch", "portable"])
@pytest.mark.parametrize("normed", [False, True], ids=["llama", "qwen3"])
def test_steps_with_a_cache_are_the_whole(normed, impl, device):
    theirs = Llama(normed).to(device)
    module, x = ours(theirs, impl=impl), torch.randn(2, 12, WIDTH, device=device)
    where = torch.arange(12, device=device)
    exactly = copy.deepcopy(theirs).double()(x.double(), where)
    error = largest_difference(theirs(x, where), exactly)
    with torch.no_grad():
        _assert_close("whole", module(x, mask=Causal()), exactly, error)
        for pieces in ([12], [7, 1, 1, 1, 1, 1], [1] * 12, [3, 5, 4]):
            _assert_close(f"{pieces}", in_pieces(module, x, pieces), exactly, error)
        alone = in_pieces(module, x[0], [7, 5])
    _assert_close("without a batch", alone, exactly[0], error)


def test_positions_of_a_step_as_a_tensor(device):
    """One a sequence: what a batch padded on the left needs."""
    module, x = ours(Llama(), impl="torch").to(device), torch.randn(2, 6, WIDTH, device=device)
    start = torch.tensor([[0], [40]], device=device)
    whole = module(x, mask=Causal(), positions=start + torch.arange(6, device=device))
    steps = in_pieces(module, x, [4, 1, 1], lambda a, b: start + torch.arange(a, b, device=device))
    torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-6)


def test_a_cache_of_fixed_size(device):
    """A buffer that is written to in place, and a mask that hides what is not written yet."""
    module, x = ours(Llama(), impl="torch").to(device), torch.randn(1, 6, WIDTH, device=device)
    keys, values = torch.full((2, 1, KV_HEADS, 10, DIM), math.nan, device=device)
    found = []
    for n in range(6):

        def write(k, v, n=n):
            keys[:, :, n : n + 1], values[:, :, n : n + 1] = k, v
            return keys, values

        with torch.no_grad():
            mask = tilewise.Padding(torch.tensor([n + 1], device=device))
            found.append(module(x[:, n : n + 1], mask=mask, positions=n, cache=write))
    torch.testing.assert_close(torch.cat(found, 1), module(x, mask=Causal()), rtol=1e-5, atol=1e-6)


def test_a_cache_without_positions_is_refused(device):
    module, x, cache = ours(Llama()).to(device), torch.randn(1, 4, WIDTH, device=device), Cache()
    module(x, cache=cache)
    with pytest.raises(ValueError, match="positions must be given: the cache returned 8 keys for 4 new"):
        module(x, cache=cache)
    plain = SelfAttention(WIDTH, heads=HEADS, device=device)  # whose keys are nowhere
    torch.testing.assert_close(in_pieces(plain, x, [2, 2], lambda a, b: None), plain(x, mask=Causal()))


# ---- What PyTorch does to a module


@pytest.fixture
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled(device, forget_graphs):
    module = ours(Llama(normed=True), impl="portable").to(device)
    x = torch.randn(2, 5, WIDTH, device=device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out, want = (run(x, mask=Causal(), positions=7) for run in (compiled, module))
    do, weights = torch.randn_like(out), list(module.parameters())
    grads, wanted = (torch.autograd.grad(y, weights, do) for y in (out, want))
    for got, expected in zip((out, *grads), (want, *wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "portable"])
def test_compiled_steps_share_a_graph(impl, device, forget_graphs):
    """One for the beginning, one for the first step, and one for all steps, whatever is in the cache."""
    module, counter = ours(Llama(), impl=impl).to(device), CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn(2, 9, WIDTH, device=device)
    with torch.no_grad():
        steps = in_pieces(compiled, x, [4, 1, 1, 1, 1, 1])
        torch.testing.assert_close(steps, module(x, mask=Causal()), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 3


class Step(nn.Module):
    """A step as a function of tensors alone: where it stands is the length of what came before."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, earlier_k, earlier_v):
        def cache(k, v):
            return torch.cat((earlier_k, k), dim=2), torch.cat((earlier_v, v), dim=2)

        return self.attention(x, mask=Causal(), positions=earlier_k.shape[2], cache=cache)


@pytest.mark.parametrize("strict", [False, True], ids=["export", "strict export"])
def test_exported_for_all_lengths(strict, device):
    def given(length, earlier):
        before = torch.randn(2, 1, KV_HEADS, earlier, DIM, device=device)
        return torch.randn(1, length, WIDTH, device=device), *before

    step = Step(ours(Llama(), impl="torch").to(device))
    length, earlier = torch.export.Dim("length", min=2, max=64), torch.export.Dim("earlier", min=2, max=64)
    shapes = {"x": {1: length}, "earlier_k": {2: earlier}, "earlier_v": {2: earlier}}
    exported = torch.export.export(step, given(5, 7), dynamic_shapes=shapes, strict=strict).module()
    for sizes in ((5, 7), (3, 20)):
        inputs = given(*sizes)
        torch.testing.assert_close(exported(*inputs), step(*inputs), rtol=1e-5, atol=1e-6)


def test_under_autocast_what_a_norm_widened_is_rounded_once(device):
    class Widen(nn.Module):
        def forward(self, x):
            return 1.37 * x.float()

    module, seen = ours(Llama(normed=True), impl="torch").to(device), []
    module.core.q_norm, module.core.k_norm = Widen(), Widen()
    with torch.autocast(device.type, torch.bfloat16):
        q, k, _ = module.project(x := torch.randn(2, 5, WIDTH, device=device))
        out = module(x, mask=Causal(), cache=lambda k, v: (seen.append(k) or k, v))
    assert out.dtype == torch.bfloat16
    assert torch.equal(seen[0], module.core.rotary(1.37 * q.float(), 1.37 * k.float())[1].bfloat16())


def test_checkpointed(device):
    module = ours(Llama(), impl="torch").to(device)
    x = torch.randn(2, 5, WIDTH, device=device, requires_grad=True)
    want = torch.autograd.grad(module(x, mask=Causal(), positions=3).sum(), x)
    got = checkpoint(module, x, mask=Causal(), positions=3, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(got.sum(), x), want))


def test_nested_input(device):
    """Each sequence has positions of its own; those of a step are not built."""
    module = ours(Llama(normed=True)).to(device)
    rows = [torch.randn(n, WIDTH, device=device) for n in (5, 12, 1)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    got = module(nested, mask=Causal()).unbind()
    for one, x in zip(got, rows, strict=True):
        torch.testing.assert_close(one, module(x, mask=Causal()), rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="positions= with nested tensors is not built"):
        module(nested, mask=Causal(), positions=4)
