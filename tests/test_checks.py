"""The contract: every rule of plan/rules refuses what it should, in words that help, before anything runs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch._subclasses import FakeTensorMode

import tilewise
from harness.interpreted import set_interpreted
from tilewise.parts.bounds import UNLIMITED
from tilewise.plan import checks
from tilewise.plan.request import make_request

BATCH, Q_HEADS, KV_HEADS, Q_LEN, KV_LEN, DIM = 2, 4, 2, 5, 7, 8


@triton.jit
def even_keys(q_idx, kv_idx, batch, head, args):
    return (q_idx >= 0) & (kv_idx % 2 == 0)


@triton.jit
def doubled(s, batch, head, q_idx, kv_idx, args):
    return s * 2.0


def good(device: torch.device) -> dict[str, Any]:
    """A call that breaks no rule, with every argument present."""
    return dict(
        q=torch.randn(BATCH, Q_HEADS, Q_LEN, DIM, device=device),
        k=torch.randn(BATCH, KV_HEADS, KV_LEN, DIM, device=device),
        v=torch.randn(BATCH, KV_HEADS, KV_LEN, DIM, device=device),
        mask=tilewise.Causal() & tilewise.Padding(torch.tensor([7, 3], device=device)),
        bias=torch.zeros(Q_HEADS, 1, KV_LEN, device=device),
        score=[tilewise.Softcap(5.0), tilewise.ALiBi(tilewise.alibi_slopes(Q_HEADS, device))],
        scale=torch.tensor(0.5, device=device),
        similarity=tilewise.Cosine(torch.ones(Q_HEADS, device=device)),
        sink=torch.zeros(Q_HEADS, device=device),
        impl=None,
    )


class Broken(NamedTuple):
    """One way to break a rule: the words its message must contain, and what changes in a good call."""

    rule: str
    words: tuple[str, ...]
    changes: dict[str, Any]  # values, or functions of the device that make them
    interpreted: bool | None = None  # pretend that the interpreter is on or off

    def arguments(self, device: torch.device) -> dict[str, Any]:
        made = {name: make(device) if callable(make) else make for name, make in self.changes.items()}
        return good(device) | made


def zeros(*shape: int, **options: Any) -> Callable[[torch.device], torch.Tensor]:
    return lambda device: torch.zeros(shape, **({"device": device} | options))


def cosine(*shape: int, **options: Any) -> Callable[[torch.device], tilewise.Cosine]:
    return lambda device: tilewise.Cosine(zeros(*shape, **options)(device))


BARE = dict(mask=None, bias=None, score=None, scale=None, similarity="dot", sink=None)


def sizes(q: tuple[int, ...] = (), k: tuple[int, ...] = (), v: tuple[int, ...] = ()) -> dict[str, Any]:
    """q, k and v of these shapes, in the memory of one element, and nothing else to disagree with."""
    shapes = {name: shape for name, shape in (("q", q), ("k", k), ("v", v)) if shape}
    return BARE | {
        name: lambda d, s=shape: torch.zeros((), device=d).expand(s) for name, shape in shapes.items()
    }


def bare(**options: Any) -> dict[str, Any]:
    return BARE | {name: zeros(*shape, **options) for name, shape in (("q", Q), ("k", K), ("v", K))}


def fake(shape: tuple[int, ...], device: str) -> torch.Tensor:
    """A tensor on a device that this machine does not have."""
    with FakeTensorMode():
        return torch.empty(shape, device=device)


Q, K = (BATCH, Q_HEADS, Q_LEN, DIM), (BATCH, KV_HEADS, KV_LEN, DIM)
SPARSE = lambda device: torch.eye(3, device=device).to_sparse()  # noqa: E731
HALF, BOOL, INT = dict(dtype=torch.float16), dict(dtype=torch.bool), dict(dtype=torch.int32)
# On any device, so that arguments made here agree with it.
TRAINED = dict(q=zeros(*Q, requires_grad=True), impl="portable")
CASES = [
    Broken("tensors_are_given", ("q", "list", "torch.Tensor"), dict(q=[[1.0]])),
    Broken("tensors_are_given", ("v", "NoneType", "torch.Tensor"), dict(v=None)),
    Broken("tensors_are_given", ("k.layout=torch.sparse_coo", "torch.strided"), dict(k=SPARSE)),
    Broken("ranks_are_four", ("k.shape=(7, 8)", "4 dimensions", "[batch, heads"), dict(k=zeros(7, 8))),
    Broken("ranks_are_four", ("q.shape=(1, 2, 4, 5, 8)", "4 dimensions"), dict(q=zeros(1, 2, 4, 5, 8))),
    Broken("batches_agree", ("q: 2", "k: 3", "v: 2", "equal"), sizes(k=(3, *K[1:]))),
    Broken("kv_heads_agree", ("k: 2", "v: 4", "equal"), sizes(v=(BATCH, 4, KV_LEN, DIM))),
    Broken("heads_have_a_whole_ratio", ("q_heads=3", "multiple", "kv_heads=2"), sizes((2, 3, 5, 8))),
    Broken("heads_have_a_whole_ratio", ("q_heads=1", "multiple", "kv_heads=2"), sizes((2, 1, 5, 8))),
    Broken("heads_have_a_whole_ratio", ("q_heads=0", "neither may be 0"), sizes((2, 0, 5, 8))),
    Broken("kv_lengths_agree", ("k: 7", "v: 6", "equal"), sizes(v=(BATCH, KV_HEADS, 6, DIM))),
    Broken("lengths_are_indexable", (f"q_len={UNLIMITED}", "kv_len=7", "below"), sizes((2, 4, UNLIMITED, 8))),
    Broken(
        "grid_is_launchable",
        ("batch=65536", "q_heads=4096", "q_len=160", str(2**28 * 10), "split"),
        sizes((2**16, 2**12, 160, DIM), *[(2**16, 1, 7, DIM)] * 2),
    ),
    Broken("head_dims_agree", ("head_dim", "q: 8", "k: 6", "equal"), sizes(k=(*K[:3], 6))),
    Broken("dims_are_supported", ("head_dim=257", "1 to 256"), sizes((*Q[:3], 257), (*K[:3], 257))),
    Broken("dims_are_supported", ("value_dim=257", "1 to 256"), sizes(v=(*K[:3], 257))),
    Broken("dims_are_supported", ("head_dim=0", "1 to 256"), sizes((*Q[:3], 0), (*K[:3], 0))),
    Broken("dtypes_agree", ("q: torch.float32", "k: torch.float16", "cast"), dict(k=zeros(*K, **HALF))),
    Broken("dtypes_agree", ("v: torch.bfloat16", "cast"), dict(v=zeros(*K, dtype=torch.bfloat16))),
    Broken("dtype_is_supported", ("q.dtype=torch.float64", "torch.float32"), bare(dtype=torch.float64)),
    Broken("devices_agree", ("k: meta", "equal"), dict(k=zeros(*K, device="meta"))),
    Broken("scale_is_a_number", ("scale=nan", "finite number"), dict(scale=math.nan)),
    Broken("scale_is_a_number", ("scale=inf", "finite number"), dict(scale=math.inf)),
    Broken("scale_is_a_number", ("scale=1e+39", "finite number"), dict(scale=1e39)),
    Broken("scale_is_a_number", ("scale=(1,)", "without dimensions"), dict(scale=zeros(1))),
    Broken("scale_is_a_number", ("scale=2", "finite number"), dict(scale="2")),
    Broken("similarity_is_known", ("similarity='euclid'", "'cosine'", "Cosine("), dict(similarity="euclid")),
    Broken("temperature_fits", ("temperature.shape=(3,)", "[4]"), dict(similarity=cosine(3))),
    Broken("temperature_fits", ("temperature=nan", "finite"), dict(similarity=tilewise.Cosine(math.nan))),
    Broken("temperature_fits", ("temperature='hot'", "finite"), dict(similarity=tilewise.Cosine("hot"))),
    Broken("sink_fits", ("sink=(2,)", "[4]", "one logit a query head"), dict(sink=zeros(2))),
    Broken("sink_fits", ("sink=1.5", "tensor [4]"), dict(sink=1.5)),
    Broken(
        "parameters_are_floating", ("sink.dtype=torch.int32", "torch.bfloat16"), dict(sink=zeros(4, **INT))
    ),
    Broken("parameters_are_floating", ("scale.dtype=torch.bool", "torch.float32"), dict(scale=zeros(**BOOL))),
    Broken("parameters_are_floating", ("temperature.dtype=torch.bool",), dict(similarity=cosine(4, **BOOL))),
    Broken("other_devices_agree", ("sink is on meta", ".to(q.device)"), dict(sink=zeros(4, device="meta"))),
    Broken("other_devices_agree", ("Bias.bias is on meta",), dict(bias=zeros(5, 7, device="meta"))),
    Broken(
        "masks_and_scores_fit", ("Dense", "mask.shape=(5, 6)", "(2, 4, 5, 7)"), dict(mask=zeros(5, 6, **BOOL))
    ),
    Broken(
        "masks_and_scores_fit", ("Bias", "bias.shape=(3, 5, 7)", "(2, 4, 5, 7)"), dict(bias=zeros(3, 5, 7))
    ),
    Broken("implementation_is_known", ("impl='cuda'", "'portable'", "'torch'"), dict(impl="cuda")),
    Broken(
        "kernel_can_run",
        ("xpu", "CUDA or ROCm", "impl='torch'"),
        BARE
        | {name: lambda d, name=name: fake(Q if name == "q" else K, "xpu") for name in "qkv"}
        | dict(impl="portable"),
    ),
    Broken(
        "kernel_can_run",
        ("TRITON_INTERPRET=1", "before tilewise is imported", "impl=None"),
        bare(device="cpu") | dict(impl="portable"),
        interpreted=False,
    ),
    Broken(
        "hopper_can_answer",
        ("impl='hopper'", "q.dtype=torch.float32", "torch.bfloat16", "impl=None"),
        BARE | dict(impl="hopper"),
    ),
    Broken(
        "twins_exist", ("UserMask(even_keys)", "twin="), dict(impl="torch", mask=tilewise.UserMask(even_keys))
    ),
    Broken(
        "twins_exist", ("UserScore(doubled)", "twin="), dict(impl="torch", score=tilewise.UserScore(doubled))
    ),
    Broken("dropout_fits", ("dropout_p=1.0", "0 to below 1"), dict(dropout_p=1.0)),
    Broken("dropout_fits", ("dropout_p=-0.1", "0 to below 1"), dict(dropout_p=-0.1)),
    Broken("dropout_fits", ("dropout_p=nan", "0 to below 1"), dict(dropout_p=math.nan)),
    Broken("dropout_fits", ("dropout_p='half'", "a number"), dict(dropout_p="half")),
    Broken("dropout_fits", ("dropout_seed=7", "torch.int64"), dict(dropout_p=0.5, dropout_seed=7)),
    Broken(
        "dropout_fits",
        ("dropout_seed=(1,) of torch.int32", "torch.int64", "q's device"),
        dict(dropout_p=0.5, dropout_seed=zeros(1, **INT)),
    ),
    Broken(
        "dropout_fits",
        ("dropout_seed=(2,) of torch.int64", "one torch.int64 number"),
        dict(dropout_p=0.5, dropout_seed=zeros(2, dtype=torch.int64)),
    ),
    Broken(
        "memory_is_linear",
        ("strict=True", "Dense.mask.shape=(5, 7)", "every pair", "Causal"),
        BARE | dict(mask=zeros(5, 7, **BOOL), impl="portable", strict=True),
    ),
    Broken(
        "memory_is_linear",
        ("strict=True", "plain PyTorch", "(2, 4, 5, 7)", "GPU"),
        BARE | dict(impl="torch", strict=True),
    ),
    Broken(
        "gradients_exist",
        ("UserScore(doubled)", "derivative=", "∂score/∂s"),
        TRAINED | dict(score=tilewise.UserScore(doubled)),
    ),
    Broken(
        "gradients_exist",
        ("UserScore.args[0] requires a gradient", "parameters=", "detach()"),
        TRAINED
        | dict(score=tilewise.UserScore(doubled, (torch.ones(1, requires_grad=True),), derivative=doubled)),
    ),
    Broken(
        "gradients_exist",
        ("UserMask.args[0] requires a gradient", "a mask has none", "detach()"),
        TRAINED | dict(mask=tilewise.UserMask(even_keys, (torch.ones(1, requires_grad=True),))),
    ),
]


def ends(start: int, end: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return zeros(start, **INT)(device), zeros(end, **INT)(device)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as soon as either implementation is reached."""

    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("a call that breaks the contract was run")

    monkeypatch.setattr("tilewise.plan.passes.launch_forward", reached)
    monkeypatch.setattr("tilewise_reference.attention", reached)


