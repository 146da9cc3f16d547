"""A repeated launch hands the driver what Triton's own would: the same kernel, grid and arguments.

Triton compiles for Hopper here, without a GPU, so the calls run in a child process that interprets nothing:
this file is also its program.
"""

import ast
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

import triton

import tilewise
from harness.replays import alive, no_long_way, repeating, replays
from harness.stand_in_gpu import stand_in_gpu
from tilewise.kernels.forward import forward_kernel
from tilewise.kernels.tile import CopiedTile, HopperTile, hopper_backward_tile
from tilewise.plan import tiles

TILE = tiles.Tile(16, 16, num_stages=1)


def randn(*shape, dtype=torch.float16):
    return torch.randn(shape, dtype=dtype)


def forward(q, k, v):
    with torch.no_grad():
        return [
            tilewise.attention(q, k, v, mask=tilewise.Causal(), score=tilewise.Softcap(5.0), impl="portable")
        ]


def training(q, k, v):
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = tilewise.attention(q, k, v, mask=tilewise.Causal(), impl="portable")
    return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]


def split(q, k, v):
    lens = torch.tensor([5], dtype=torch.int32)
    return [tilewise.cached_attention(q, k, v, kv_lens=lens, split_size=16, impl="portable")]


def packed(q, k, v):
    with torch.no_grad():
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        return [tilewise.packed_attention(*rows, q_offsets=torch.tensor([0, 3, 32]), impl="portable")]


def hopper(q, k, v):
    tile = HopperTile(128, 64, 8, 2)
    with torch.no_grad(), tiles.use(tile, ["hopper"]):
        return [tilewise.attention(q, k, v, mask=tilewise.Causal(), impl="hopper")]


def copied(q, k, v):
    with torch.no_grad(), tiles.use(CopiedTile(16, 16, num_stages=1), ["forward"]):
        return [tilewise.attention(q, k, v, impl="portable")]


def one_walk(q, k, v):
    with tiles.use_walks(1):
        return training(q, k, v)


def hopper_training(q, k, v):
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    forward, backward = HopperTile(128, 64, 8, 2), hopper_backward_tile(64)
    with tiles.use(forward, ["hopper"]), tiles.use(backward, ["hopper_backward"]):
        out = tilewise.attention(q, k, v, mask=tilewise.Causal(), impl="hopper")
        return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]


CALLS = {
    each.__name__: each
    for each in (forward, training, split, packed, copied, one_walk, hopper, hopper_training)
}


def inputs():
    return randn(3, 1, 2, 32, 64).unbind(0)


class Addresses:
    """Addresses of one way as those of the other: inputs are the same, and what each way makes for itself
    lies elsewhere, but in the same order inside."""

    def __init__(self, tensors):
        self.of = {x.untyped_storage().data_ptr(): x.untyped_storage().data_ptr() for x in tensors}
        self.inputs = {str(x.data_ptr()) for x in tensors}

    def agree(self, tensor, address):
        start = tensor.untyped_storage().data_ptr()
        here = address - (tensor.data_ptr() - start)
        assert self.of.setdefault(start, here) == here
        assert list(self.of.values()).count(here) == 1


def compare(long, short, addresses):
    """The arguments of the long way's launch and of the short one's, in the same places."""
    if isinstance(long, torch.Tensor):
        addresses.agree(long, short)
    elif isinstance(long, (tuple, list)) and long and long[0] == "map":
        assert long[2:] == short[2:]
        assert long[1] == short[1] if long[1] in addresses.inputs else short[1] not in addresses.inputs
    elif isinstance(long, (tuple, list)):
        assert len(long) == len(short)
        for one, other in zip(long, short, strict=True):
            compare(one, other, addresses)
    elif isinstance(long, triton.knobs.HookChain):
        assert not long.calls and short is None
    elif isinstance(long, triton.compiler.compiler.LazyDict):  # what hooks would be told
        assert short is None
    else:
        assert type(long) is type(short) and long == short


def the_same_launches(call):
    with stand_in_gpu() as (_, recorder), tiles.use(TILE, ["forward", "dq", "dkv", "dqkv"]):
        with replays(torch.device("cpu")) as known:
            call(*inputs()), call(*inputs())
            assert all(step.replay for step in known.values())
            earlier, given = inputs(), inputs()
            with no_long_way():
                call(*earlier)
                recorder.launches.clear()
                kept = call(*given)
            short = recorder.launches[:]
            with repeating():
                recorder.launches.clear()
                kept += call(*given)
            long = recorder.launches
        addresses = Addresses(given)
        assert short and len(short) == len(long)
        for one, other in zip(long, short, strict=True):
            compare(one, other, addresses)


