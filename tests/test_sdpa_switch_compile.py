"""tilewise.sdpa under torch.compile and torch.export: in one graph, and never in a graph of another state."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

import tilewise
from harness.scripts import run_script
from harness.switched import KERNELS, PYTORCH, fresh_switch, qkv, reasons, who

__all__ = ["fresh_switch"]
attend = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, counter=None, **options):
    backend = counter or "aot_eager"
    return torch.compile(function, **{"fullgraph": True, "backend": backend, "dynamic": False} | options)


def is_kernels(graph: torch.fx.GraphModule) -> bool:
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any(["attention" in target for target in targets])
    return any(["tilewise" in target for target in targets])


@pytest.mark.oldest
def test_a_graph_belongs_to_the_state_that_it_was_made_in(device):
    q, k, v = qkv(device=device)
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(lambda q, k, v: attend(q * 2, k, v, is_causal=True), counter)
    theirs = attend(q * 2, k, v, is_causal=True)
    ours = tilewise.scaled_dot_product_attention(q * 2, k, v, is_causal=True)
    for on in (False, True, False, True):
        if on:
            with tilewise.sdpa():
                assert torch.equal(function(q, k, v), ours)
        else:
            assert torch.equal(function(q, k, v), theirs)
    assert [is_kernels(graph) for graph in counter.graphs] == [False, True]
    tilewise.sdpa.enable()
    assert torch.equal(function(q, k, v), ours)
    tilewise.sdpa.disable()
    assert torch.equal(function(q, k, v), theirs) and counter.frame_count == 3


@pytest.mark.oldest
def test_a_region_inside_of_a_compiled_function(device):
    q, k, v = qkv(device=device)
    counter = CompileCounterWithBackend("aot_eager")

    def function(q, k, v):
        with tilewise.sdpa():
            out = attend(q, k, v)
        return out, attend(out, k, v)

    got, then = compiled(function, counter)(q, k, v)
    want = tilewise.scaled_dot_product_attention(q, k, v)
    do = torch.randn_like(want)
    gradients = [torch.autograd.grad(out, (q, k, v), do) for out in (got, want)]
    assert torch.equal(got, want) and torch.equal(then, attend(got, k, v))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert who() == [KERNELS] and counter.frame_count == 1


def test_nested_regions_answer_once(device):
    q, k, v = qkv(device=device)

    def function(q, k, v):
        with tilewise.sdpa():
            return attend(q, k, v)

    with tilewise.sdpa(), tilewise.sdpa():
        got = compiled(function)(q, k, v)
    assert torch.equal(got, tilewise.scaled_dot_product_attention(q, k, v)) and who() == [KERNELS]


def test_a_call_is_noted_when_it_is_traced(device):
    q, k, v = qkv(device=device)
    function = compiled(lambda q, k, v: attend(q, k, v, scale=0.5))
    with tilewise.sdpa():
        for _ in range(3):
            function(q, k, v)
    (entry,) = tilewise.sdpa.report().entries
    assert entry.compiled and entry.calls == 1
    assert (entry.q, entry.dtype, entry.options) == ((2, 3, 5, 8), "float32", "scale=0.5")
    assert entry.mask == "no mask" and entry.module is None and entry.answered_by == KERNELS


@pytest.mark.oldest
def test_open_lengths(device):
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(lambda x: attend(x, x, x, is_causal=True), counter, dynamic=True)
    with tilewise.sdpa():
        for n in (5, 6, 7):
            x = torch.randn(2, 3, n, 8, device=device)
            want = tilewise.scaled_dot_product_attention(x, x, x, is_causal=True)
            assert torch.equal(function(x), want)
    assert counter.frame_count <= 2
    assert {entry.q[2] for entry in tilewise.sdpa.report().entries if entry.compiled} == {"*"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_passed_on_is_in_the_graph_too(dynamic, device):
    q, k, v = qkv(2, 3, 5, 584, device=device)
    with tilewise.sdpa():
        got = compiled(attend, dynamic=dynamic)(q, k, v)
    assert torch.equal(got, attend(q, k, v))
    assert "head_dim=584" in reasons()


def test_dropout_draws_anew(device):
    q, k, v = qkv(device=device)
    function = compiled(lambda q, k, v: attend(q, k, v, dropout_p=0.5))
    with tilewise.sdpa():
        first, second = function(q, k, v), function(q, k, v)
    assert not torch.equal(first, second) and who() == [KERNELS]


def test_a_graph_break_in_a_region(device):
    q, k, v = qkv(device=device)

    def function(q, k, v):
        with tilewise.sdpa():
            out = attend(q, k, v)
            torch._dynamo.graph_break()
            return attend(out, k, v)

    got = compiled(function, fullgraph=False)(q, k, v)
    want = tilewise.scaled_dot_product_attention(q, k, v)
    assert torch.equal(got, tilewise.scaled_dot_product_attention(want, k, v))
    assert set(who()) == {KERNELS}


def test_the_modes_own_frame_is_no_graph(device):
    """Where PyTorch's module is compiled alone, Dynamo leaves its frames to Python and looks at those inside.
    The mode's must not become a graph for the first function that it is asked about, then used for all."""
    x = torch.randn(2, 5, 16, device=device)
    model = nn.MultiheadAttention(16, 2, batch_first=True).to(device)
    want = model(x, x, x, need_weights=False)[0]
    model.compile(backend="aot_eager", fullgraph=True)

    def outcome():
        torch._dynamo.reset()
        try:
            return (model(x, x, x, need_weights=False)[0] - want).abs().max().item() < 1e-5
        except RuntimeError as error:
            return str(error).splitlines()[0]

    off = outcome()
    with tilewise.sdpa():
        on = outcome()
    assert on == off and (on is True or "found no compiled frames" in on)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 24, 0.0) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.oldest
