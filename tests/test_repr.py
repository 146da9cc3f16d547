"""Masks, scores and `Cosine` read as the calls that make them."""

import pytest
import torch

import tilewise
from harness.calls import doubled, even_keys
from tilewise import (
    ALiBi,
    Causal,
    Cosine,
    Dense,
    Documents,
    Padding,
    Prefix,
    RelativePosition,
    Window,
)
from tilewise.parts.masks.mask import Mask
from tilewise.plan.request import make_request
from tilewise.pytorch.encoding import decode, encode

IDS = torch.arange(5)
WITHOUT_TENSORS = [
    "Causal()",
    "Causal(align='top_left')",
    "Causal(align='bottom_right')",
    "Causal(align=-3)",
    "Window(3, 0)",
    "Window(None, 2, align='top_left')",
    "Prefix(3)",
    "Padding(3, side='left')",
    "Causal() & Window(3, 0) & Padding(7)",
    "(Causal() | Window(3, 0)) & ~Padding(7)",
    "~(Causal() & Padding(7))",
    "BlockCausal(6, window=2, align='top_left')",
    "Neighborhood((3, 4), dilation=2, shape=(8, 9), causal=(True, False))",
    "Softcap(30.0)",
    "Cosine(2.0)",
]
WITH_TENSORS = {
    "Padding(tensor[2])": lambda: Padding(torch.tensor([1, 2])),
    "Prefix(tensor[2], align='top_left')": lambda: Prefix(torch.tensor([1, 2]), "top_left"),
    "Causal(align=tensor[2])": lambda: Causal(torch.tensor([1, 2])),
    "ALiBi(tensor[4], align=tensor[1])": lambda: ALiBi(torch.ones(4), torch.tensor([1])),
    "Documents(tensor[5])": lambda: Documents(IDS),
    "Documents(tensor[5], kv_ids=tensor[5])": lambda: Documents(IDS, IDS + 1),
    "Intervals(tensor[5], tensor[5])": lambda: tilewise.Intervals(IDS, IDS + 1),
    "Dense(tensor[5, 7])": lambda: Dense(torch.ones(5, 7).bool()),
    "Causal() & Dense(tensor[5, 7])": lambda: Causal() & torch.ones(5, 7).bool(),
    "ALiBi(tensor[4])": lambda: ALiBi(torch.ones(4)),
    "RelativePosition(tensor[4, 32], max_distance=64)": lambda: RelativePosition(torch.ones(4, 32), 64),
    "Bias(tensor[5, 7])": lambda: tilewise.Bias(torch.ones(5, 7)),
    "Cosine(tensor[4])": lambda: Cosine(torch.ones(4)),
    "UserMask(even_keys)": lambda: tilewise.UserMask(even_keys),
    "UserMask(even_keys, args=(3, tensor[5]))": lambda: tilewise.UserMask(even_keys, (3, IDS)),
    "UserScore(doubled, args=(tensor[4],), derivative=doubled, parameters={0: ('h', doubled)})": lambda: (
        tilewise.UserScore(doubled, (torch.ones(4),), derivative=doubled, parameters={0: ("h", doubled)})
    ),
}


@pytest.mark.parametrize("text", WITHOUT_TENSORS)
def test_what_holds_no_tensor_can_be_evaluated(text):
    made = eval(text, vars(tilewise))
    assert repr(made) == text
    again = eval(repr(made), vars(tilewise))
    assert type(again) is type(made)
    if isinstance(made, Mask):
        assert [vars(leaf) for leaf in made.leaves()] == [vars(leaf) for leaf in again.leaves()]
    elif isinstance(made, tilewise.Score):
        assert vars(again) == vars(made)
    else:
        assert again == made


@pytest.mark.parametrize("text", WITH_TENSORS)
def test_a_tensor_reads_as_its_shape_and_a_function_as_its_name(text):
    assert repr(WITH_TENSORS[text]()) == text


def test_a_class_of_the_callers_own_reads_as_far_as_it_is_known():
    class Every(Mask):
        def __init__(self, step, start=0):
            self.step, self.offset = step, start

    assert repr(Every(3, 1)) == "Every(3)"

    class Hidden(Mask):
        def __init__(self, step):
            self.stride = step

    assert repr(Hidden(3)) == "Hidden(...)"


def test_what_a_compiled_graph_carries_reads_alike(device):
    """Decoded objects have no twins, and no constructor made them."""
    q = torch.zeros(1, 1, 5, 8, device=device)
    mask = tilewise.UserMask(even_keys, twin=lambda *_: True) & Window(3, 0)
    request = make_request(q, q, q, mask=mask)
    again = decode(q, q, q, encode(request))
    assert list(map(repr, again.masks)) == ["UserMask(even_keys)", "Window(3, 0)"]
