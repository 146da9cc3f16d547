"""Models of Transformers with attn_implementation="tilewise", beside "eager".

The rule is that of `harness.oracle`: the float64 model with "eager" says what is right, and the error of
"eager" in the model's own dtype what is allowed. Plain PyTorch answers for all models, the kernels for four.
"""

import itertools

import pytest
import torch
import transformers as hf

from harness import model_table
from harness.hf_models import (
    DECODERS,
    GENERATING,
    INTERPRETED,
    LENGTH,
    MODELS,
    exactly,
    gradients_of,
    inputs,
    logits_of,
    make,
    tokens,
)
from harness.oracle import _assert_close
from harness.support_table import filled
from tilewise.integrations.transformers import masks
from tilewise_reference.yardstick import largest_difference

NEW = 6  # tokens that are generated


@pytest.fixture(params=["torch", "kernels"])
def answering(request, monkeypatch):
    """Who answers: plain PyTorch as on any CPU, or the kernels, in the interpreter where there is no GPU."""
    if request.param == "torch":
        monkeypatch.setattr("tilewise.plan.implementation.INTERPRETED", False)


@pytest.fixture(autouse=True)
def structured(monkeypatch):
    """No mask becomes a tensor of all pairs: these models' patterns are known."""

    def reached(**_):
        raise AssertionError("a bool tensor of all pairs")

    monkeypatch.setattr(masks, "sdpa_mask", reached)


def both_ways(names):
    """Each model in plain PyTorch; those of INTERPRETED by the kernels too."""
    return pytest.mark.parametrize(
        "name, answering",
        [(name, "torch") for name in names] + [(name, "kernels") for name in names if name in INTERPRETED],
        indirect=["answering"],
    )


def assert_as_eager(name, given, dtype=torch.float32, through=lambda model: model, **options):
    """Logits and gradients of all parameters. through: what becomes of tilewise's model before it runs."""
    results = {}
    for way, implementation, of_way in (
        ("exact", "eager", torch.float64),
        ("eager", "eager", dtype),
        ("ours", "tilewise", dtype),
    ):
        model = make(name, implementation, of_way)
        run = through(model) if way == "ours" else model
        logits = logits_of(run, given, **options)
        results[way] = {"logits": logits.detach(), **gradients_of(model, logits)}
    assert results["ours"].keys() == results["exact"].keys()
    for what, want in results["exact"].items():
        error = largest_difference(results["eager"][what], want)
        _assert_close(f"{name}'s {what}", results["ours"][what], want, error)


@both_ways(MODELS)
def test_logits_and_gradients(name, answering):
    assert_as_eager(name, inputs(name))


@pytest.mark.oldest
@pytest.mark.parametrize("side", ["right", "torn", "none"])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3"])
@pytest.mark.parametrize("answering", ["torch"], indirect=True)
def test_padding_anywhere(name, side, answering):
    given = inputs(name, side)
    assert_as_eager(name, given)
    if side == "none":
        given.pop("attention_mask")
        assert_as_eager(name, given)


@pytest.mark.parametrize("answering", ["torch"], indirect=True)
def test_half_precision(answering):
    assert_as_eager("Llama", inputs("Llama"), torch.bfloat16)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("answering", ["torch"], indirect=True)
def test_checkpointing(answering):
    def checkpointed(model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        return model.train()

    assert_as_eager("Gemma 3", inputs("Gemma 3"), through=checkpointed, use_cache=False)


PACKED = dict(input_ids=tokens(1), position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]]))
OFFSETS = torch.tensor([0, 5, 7, LENGTH], dtype=torch.int32)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("answering", ["torch"], indirect=True)
def test_packed_sequences(name, answering):
    """By positions that start again, as "eager" knows them; and by offsets besides, as a data collator for
    FlashAttention gives them. Each sequence has what it has alone."""
    assert_as_eager(name, PACKED, use_cache=False)
    offsets = dict(cu_seq_lens_q=OFFSETS, cu_seq_lens_k=OFFSETS, max_length_q=5, max_length_k=5)
    model, exact, eager = make(name, "tilewise"), make(name, "eager", torch.float64), make(name, "eager")
    together = logits_of(model, PACKED, **offsets, use_cache=False)
    for start, end in itertools.pairwise(OFFSETS):
        alone = dict(input_ids=PACKED["input_ids"][:, start:end])
        want = logits_of(exact, alone)
        error = largest_difference(logits_of(eager, alone), want)
        _assert_close("packed logits", together[:, start:end], want, error)


@pytest.mark.oldest
@both_ways([name for name in GENERATING if name != "T5"])
def test_generation(name, answering):
    generate_as_eager(name)


@both_ways(["T5"])
def test_generation_with_position_bias(name, answering):
    generate_as_eager(name)


def generate_as_eager(name):
    """Greedy tokens, with a cache that grows and one of fixed size, of a batch with left padding."""
    given = {key: x for key, x in inputs(name).items() if key != "decoder_input_ids"}
    for cache in ("dynamic", "static"):
        results = []
        for implementation, dtype in (
            ("eager", torch.float64), ("eager", torch.float32), ("tilewise", torch.float32),
        ):  # fmt: skip
            model = make(name, implementation, dtype)
            options = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
            if cache == "static":
                options["cache_implementation"] = "static"
            given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}
            settings = hf.GenerationConfig(
                output_logits=True, pad_token_id=0, decoder_start_token_id=1, **options
            )
            with exactly(dtype):
                found = model.generate(**given, generation_config=settings)
            results.append((found.sequences, torch.stack(found.logits)))
        (exact, want), (_, eager), (ours, logits) = results
        assert torch.equal(ours, exact)
        _assert_close(f"{name}'s logits, {cache} cache", logits, want, largest_difference(eager, want))


def test_the_page_lists_what_is_tested():
    text = model_table.PAGE.read_text(encoding="utf-8")
    command = "PYTHONPATH=kernels:reference:tests python -m harness.model_table"
    assert filled(text, "models", model_table.table()) == text, f"docs/transformers.md: {command}"
