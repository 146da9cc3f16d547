"""The interpreter that the tests use (harness/quick.py) computes what Triton's own does, bit for bit."""

import os
import subprocess
import sys

import pytest

COMPARE = """
import random
import sys

import torch

import tilewise
from harness.features import build
from harness.quick import quick_interpreter
from harness.variants import COMBINATIONS


def answers(features, dtype):
    problem = build(torch.device("cpu"), random.Random(0), features, dtype=dtype, q_len=20, kv_len=24)
    inputs = [x.requires_grad_() for x in problem.tensors()]
    packed = problem.rows() is not None
    call = tilewise.packed_attention if packed else tilewise.attention
    out, lse = call(*inputs, **problem.keywords(), return_lse=True)
    given = out.detach(), lse.detach().nan_to_num(0, 0, 0)
    return [out, lse, *torch.autograd.grad((out, lse), inputs, given)]


for features, dtype in zip(COMBINATIONS, 3 * (torch.float32, torch.bfloat16)):
    slowly = answers(features, dtype)
    with quick_interpreter():
        quickly = answers(features, dtype)
    for one, other in zip(slowly, quickly, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype, (features, dtype)
    print(*features)
"""


@pytest.mark.oldest
def test_same_bits_as_tritons_own_interpreter():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
