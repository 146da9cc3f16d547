"""Functions of the caller's own as torch.compile meets them where there is a GPU, and no interpreter."""

import os
import subprocess
import sys

import pytest

OF_A_GPU = """
import sys
import torch, torch.utils._triton
torch.utils._triton.has_triton = lambda: sys.argv[1] == "True"  # what Dynamo asks where there is a GPU
import triton, triton.language as tl
import tilewise

@triton.jit
def keep(q_idx, kv_idx, batch, head, args):
    return q_idx >= kv_idx

@triton.jit
def other_keep(q_idx, kv_idx, batch, head, args):
    return q_idx <= kv_idx

@triton.jit
def steep(s, batch, head, q_idx, kv_idx, args):
    return s * tl.load(args[0] + head)

@triton.jit
def steep_derivative(s, batch, head, q_idx, kv_idx, args):
    return tl.load(args[0] + head)

@triton.jit
def steep_by_factor(s, batch, head, q_idx, kv_idx, args):
    return s

def attend(q, mask, factors):
    score = tilewise.UserScore(steep, (factors,), derivative=steep_derivative,
                               parameters={0: ("h", steep_by_factor)})
    return tilewise.attention(q, q, q, mask=tilewise.UserMask(keep) if mask is None else mask, score=score)

assert isinstance(keep, triton.runtime.JITFunction)
seen = []

def backend(graph, inputs):
    (call,) = (node for node in graph.graph.nodes if "attention_forward" in str(node.target))
    (words,) = (x for x in call.args if isinstance(x, str))
    seen.append([word[2:] for word in words.split() if word.startswith("f:__main__:")])
    return graph.forward

q = torch.empty(1, 2, 5, 8, device="meta", requires_grad=True)
factors = torch.empty(2, device="meta", requires_grad=True)
compiled = torch.compile(attend, fullgraph=True, backend=backend)
for mask in (None, tilewise.UserMask(keep), tilewise.UserMask(other_keep), None):
    compiled(q, mask, factors).sum().backward()
scores = ["__main__:steep", "__main__:steep_derivative", "__main__:steep_by_factor"]
masks = ["__main__:keep", "__main__:keep", "__main__:other_keep"]
assert seen == [[mask, *scores] for mask in masks], seen
assert q.grad.shape == q.shape and factors.grad.shape == factors.shape
"""


@pytest.mark.oldest
@pytest.mark.parametrize("sees_a_gpu", [True, False])
def test_functions_that_a_gpu_would_compile_are_traced(sees_a_gpu, tmp_path):
    """Outside the interpreter they are other objects, to Dynamo too, and of two kinds; on device "meta"
    nothing is launched. A process of its own: TRITON_INTERPRET is read at import."""
    (tmp_path / "program.py").write_text(OF_A_GPU)
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "program.py", str(sees_a_gpu)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
