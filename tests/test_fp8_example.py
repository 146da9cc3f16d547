"""`examples/fp8_error.py`, on a part of what it collects: the kernels beside plain fp8, on real activations;
and what docs/fp8.md says of the rotation."""

import importlib

import pytest
import torch

import tilewise
from harness.examples import EXAMPLES

RIGHT = 1.1  # times the error of plain fp8; with the same roundings they are the same but for sums
NOISE = 1.5  # between ways of rounding the same numbers to 3 bits


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("fp8_error")


def part(layer):
    """Two heads of some tokens, in more tiles of 16 rows than one."""
    return tuple(x[:, :2, :41] for x in layer)


@pytest.mark.parametrize(("model", "causal"), [("encoder", False), ("gpt", True)])
def test_the_kernels_are_as_exact_as_plain_fp8(example, model, causal):
    layers = example.gpt_layers(steps=20) if model == "gpt" else example.encoder_layers()
    assert len(layers) == {"gpt": 2, "encoder": 6}[model]
    *found, bf16 = example.rows([part(layers[-1])], causal, scales=("tensor", "head", 16))
    assert [(row.scales, row.rotated) for row in found] == [
        (scales, rotated) for scales in ("tensor", "head", "16 rows") for rotated in ("no", "yes")
    ]
    for row in (*found, bf16):
        for ours, plain in zip(row.tilewise, row.reference, strict=True):
            assert 0 < ours <= RIGHT * plain + 1e-6, row
    for row in found:  # neither scales nor the rotation change what these numbers lose
        assert 3 * bf16.tilewise.relative < row.tilewise.relative < 0.08, (row, bf16)
        assert row.tilewise.relative < NOISE * found[0].tilewise.relative, row
        assert found[0].tilewise.relative < NOISE * row.tilewise.relative, row


def test_the_rotation_spreads_an_outlier_that_q_and_k_share():
    """And to one that k has alone it is neither good nor bad."""
    q, k, v = torch.randn(3, 1, 8, 96, 64, generator=torch.Generator().manual_seed(0))

    def error_of_scores(q_factor, k_factor, rotate):
        a, b = q.clone(), k.clone()
        a[..., 5] *= q_factor
        b[..., 5] *= k_factor
        q8, k8, _, scales = tilewise.quantize(a, b, v, rotate=rotate, impl="torch")
        s8 = (q8.double() @ k8.double().mT) * (scales.q * scales.k)[..., None, None]
        s = a.double() @ b.double().mT
        return ((s8 - s).norm() / s.norm()).item()

    assert error_of_scores(5, 30, True) < 0.4 * error_of_scores(5, 30, False)
    assert error_of_scores(1, 30, True) == pytest.approx(error_of_scores(1, 30, False), rel=0.2)
