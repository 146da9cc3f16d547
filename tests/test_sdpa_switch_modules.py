"""tilewise.sdpa behind PyTorch's own modules, whose attention no torch function mode sees by itself."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewise
from harness.switched import KERNELS, PYTORCH, assert_model_matches, fresh_switch, reasons, who
from tilewise.drop_in.rebound import needs_weights

__all__ = ["fresh_switch"]


def multi_head() -> nn.Module:
    return nn.MultiheadAttention(16, 2, batch_first=True)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(), 2)


def attend(model: nn.Module, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    if isinstance(model, nn.MultiheadAttention):
        return model(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    return model(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("make", [multi_head, encoder_layer])
@pytest.mark.parametrize("training", [True, False])
def test_results_and_gradients(make, training):
    model, x = make().train(training), torch.randn(2, 7, 16)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    region = tilewise.sdpa()

    def switched(model):
        with region:
            return attend(model, x, padding)

    assert_model_matches(model, lambda model, dtype: attend(model, x.to(dtype), padding), switched)
    assert who() == [KERNELS]


@pytest.mark.parametrize("make", [multi_head, encoder_layer, encoder])
@pytest.mark.parametrize("padded", [True, False])
def test_in_place_of_the_fast_paths(make, padded, device):
    """In eval mode without gradients PyTorch takes functions of C++, and nested tensors for padding."""
    model, x = make().eval().to(device), torch.randn(2, 7, 16, device=device)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3], device=device) if padded else None
    with torch.no_grad():
        want = attend(model, x, padding)
        with tilewise.sdpa():
            got = attend(model, x, padding)
    real = slice(None) if padding is None else ~padding
    assert (got[real] - want[real]).abs().max() < 1e-5  # both in fp32, of a size near 1
    assert who() == [KERNELS] * (2 if make is encoder else 1)


def test_weights_are_pytorchs(device):
    model, x = multi_head().to(device), torch.randn(2, 5, 16, device=device)
    want = model(x, x, x)
    with tilewise.sdpa():
        got = model(x, x, x)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert "need_weights=True" in reasons()
    with tilewise.sdpa():
        model(x, x, x, need_weights=False)
    assert who() == [KERNELS]


def test_weights_by_position(device):
    """A graph hands the arguments on as they were given."""
    named = inspect.signature(F.multi_head_attention_forward).parameters
    given = {name: p.default for name, p in named.items() if p.default is not p.empty}
    for wanted in (True, False):
        values = {name: None for name in named} | given | dict(need_weights=wanted)
        assert needs_weights(tuple(values.values()), {}) is wanted
        assert needs_weights((), dict(need_weights=wanted)) is wanted
    assert needs_weights((), {})


def test_the_function_itself_is_left_alone(device):
    names = F.multi_head_attention_forward.__globals__
    assert names["scaled_dot_product_attention"] is F.scaled_dot_product_attention
    model, x = multi_head().to(device), torch.randn(2, 5, 16, device=device)
    with tilewise.sdpa():
        model(x, x, x, need_weights=False)
    model(x, x, x, need_weights=False)
    assert who() == [KERNELS]


def test_nested_regions_answer_a_module_once(device):
    model, x = multi_head().to(device), torch.randn(2, 5, 16, device=device)
    with tilewise.sdpa(), tilewise.sdpa():
        model(x, x, x, need_weights=False)
        wide, y = nn.MultiheadAttention(600, 1).to(device), torch.randn(5, 2, 600, device=device)
        wide(y, y, y, need_weights=False)
    assert who() == [KERNELS, PYTORCH]
