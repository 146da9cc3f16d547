"""`why_not` lists every reason that can be judged, whatever else is wrong."""

import math

import pytest
import torch

import tilewise
from harness.calls import BARE, BOOL, INT, KV_LEN, Q_LEN, doubled, even_keys, good, zeros
from tilewise.plan import checks


def test_a_good_call_breaks_no_rule(device):
    assert tilewise.why_not(**good(device)) == []
    assert tilewise.why_not(**good(device), return_lse=True) == []


def test_every_reason_is_listed(device, nothing_runs):
    """Independent mistakes are all named; mistakes in q, k and v come before those that depend on them."""
    changed = dict(scale=math.nan, sink=zeros(3)(device), bias=zeros(2, 2)(device), impl="fast")
    reasons = tilewise.why_not(**(good(device) | changed))
    assert len(reasons) == len(changed)
    given = ("scale=nan", "sink=(3,)", "bias.shape=(2, 2)", "impl='fast'")
    for name, reason in zip(given, reasons, strict=True):
        assert name in reason


HEADS3 = (2, 3, 7, 8)
TOGETHER = {
    "sizes beside options": (
        dict(scale=math.nan, sink=zeros(3), impl="fast", k=zeros(3, 2, 7, 8), v=zeros(2, 4, 6, 600)),
        ("batch", "head counts", "lengths k: 7", "value_dim=600", "scale=nan", "sink=(3,)", "impl='fast'"),
    ),
    "a rank beside heads and a dtype": (
        BARE | dict(q=zeros(4, 5, 8, **INT), k=zeros(*HEADS3, **INT), v=zeros(*HEADS3, **INT)),
        ("q.shape=(4, 5, 8)", "q_heads=4 must be a multiple of kv_heads=3", "q.dtype=torch.int32"),
    ),
    "all of rank three": (
        BARE | dict(q=zeros(4, 5, 8), k=zeros(3, 7, 8), v=zeros(3, 7, 8)),
        ("q.shape=(4, 5, 8), k.shape=(3, 7, 8), v.shape=(3, 7, 8)", "q_heads=4"),
    ),
    "heads side by side say nothing of heads": (
        BARE | dict(q=zeros(2, 5, 512, **INT), k=zeros(2, 7, 512, **INT), v=zeros(2, 7, 512, **INT)),
        ("q.shape=(2, 5, 512)", "q.dtype=torch.int32"),
    ),
    "too many dimensions": (
        BARE | dict(q=zeros(1, 2, 4, 5, 8, **INT), scale="big"),
        ("q.shape=(1, 2, 4, 5, 8)", "dtypes q: torch.int32", "q.dtype=torch.int32", "scale=big"),
    ),
    "no tensor": (
        BARE | dict(q=[[1.0]], v=3, similarity="l2", dropout_p=2.0, dropout_seed=zeros(1, dtype=torch.int64)),
        ("q is a list; it must be a torch.Tensor; v is a int", "similarity='l2'", "dropout_p=2.0"),
    ),
    "what cannot be made beside heads": (
        dict(mask="causal", score=3, bias=0.5, k=zeros(*HEADS3), v=zeros(*HEADS3)),
        ("mask='causal'", "score=3", "bias=0.5", "q_heads=4"),
    ),
    "a mask of another shape beside heads": (
        BARE | dict(mask=zeros(5, 6, **BOOL), k=zeros(*HEADS3), v=zeros(*HEADS3)),
        ("q_heads=4", "mask.shape=(5, 6)"),
    ),
    "names beside values": (
        BARE | dict(is_causal=True, sink=zeros(2), foo=1),
        ("no is_causal=: give mask=", "no foo=: it takes mask, bias", "sink=(2,)"),
    ),
    "a mask that does not fit, for plain PyTorch": (
        BARE | dict(mask=zeros(5, 6, **BOOL), impl="torch"), ("mask.shape=(5, 6)",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOGETHER)
def test_what_is_wrong_together_is_listed_together(name, device, nothing_runs):
    """One reason for each mistake, in this order, and none for what follows from another."""
    changes, wanted = TOGETHER[name]
    made = {key: make(device) if callable(make) else make for key, make in changes.items()}
    arguments = good(device) | made
    reasons = tilewise.why_not(**arguments)
    assert len(reasons) == len(wanted), reasons
    for word, reason in zip(wanted, reasons, strict=True):
        assert word in reason
    with pytest.raises((ValueError, TypeError)) as raised:
        tilewise.attention(**arguments)
    assert str(raised.value).startswith(reasons[0])


def test_no_rule_relies_on_one_behind_it():
    """So that the first broken rule is sure, and `attention` may raise it."""
    before: set[checks.Rule] = set()
    for rule, needs in checks.RULES:
        assert before.issuperset(needs), rule.__name__
        before.add(rule)


def test_looking_draws_no_seed(device):
    arguments = good(device) | dict(dropout_p=0.5)
    state = torch.random.get_rng_state()
    assert tilewise.why_not(**arguments) == []
    assert torch.equal(torch.random.get_rng_state(), state)


def test_combined_masks_and_given_scores_are_all_judged(device):
    """`&` and score sequences hide nothing: each part that does not fit is named."""
    changed = dict(
        mask=tilewise.Padding(zeros(3, **INT)(device)) & zeros(2, 2, **BOOL)(device),
        score=[tilewise.Softcap(1.0), [tilewise.ALiBi(zeros(9)(device))]],
    )
    text = " ".join(tilewise.why_not(**(good(device) | changed)))
    for name in ("kv_lens.shape=(3,)", "mask.shape=(2, 2)", "slopes.shape=(9,)"):
        assert name in text


def test_triton_functions_are_taken_as_masks_and_scores(device):
    """A bare @triton.jit function needs no wrapper, compiled or interpreted."""
    assert tilewise.why_not(**(good(device) | dict(mask=even_keys, score=[doubled], impl="portable"))) == []


@pytest.mark.parametrize("position", [0, 1])
def test_two_modifiers_of_one_kind_are_both_checked(device, position):
    biases = [torch.zeros(Q_LEN, KV_LEN, device=device) for _ in range(2)]
    biases[position] = biases[position].to("meta")
    arguments = good(device) | {"score": [tilewise.Bias(bias) for bias in biases]}
    assert [why.split(" is on ")[0] for why in tilewise.why_not(**arguments)] == ["Bias.bias"]
