"""tilewise as a kernel of Hugging Face's Hub: what `.ci/hub/make.py` writes loads and computes, alone and
beside an installed tilewise, and what could break it silently stops it from being written."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import tilewise

ROOT = Path(__file__).parents[1]
MAKE = runpy.run_path(str(ROOT / ".ci/hub/make.py"))

ALONE = """
import sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tilewise", "tilewise_reference"):
            raise ImportError(name)
sys.meta_path.insert(0, Nowhere())
"""
STEP = """
import torch
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
lengths = torch.tensor([17])
def attend(tw, q, k, v):
    return tw.attention(q, k, v, mask=tw.Causal() & tw.Padding(lengths), score=tw.Softcap(3.0))
def step(tw, function=attend):
    out = function(tw, q, k, v)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
def same(some, others):
    return all(map(torch.equal, some, others))
"""
LOAD = """
import kernels
from pathlib import Path
kernel = kernels.get_local_kernel(Path(sys.argv[1]))
"""
COMPILE = """
def graph(tw):
    return torch.compile(lambda _, *given: attend(tw, *given), backend="aot_eager", fullgraph=True)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    MAKE["main"](out)
    return out


def run(code: str, *arguments: object, **environment: str) -> str:
    set_here = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code, *map(str, arguments)],
        env=os.environ | set_here | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_loads_and_trains_where_tilewise_is_not_installed(made):
    code = ALONE + LOAD + STEP + COMPILE + """
out, *grads = step(kernel)
assert all(x.isfinite().all() and x.abs().sum() > 0 for x in (out, *grads))
assert same(step(kernel, graph(kernel)), (out, *grads))
plain = kernel.attention(q, k, v, mask=kernel.Causal(), impl="torch")
torch.testing.assert_close(kernel.attention(q, k, v, mask=kernel.Causal()), plain)
torch.testing.assert_close(kernel.scaled_dot_product_attention(q, k, v, is_causal=True), plain)
assert kernel.tiles.__name__ == f"{kernel.__name__}.plan.tiles"
assert not any(name.partition(".")[0] == "tilewise" for name in sys.modules)
print(*sorted(kernel.__all__))
"""  # fmt: skip
    assert run(code, made).split() == sorted(tilewise.__all__)


@pytest.mark.parametrize("order", ["kernel first", "tilewise first"])
def test_beside_an_installed_tilewise_both_keep_their_own(order, made):
    imports = [LOAD, "import tilewise\n"] if order == "kernel first" else ["import tilewise\n", LOAD]
    code = "".join(imports) + STEP + COMPILE + """
mine, theirs = step(tilewise), step(kernel)
assert same(mine, theirs)
assert same(mine, step(tilewise, graph(tilewise))) and same(theirs, step(kernel, graph(kernel)))
assert kernel.Causal is not tilewise.Causal
assert kernel.__name__ in sys.modules and kernel.__name__ != "tilewise"
for name in ("attention_forward", "attention_backward", "append_to_cache", "turn_queries"):
    ops = [getattr(getattr(torch.ops, space), name).default for space in ("tilewise", kernel.__name__)]
    schemas = [str(op._schema).partition("(")[2] for op in ops]
    assert ops[0] is not ops[1] and schemas[0] == schemas[1]
homes = {Path(module.__file__).parent for name, module in sys.modules.items()
         if name.startswith((kernel.__name__, "tilewise_reference")) and module.__file__}
assert all(home.is_relative_to(sys.argv[1]) or home.name == "tilewise_reference" for home in homes)
from torch.nn.attention import list_flash_attention_impls
assert list_flash_attention_impls().count("tilewise") == 1
"""  # fmt: skip
    run(code, made)


def test_a_stand_in_for_a_kernel_of_the_hub(made):
    code = ALONE + STEP + """
import kernels
kernel = kernels.get_kernel("somebody/tilewise", version=1)
assert all(x.isfinite().all() for x in step(kernel))
"""  # fmt: skip
    run(code, LOCAL_KERNELS=f"somebody/tilewise={made}")
