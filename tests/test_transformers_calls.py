"""The attention function that Transformers calls, argument by argument, and what it refuses."""

import subprocess
import sys

import pytest
import torch
import transformers as hf

import tilewise
from harness.hf_models import make, tokens
from tilewise.integrations.transformers.attention import attention_forward
from tilewise.integrations.transformers.masks import model_mask
from tilewise.tools.doctor.maker import as_made
from tilewise.tools.doctor.model import examine_model

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 7, 8


@pytest.fixture
def layer():
    """A layer as the attention function is given it: causal unless it is told otherwise."""
    return torch.nn.Module()


@pytest.fixture
def qkv(device):
    q = torch.randn(BATCH, HEADS, LENGTH, DIM, device=device)
    return q, *torch.randn(2, BATCH, KV_HEADS, LENGTH, DIM, device=device)


def same(given, layer, qkv, options, **ours):
    """The call with `options` gives what `tilewise.attention` gives with `ours`."""
    torch.manual_seed(0)
    out, weights = attention_forward(layer, *qkv, given, **options)
    torch.manual_seed(0)
    want = tilewise.attention(*qkv, **ours).transpose(1, 2)
    assert weights is None and out.shape == (BATCH, LENGTH, HEADS, DIM)
    assert torch.equal(out, want)


def test_scores(layer, qkv, device):
    causal = model_mask(BATCH, LENGTH, LENGTH, device=device)
    bias, sink = torch.randn(1, HEADS, LENGTH, LENGTH, device=device), torch.randn(HEADS, device=device)
    masked = dict(mask=tilewise.Causal())
    same(causal, layer, qkv, dict(scaling=0.3), **masked, scale=0.3)
    same(causal, layer, qkv, dict(softcap=2.0), **masked, score=tilewise.Softcap(2.0))
    same(causal, layer, qkv, dict(s_aux=sink), **masked, sink=sink)
    same(causal, layer, qkv, dict(position_bias=bias), **masked, bias=bias)
    same(causal, layer, qkv, dict(dropout=0.3), **masked, dropout_p=0.3)
    scores = [tilewise.Softcap(2.0), tilewise.Bias(bias)]
    together = dict(scaling=0.3, softcap=2.0, s_aux=sink, position_bias=bias, dropout=0.3)
    same(causal, layer, qkv, together, **masked, scale=0.3, score=scores, sink=sink, dropout_p=0.3)


def test_masks_that_a_caller_made(layer, qkv, device):
    """Bool, and added to the scores: of four dimensions, as models take them. None is causal or not, as
    is_causal or else the layer says."""
    keep = torch.rand(BATCH, 1, LENGTH, LENGTH, device=device) < 0.7
    keep[..., 0] = True
    added = torch.randn(BATCH, 1, LENGTH, LENGTH, device=device)
    bias = torch.randn(1, HEADS, LENGTH, LENGTH, device=device)
    same(keep, layer, qkv, {}, mask=keep)
    same(added, layer, qkv, {}, bias=added)
    same(added, layer, qkv, dict(position_bias=bias), score=tilewise.Bias(bias), bias=added)
    same(None, layer, qkv, {}, mask=tilewise.Causal())
    same(None, layer, qkv, dict(is_causal=False))
    same(None, layer, qkv, dict(sliding_window=LENGTH), mask=tilewise.Causal())
    layer.is_causal = False
    same(None, layer, qkv, {})
    same(None, layer, qkv, dict(is_causal=True), mask=tilewise.Causal())
    one = qkv[0][:, :, :1]
    out, _ = attention_forward(layer, one, *qkv[1:], None, is_causal=True)
    assert torch.equal(out, tilewise.attention(one, *qkv[1:]).transpose(1, 2))  # a token sees its cache


def test_packed_sequences_by_their_offsets(layer, qkv, device):
    """Masks hold inside each sequence; keys may be packed otherwise than queries."""
    q, k, v = (x[:1] for x in qkv)
    offsets = torch.tensor([0, 4, 4, LENGTH], dtype=torch.int32, device=device)
    others = torch.tensor([0, 1, 3, LENGTH], dtype=torch.int32, device=device)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    window = tilewise.integrations.transformers.known.library.sliding_window_causal_mask_function(2)
    for given, mask in (
        (model_mask(1, LENGTH, LENGTH, device=device), tilewise.Causal()),
        (model_mask(1, LENGTH, LENGTH, mask_function=window, device=device), tilewise.Window(1, 0)),
        (None, tilewise.Causal()),
    ):
        for kv_offsets in (None, offsets, others):
            given_offsets = dict(cu_seq_lens_q=offsets, cu_seq_lens_k=kv_offsets, max_length_q=4)
            out, _ = attention_forward(layer, q, k, v, given, **given_offsets)
            ours = dict(q_offsets=offsets, kv_offsets=None if kv_offsets is offsets else kv_offsets)
            assert torch.equal(out[0], tilewise.packed_attention(*rows, **ours, mask=mask))
    out, _ = attention_forward(layer, q, k, v, None, is_causal=False, cu_seq_lens_q=offsets)
    assert torch.equal(out[0], tilewise.packed_attention(*rows, q_offsets=offsets))