RULES = {rule.__name__: rule for stage in checks.STAGES for rule in stage}


def name_of(case: Broken) -> str:
    return f"{case.rule}-{case.words[0]}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_broken_rule_raises_and_says_why(case, device, nothing_runs, monkeypatch):
    if case.interpreted is not None:
        set_interpreted(monkeypatch, case.interpreted)
    arguments = case.arguments(device)
    reasons = tilewise.why_not(**arguments)
    reason = RULES[case.rule](make_request(**arguments))
    assert reason in reasons, f"{case.rule} did not speak up; why_not says {reasons}"
    for word in case.words:
        assert word in reason, f"{word!r} is missing in: {reason}"
    with pytest.raises(ValueError) as raised:
        tilewise.attention(**arguments)
    assert str(raised.value) == reasons[0]


def test_every_rule_has_a_case():
    assert RULES.keys() == {case.rule for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_call_that_looks_like_one_that_passed_is_judged_again(case, device, nothing_runs, monkeypatch):
    """What passed is remembered by what rules look at: nothing that breaks a rule may look like it."""
    if case.interpreted is not None:
        set_interpreted(monkeypatch, case.interpreted)
    checks.check(make_request(**good(device)))
    for _ in range(2):
        with pytest.raises(ValueError):
            checks.check(make_request(**case.arguments(device)))


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

    shapes = dict(k=zeros(3, 2, 7, 8)(device), v=zeros(2, 4, 6, 300)(device))
    reasons = tilewise.why_not(**(good(device) | changed | shapes))
    assert [reason.split()[0] for reason in reasons] == ["batch", "head", "lengths", "head_dim=8"]


def test_an_unknown_argument_is_named(device):
    (reason,) = tilewise.why_not(**good(device), causal=True)
    assert "causal" in reason and "mask" in reason
    with pytest.raises(TypeError, match="causal"):
        tilewise.attention(**good(device), causal=True)


def test_rules_never_read_a_tensor():
    """On meta tensors there is nothing to read, so a rule that looked at contents would raise."""
    meta = torch.device("meta")
    changed = dict(impl="torch", score=tilewise.Softcap(5.0), mask=zeros(5, 7, **BOOL)(meta))
    arguments = good(meta) | changed
    assert tilewise.why_not(**arguments) == []


INTS = torch.arange(5)
WRONG = [
    ("align", "'left'", "'bottom_right'", lambda: tilewise.Causal("left")),
    ("align", "'left'", "'top_left'", lambda: tilewise.Window(1, 1, align="left")),
    ("align", "'left'", "'top_left'", lambda: tilewise.Prefix(1, align="left")),
    ("align", "'left'", "'top_left'", lambda: tilewise.ALiBi(torch.ones(4), align="left")),
    ("align", "'left'", "'top_left'", lambda: tilewise.RelativePosition(torch.ones(4, 32), align="left")),
    ("left", "-1", "None", lambda: tilewise.Window(-1, 0)),
    ("right", str(UNLIMITED), "None", lambda: tilewise.Window(0, UNLIMITED)),
    ("lengths", "-2", "at least 0", lambda: tilewise.Prefix(-2)),
    ("lengths", "torch.float32", "torch.int32", lambda: tilewise.Prefix(torch.ones(2))),
    ("kv_lens", "-3", "at least 0", lambda: tilewise.Padding(-3)),
    ("kv_lens", "torch.bool", "torch.int64", lambda: tilewise.Padding(torch.ones(2, dtype=torch.bool))),
    ("side", "'middle'", "'right'", lambda: tilewise.Padding(3, side="middle")),
    ("start", "torch.int16", "torch.int32", lambda: tilewise.Intervals(INTS.short(), INTS)),
    ("end", "torch.float32", "torch.int64", lambda: tilewise.Intervals(INTS, INTS.float())),
    ("mask", "torch.int64", "bias=", lambda: tilewise.Dense(INTS)),
    ("ids", "torch.uint8", "torch.int32", lambda: tilewise.Documents(INTS.byte())),
    ("kv_ids", "torch.float32", "torch.int64", lambda: tilewise.Documents(INTS, INTS.float())),
    ("ids", "(1, 1, 5)", "[batch, length]", lambda: tilewise.Documents(INTS[None, None])),
    ("kv_ids", "meta", "same", lambda: tilewise.Documents(INTS, INTS.to("meta"))),
    ("cap", "0", "above 0", lambda: tilewise.Softcap(0)),
    ("cap", "-1.0", "above 0", lambda: tilewise.Softcap(-1.0)),
    ("cap", "inf", "leave Softcap out", lambda: tilewise.Softcap(math.inf)),
    ("cap", "nan", "above 0", lambda: tilewise.Softcap(math.nan)),
    ("slopes", "torch.int64", "torch.float32", lambda: tilewise.ALiBi(INTS)),
    ("table", "torch.int64", "torch.float16", lambda: tilewise.RelativePosition(INTS[None])),
    ("table", "(32,)", "[q_heads, buckets]", lambda: tilewise.RelativePosition(torch.ones(32))),
    ("num_buckets", "3", "at least 4", lambda: tilewise.RelativePosition(torch.ones(4, 3))),
    (
        "max_distance",
        "8",
        "greater than 8",
        lambda: tilewise.RelativePosition(torch.ones(4, 32), max_distance=8),
    ),
    ("bias", "torch.float64", "torch.float32", lambda: tilewise.Bias(torch.ones(5, 7).double())),
    ("mask", "'causal'", "a tilewise mask", lambda: tilewise.Causal() & "causal"),
    ("tile_q", "24", "power of two", lambda: tilewise.tiles.Tile(24, 16)),
    ("tile_kv", "8", "at least 16", lambda: tilewise.tiles.Tile(16, 8)),
]
NOT_TENSORS = [
    ("bias", "0.5", lambda: tilewise.Bias(0.5)),
    ("slopes", "[0.5", lambda: tilewise.ALiBi([0.5, 0.25])),
    ("table", "[[", lambda: tilewise.RelativePosition([[1.0] * 32])),
    ("mask", "[True]", lambda: tilewise.Dense([True])),
    ("start", "[0]", lambda: tilewise.Intervals([0], INTS)),
    ("ids", "[0", lambda: tilewise.Documents([0, 0, 1])),
    ("kv_lens", "[7, 3]", lambda: tilewise.Padding([7, 3])),
    ("kv_lens", "1.5", lambda: tilewise.Padding(1.5)),
    ("lengths", "'3'", lambda: tilewise.Prefix("3")),
    ("left", "1.5", lambda: tilewise.Window(1.5, 0)),
    ("right", "'2'", lambda: tilewise.Window(0, "2")),
    ("cap", "'50'", lambda: tilewise.Softcap("50")),
]


@pytest.mark.parametrize("name, given, wanted, make", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_value_is_refused_when_a_mask_or_score_is_made(name, given, wanted, make):
    with pytest.raises(ValueError) as raised:
        make()
    for word in (name, given, wanted):
        assert word in str(raised.value)


@pytest.mark.parametrize("name, given, make", NOT_TENSORS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_type_is_refused_when_a_mask_or_score_is_made(name, given, make):
    with pytest.raises(ValueError) as raised:
        make()
    for word in (name, given, "must be"):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    "name, given",
    [
        ("mask", "causal"),
        ("mask", 3),
        ("score", "softcap"),
        ("score", 5.0),
        ("score", ["alibi"]),
        ("bias", 0.5),
    ],
)
def test_a_wrong_mask_or_score_argument_is_named(name, given, device, nothing_runs):
    arguments = good(device) | {name: given}
    with pytest.raises(ValueError, match=name) as raised:
        tilewise.attention(**arguments)
    assert tilewise.why_not(**arguments) == [str(raised.value)]


UNFIT = [
    ("Padding", "kv_lens.shape=(3,)", "(2,)", lambda d: dict(mask=tilewise.Padding(zeros(3, **INT)(d)))),
    ("Prefix", "lengths.shape=(3,)", "(2,)", lambda d: dict(mask=tilewise.Prefix(zeros(3, **INT)(d)))),
    ("Intervals", "end.shape=(7,)", "(2, 4, 5)", lambda d: dict(mask=tilewise.Intervals(*ends(5, 7, d)))),
    ("Documents", "kv_ids.shape=(5,)", "(2, 7)", lambda d: dict(mask=tilewise.Documents(INTS.to(d)))),
    ("ALiBi", "slopes.shape=(2,)", "(2, 4)", lambda d: dict(score=tilewise.ALiBi(zeros(2)(d)))),
    (
        "RelativePosition",
        "(2, 32)",
        "[4, buckets]",
        lambda d: dict(score=tilewise.RelativePosition(zeros(2, 32)(d))),
    ),
    (
        "Dense",
        "(2, 4, 7, 5)",
        "(2, 4, 5, 7)",
        lambda d: dict(mask=tilewise.Causal() & zeros(2, 4, 7, 5, **BOOL)(d)),
    ),
]


@pytest.mark.parametrize("mask_or_score, given, wanted, change", UNFIT, ids=[case[0] for case in UNFIT])
def test_a_mask_or_score_of_another_shape_is_named(
    mask_or_score, given, wanted, change, device, nothing_runs
):
    arguments = good(device) | change(device)
    with pytest.raises(ValueError) as raised:
        tilewise.attention(**arguments)
    for word in (mask_or_score, given, wanted):
        assert word in str(raised.value)


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
