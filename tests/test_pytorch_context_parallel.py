"""PyTorch's own context_parallel with tilewise behind the flash attention that it calls, block by block.

The chooser of `scaled_dot_product_attention` takes another op for CPU tensors, of which PyTorch's ring knows
nothing. So the ring is entered by the op that the chooser takes on a GPU.
"""

import pytest
import torch

from harness.gluon import needs_interpreter
from harness.gradients import assert_gradients_match
from harness.oracle import assert_matches
from harness.ranks import run
from tilewise import Causal
from tilewise.drop_in import flash_impl
from tilewise.plan.request import request_of

HEADS, KV_HEADS, LENGTH, DIM = 2, 1, 24, 8


def ring(mesh, rotate, q, k, v, do):
    """out, lse and gradients of causal attention, each rank with its chunks; joined, in the order of rows."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard, set_rotate_method

    set_rotate_method(rotate)
    handle = flash_impl.activate("CPU")
    try:
        with context_parallel(mesh, buffers=[q, k, v, do], buffer_seq_dims=[2] * 4):
            own = [x.clone().requires_grad_() for x in (q, k, v)]
            inputs = [DTensor.from_local(x, mesh, [Shard(2)], run_check=False) for x in own]
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*inputs, 0.0, True)
            grads = torch.autograd.grad(out.to_local(), own, do)
        parts = [out.to_local().detach(), lse.to_local().detach(), *grads]
        return context_parallel_unshard(mesh, parts, [2] * 5)
    finally:
        handle.remove()


@needs_interpreter
@pytest.mark.parametrize("rotate", ["allgather", "alltoall"])
def test_pytorchs_ring_over_tilewise(rotate):
    q, do = torch.randn(2, 1, HEADS, LENGTH, DIM)
    k, v = torch.randn(2, 1, KV_HEADS, LENGTH, DIM)
    request = request_of(q, k, v, mask=Causal(), impl="portable")
    dlse = torch.zeros(1, HEADS, LENGTH)
    for out, lse, *grads in run((3,), ring, rotate, q, k, v, do):
        assert_matches(out, lse, request)
        assert_gradients_match(dict(zip("qkv", grads, strict=True)), request, do, dlse)