REFUSED = {
    "an unknown argument": (TypeError, dict(indices=torch.zeros(1)), "Module gives its attention indices="),
    "weights": (ValueError, dict(output_attentions=True), "output_attentions=True.*'eager'"),
    "a window without its mask": (ValueError, dict(sliding_window=3), "sliding_window=3 with"),
    "a mask of two dimensions": (
        ValueError, dict(attention_mask=torch.ones(BATCH, LENGTH)), r"shape=\(2, 7\) must have 4 dimensions",
    ),
    "offsets and a batch": (ValueError, dict(cu_seq_lens_q=torch.tensor([0, LENGTH])), "the batch has 2"),
    "offsets and a bias": (
        ValueError, dict(cu_seq_lens_q=torch.tensor([0, 3]), position_bias=torch.zeros(1)), "position_bias",
    ),
    "offsets and a tensor": (
        ValueError,
        dict(cu_seq_lens_q=torch.tensor([0, 3]), attention_mask=torch.ones(1, 1, 7, 7).bool()),
        r"attention_mask has a tensor \(1, 1, 7, 7\)",
    ),
    "offsets and padding": (
        ValueError,
        dict(
            cu_seq_lens_q=torch.tensor([0, 3]),
            attention_mask=model_mask(1, 7, 7, attention_mask=torch.arange(7)[None] < 5),
        ),
        "attention_mask has Padding",
    ),
    "a mask of other sizes": (
        ValueError, dict(attention_mask=model_mask(BATCH, LENGTH, 9)), "7 queries and 9 keys, .* 7 and 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, layer, qkv):
    error, changes, words = REFUSED[case]
    with pytest.raises(error, match=words):
        attention_forward(layer, *qkv, **{"attention_mask": None} | changes)


def test_arguments_without_effect(layer, qkv):
    others = dict(position_ids=torch.arange(LENGTH), use_cache=True, num_items_in_batch=3, unheard_of=None)
    same(None, layer, qkv, others, mask=tilewise.Causal())


def test_an_unknown_argument_to_the_model():
    """Models hand on what their forward does not know: it arrives at the attention, and is not ignored."""
    model = make("Llama", "tilewise")
    with pytest.raises(TypeError, match="LlamaAttention gives its attention attention_sink=, which tilewise"):
        model(tokens(), attention_sink=torch.zeros(4))
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(tokens(), output_attentions=True)


def test_weights_of_chosen_rows_in_chosen_layers():
    ids = tokens()
    want = make("Llama", "eager")(ids, output_attentions=True).attentions
    model = make("Llama", "tilewise")
    last = ids.shape[1] - 1
    with tilewise.integrations.transformers.attention_rows([last, 2], layers=[1]):
        (second,) = model(ids, output_attentions=True).attentions
    torch.testing.assert_close(second, want[1][:, :, [last, 2]], atol=1e-5, rtol=1e-5)
    with tilewise.integrations.transformers.attention_rows():
        found = model(ids, output_attentions=True).attentions
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_switching_a_model_that_is_there():
    model = make("Llama", "eager")
    want = model(tokens()).logits
    model.set_attn_implementation("tilewise")
    assert torch.allclose(model(tokens()).logits, want, atol=1e-5)
    tilewise.integrations.transformers.register()  # again: nothing changes
    assert "tilewise" in hf.AttentionInterface().valid_keys()


def test_unused_until_registered():
    """Importing tilewise imports no Transformers, and registers nothing."""
    script = (
        "import sys, tilewise\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try: tilewise.integrations.transformers.register()\n"
        "except ImportError as error: print(error)\n"
        "from types import SimpleNamespace\n"
        "sys.modules['transformers'] = SimpleNamespace(__version__='5.3.1')\n"
        "try: tilewise.integrations.transformers.register()\n"
        "except ImportError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    missing, old = found.stdout.splitlines()
    assert missing == 'Transformers is not installed: pip install "transformers>=5.4"'
    assert old == (
        "Transformers 5.3.1 is too old for attn_implementation='tilewise': pip install \"transformers>=5.4\""
    ), found.stderr


@pytest.mark.parametrize("name, has", [("BERT", "no mask"), ("T5", "Bias")])
def test_doctor(name, has):
    """A model of Transformers brings inputs of its own. What "eager" writes out, "tilewise" answers."""
    for implementation in ("eager", "tilewise"):
        model = make(name, implementation)
        found = examine_model(as_made(lambda model=model: model, "make_model"))
        if implementation == "eager":
            assert found.answered == 0 < found.calls == eager_calls(model)
            (advice,) = {advice for seen in found.seen for advice in seen.advice}
            assert "integrations.transformers.register()" in advice and "'tilewise'" in advice
        else:
            assert found.answered == found.calls == eager_calls(model)
            assert any(has in f"{seen.entry.mask} {seen.entry.options}" for seen in found.seen)


def eager_calls(model):
    """How many layers of attention a model has."""
    return len(
        [part for part in model.modules() if type(part).__name__ in ("BertSelfAttention", "T5Attention")]
    )
