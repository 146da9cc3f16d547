"""What only a GPU can show: that NCCL's groups, and a GPU's kernels, answer a call of one rank as one device
does."""

import pytest
import torch
import torch.distributed as dist
import triton

import tilewise

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU, and torch.cuda.is_available() is False", allow_module_level=True)
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 is set: no kernel runs on the GPU", allow_module_level=True)

from harness.gradients import assert_gradients_match
from harness.oracle import assert_matches
from tilewise.plan.request import request_of


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ("ring", "all_gather", "heads"))
def test_a_rank_alone_is_one_device(mesh, method):
    from tilewise.distributed import context_parallel_attention, join, split

    whole = [torch.randn(2, heads, 512, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    arguments = dict(mask=tilewise.Causal() & tilewise.Window(200, 0), score=tilewise.Softcap(20.0))
    own = [split(x, mesh).requires_grad_() for x in whole]
    out, lse = context_parallel_attention(*own, mesh=mesh, method=method, return_lse=True, **arguments)
    do, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), own, (do, dlse))
    request = request_of(*whole, **arguments)
    with torch.no_grad():
        assert_matches(join(out, mesh), lse, request)
    assert_gradients_match(dict(zip("qkv", grads, strict=True)), request, do, dlse)