@pytest.mark.parametrize("training", [True, False])
def test_pytorchs_modules_and_their_paths(training, device):
    x, model = torch.randn(5, 2, 16, device=device), Layers().to(device).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    with tilewise.sdpa():
        function = compiled(model, counter)
        got, again, want = function(x), function(x), model(x)
    assert counter.frame_count == 1 and torch.equal(got, again)
    assert (got - want).abs().max() < 1e-5
    entries = tilewise.sdpa.report().entries
    paths = [f"Layers: layers.{i}.self_attn" for i in range(2)]
    assert [entry.module for entry in entries] == paths * 2
    assert [entry.compiled for entry in entries] == [True, True, False, False]
    assert who() == [KERNELS] * 4


def test_weights_are_pytorchs(device):
    model, x = nn.MultiheadAttention(16, 2).to(device), torch.randn(5, 2, 16, device=device)
    with tilewise.sdpa():
        compiled(model)(x, x, x)
    assert "need_weights=True" in reasons()


def test_an_encoder_layer_without_its_fast_path(device):
    """In eval mode without gradients Dynamo puts PyTorch's function of C++ into the graph, and shows it to no
    mode."""
    model = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval().to(device)
    x = torch.randn(2, 5, 16, device=device)
    with torch.no_grad():
        want = model(x)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with tilewise.sdpa():
                got = compiled(model)(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert (got - want).abs().max() < 1e-5 and who() == [KERNELS]


def test_the_math_backend_inside(device):
    q, k, v = qkv(device=device)

    def function(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            out = attend(q, k, v)
        return attend(out, k, v)

    with tilewise.sdpa():
        compiled(function)(q, k, v)
    assert sorted(who()) == sorted([PYTORCH, KERNELS])


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, device):
    class Model(nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, is_causal=True)

    given = [x.detach() for x in qkv(device=device)]
    with tilewise.sdpa():
        program = torch.export.export(Model(), tuple(given), strict=strict)
    assert is_kernels(program.graph_module) and set(who()) == {KERNELS}
    want = tilewise.scaled_dot_product_attention(*given, is_causal=True)
    assert torch.equal(program.module()(*given), want)


FIRST_TOUCHED = """
import sys
import torch
import tilewise
from torch.nn.functional import scaled_dot_product_attention as attend

def function(q):
    with tilewise.sdpa():
        return attend(q, q, q, is_causal=True)

q = torch.randn(1, 2, 5, 8)
assert "tilewise.drop_in.switch" not in sys.modules
out = torch.compile(function, backend="aot_eager", fullgraph=True)(q)
assert torch.equal(out, tilewise.scaled_dot_product_attention(q, q, q, is_causal=True))
assert (tilewise.sdpa.report().answered, tilewise.sdpa.report().passed_on) == (1, 0)
"""


@pytest.mark.oldest
def test_the_switch_may_be_touched_first_while_it_is_traced(tmp_path):
    """Importing tilewise does not import it: it imports Dynamo."""
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(FIRST_TOUCHED)
    assert run_script(script, log) == 0, log.read_text()
