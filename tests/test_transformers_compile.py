"""Models of Transformers with attn_implementation="tilewise" under torch.compile, in one graph."""

from functools import partial

import pytest
import torch
import transformers as hf
from test_transformers import PACKED, assert_as_eager
from torch._dynamo.testing import CompileCounter

from harness.hf_models import inputs, logits_of, make, padded, tokens

CASES = {
    "no mask": ("Gemma 3", dict(input_ids=tokens())),
    "padded": ("Gemma 3", dict(input_ids=tokens(), attention_mask=padded("torn"))),
    "packed": ("Gemma 3", PACKED),
    "padded on the left": ("Llama", dict(input_ids=tokens(), attention_mask=padded("left"))),
}


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setattr("tilewise.plan.implementation.INTERPRETED", False)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
def test_a_step_in_one_graph(case):
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    assert_as_eager(*CASES[case], through=compiled, use_cache=False)


def test_one_graph_for_all_lengths():
    model = make("Llama", "tilewise")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 8, 11):
        given = dict(input_ids=tokens()[:, :length], attention_mask=padded("left")[:, :length])
        given = {name: x.contiguous() for name, x in given.items()}
        traced, eager = (logits_of(way, given, use_cache=False) for way in (compiled, model))
        torch.testing.assert_close(traced, eager)
    assert counter.frame_count == 1


def test_generation_with_a_static_cache():
    """The masks are made outside of the graph and handed in."""
    found = []
    for compiled in (False, True):
        model = make("Gemma 3", "tilewise")
        if compiled:
            model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        settings = hf.GenerationConfig(
            max_new_tokens=6, do_sample=False, cache_implementation="static", pad_token_id=0,
            disable_compile=True, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        found.append(model.generate(**inputs("Gemma 3"), generation_config=settings))
    eager, traced = found
    assert torch.equal(eager.sequences, traced.sequences)
    torch.testing.assert_close(torch.stack(eager.logits), torch.stack(traced.logits))