def forgets():
    """What is known of a kernel with descriptors holds no tensor."""
    with stand_in_gpu() as (_, recorder), replays(torch.device("cpu")) as known:
        for _ in range(3):
            given = inputs()
            left = alive(*given, *hopper(*given))
            del given
            recorder.launches.clear()
            assert left() == 0
        assert all(step.replay for step in known.values())


def goes_the_long_way(call, recorder, disturb):
    """Whether a call that is repeated otherwise is not, while something is disturbed; and is again, after."""
    with contextlib.ExitStack() as stack:
        disturb(stack)
        with pytest.raises(AssertionError, match="the long way was gone"), no_long_way():
            call(*inputs())
        recorder.launches.clear()
        call(*inputs())
        assert len(recorder.launches) == 1
    with no_long_way():
        call(*inputs())


def disturbances():
    """What Triton looks at before it launches, and no argument says."""
    knobs = triton.knobs
    told = []
    hook = told.append

    def hooks(chain):
        def disturb(stack):
            chain.add(hook)
            stack.callback(chain.remove, hook)

        return disturb

    def before_run(stack):
        forward_kernel.add_pre_run_hook(lambda *_, **__: None)
        stack.callback(forward_kernel.pre_run_hooks.clear)

    def another_device(stack):
        driver = triton.runtime.driver.active
        driver.device = 1
        stack.callback(setattr, driver, "device", 0)

    def a_global(stack):
        used = forward_kernel.used_global_vals.items()
        name, where = next((n, w) for (n, _), (_, w) in used if hasattr(w[n], "value"))
        before = where[name]
        where[name] = triton.language.constexpr(before.value)  # equal, so Triton goes on; who knows that
        stack.callback(where.__setitem__, name, before)

    return dict(
        enter=hooks(knobs.runtime.launch_enter_hook), exit=hooks(knobs.runtime.launch_exit_hook),
        before_run=before_run, another_device=another_device, a_global=a_global,
    )  # fmt: skip


def watched():
    """Hooks, another device and changed globals are seen."""
    with stand_in_gpu() as (_, recorder), tiles.use(TILE, ["forward"]), replays(torch.device("cpu")):
        for _ in range(2):
            forward(*inputs())
        for name, disturb in disturbances().items():
            print(name)
            goes_the_long_way(forward, recorder, disturb)


def streamed():
    """A launch goes to the stream that is current when it is repeated."""
    with stand_in_gpu() as (driver, recorder), tiles.use(TILE, ["forward"]), replays(torch.device("cpu")):
        for _ in range(2):
            forward(*inputs())
        driver.stream = 11
        with no_long_way():
            forward(*inputs())
        assert recorder.launches[-1][3] == 11


def unaligned():
    """Triton has another kernel for an address that is no multiple of 16."""
    with stand_in_gpu(), tiles.use(TILE, ["forward"]), replays(torch.device("cpu")):
        for _ in range(2):
            forward(*inputs())
        q, k, v = inputs()
        shifted = torch.cat([q.flatten(), q.flatten()])[1 : 1 + q.numel()].view(q.shape)
        with pytest.raises(AssertionError, match="the long way was gone"), no_long_way():
            forward(shifted, k, v)


OTHERS = {each.__name__: each for each in (watched, streamed, unaligned, forgets)}


HOPPER = ["hopper", "hopper_training", "forgets"]
PROGRAMS = {"portable": [name for name in (*CALLS, *OTHERS) if name not in HOPPER], "hopper": HOPPER}


@pytest.mark.parametrize("names", PROGRAMS.values(), ids=PROGRAMS)
def test_in_a_child(names):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_INTERPRET": "0",
    }
    child = subprocess.run(
        [sys.executable, Path(__file__), *names], env=environment, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stdout + child.stderr


def launches_in(file):
    """Where `kernel[grid](...)` stands in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            named = ast.unparse(node.func.value)
            if named.endswith("kernel"):
                yield f"{file.name}:{node.lineno}: {named}"


def test_every_launch_of_a_call_goes_through_one_function():
    """Else a replay would lack it."""
    package = Path(tilewise.__file__).parent
    found = [each for name in ("kernels", "plan", "pytorch") for each in (package / name).rglob("*.py")]
    launches = [launch for file in found for launch in launches_in(file)]
    assert [each.partition(":")[0] for each in launches] == ["launch.py"] * 2, launches
    assert [*launches_in(package / "tools" / "explain" / "coverage.py")], "the search finds what there is"


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:]:
        print(name, flush=True)
        the_same_launches(CALLS[name]) if name in CALLS else OTHERS[name]()
