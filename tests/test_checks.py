"""The contract: every rule of plan/rules refuses what it should, in words that help, before anything runs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tilewise
from harness.calls import (
    BARE,
    BATCH,
    BOOL,
    DIM,
    HALF,
    INT,
    KV_HEADS,
    KV_LEN,
    K,
    Q,
    doubled,
    even_keys,
    good,
    zeros,
)
from harness.interpreted import set_interpreted
from tilewise.parts.bounds import UNLIMITED
from tilewise.plan import checks
from tilewise.plan.request import request_of


def ids_of_both(device: torch.device) -> list[torch.Tensor]:
    return [torch.zeros(n, dtype=torch.int32, device=device) for n in (5, 7)]


class Broken(NamedTuple):
    """One way to break a rule: the words its message must contain, and what changes in a good call."""

    rule: str
    words: tuple[str, ...]
    changes: dict[str, Any]  # values, or functions of the device that make them
    interpreted: bool | None = None  # pretend that the interpreter is on or off

    def arguments(self, device: torch.device) -> dict[str, Any]:
        made = {name: make(device) if callable(make) else make for name, make in self.changes.items()}
        return good(device) | made


def attend(q: Any, k: Any, v: Any, **arguments: Any) -> Any:
    """The public function that takes these arguments."""
    if "kv_lens" in arguments:
        return tilewise.cached_attention(q, k, v, **arguments)
    return (tilewise.packed_attention if "q_offsets" in arguments else tilewise.attention)(
        q, k, v, **arguments
    )


def cosine(*shape: int, **options: Any) -> Callable[[torch.device], tilewise.Cosine]:
    return lambda device: tilewise.Cosine(zeros(*shape, **options)(device))


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


def fp8_call(**changes: Any) -> dict[str, Any]:
    """A call of fp8 numbers with a scale each, but for what changes in its scales."""

    def scales(device: torch.device) -> tilewise.Scales:
        made = {name: make(device) if callable(make) else make for name, make in changes.items()}
        return tilewise.Scales(*(torch.ones(1, device=device) for _ in range(3)))._replace(**made)

    return bare(dtype=torch.float8_e4m3fn) | dict(scales=scales)


SPARSE = lambda device: torch.eye(3, device=device).to_sparse()  # noqa: E731
# On any device, so that arguments made here agree with it.
PACKED = BARE | dict(q=zeros(9, 4, 8), k=zeros(9, 2, 8), v=zeros(9, 2, 8))
CACHED = BARE | dict(kv_lens=zeros(2, **INT))
TRAINED = dict(q=zeros(*Q, requires_grad=True), impl="portable")
CASES = [
    Broken("tensors_are_given", ("q", "list", "torch.Tensor"), dict(q=[[1.0]])),
    Broken("tensors_are_given", ("v", "NoneType", "torch.Tensor"), dict(v=None)),
    Broken("tensors_are_given", ("k.layout=torch.sparse_coo", "torch.strided"), dict(k=SPARSE)),
    Broken("ranks_are_four", ("k.shape=(7, 8)", "4 dimensions", "[batch, heads"), dict(k=zeros(7, 8))),
    Broken("ranks_are_four", ("q.shape=(1, 2, 4, 5, 8)", "4 dimensions"), dict(q=zeros(1, 2, 4, 5, 8))),
    Broken("offsets_fit", ("q_offsets.shape=(1,)", "[batch + 1]"), PACKED | dict(q_offsets=zeros(1, **INT))),
    Broken(
        "tokens_agree",
        ("kv_offsets=None", "q has 9 tokens and k 7", "give kv_offsets"),
        PACKED | dict(k=zeros(7, 2, 8), v=zeros(7, 2, 8), q_offsets=zeros(3, **INT)),
    ),
    Broken("lengths_fit", ("kv_lens.shape=(3,)", "[batch] = [2]"), CACHED | dict(kv_lens=zeros(3, **INT))),
    Broken(
        "pages_fit",
        ("pages.shape=(3, 4)", "2 for batch"),
        CACHED | dict(k=zeros(5, 16, 2, 8), v=zeros(5, 16, 2, 8), pages=zeros(3, 4, **INT)),
    ),
    Broken("split_size_fits", ("split_size=20", "multiple of 16"), CACHED | dict(split_size=20)),
    Broken(
        "cache_has_no_gradient",
        ("q requires a gradient", "cached_attention has none", "no_grad"),
        CACHED | dict(q=zeros(*Q, requires_grad=True), impl="portable"),
    ),
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
    Broken("dims_are_supported", ("head_dim=577", "1 to 576"), sizes((*Q[:3], 577), (*K[:3], 577))),
    Broken("dims_are_supported", ("value_dim=513", "1 to 512"), sizes(v=(*K[:3], 513))),
    Broken("dims_are_supported", ("head_dim=0", "1 to 576"), sizes((*Q[:3], 0), (*K[:3], 0))),
    Broken("scales_are_given", ("float8_e4m3fn", "scales=", "quantize"), fp8_call() | dict(scales=None)),
    Broken("scales_are_given", ("scales=float", "tilewise.Scales"), fp8_call() | dict(scales=2.0)),
    Broken("scales_are_given", ("float8_e4m3fn, and q is torch.float32",), dict(scales=fp8_call()["scales"])),
    Broken("scales_fit", ("scales.k=1.0", "torch.float32"), fp8_call(k=1.0)),
    Broken("scales_fit", ("scales.q=torch.float16", "torch.float32"), fp8_call(q=zeros(1, **HALF))),
    Broken("scales_fit", ("scales.v.shape=(4,)", "[batch, heads] = [2, 2]"), fp8_call(v=zeros(4))),
    Broken(
        "scales_fit", ("scales.v.shape=(3,)", "tiles of 4 rows", "[2, 2, 2]"), fp8_call(rows=4, v=zeros(3))
    ),
    Broken("scales_fit", ("rows=0", "from 1 on"), fp8_call(rows=0)),
    Broken("scales_fit", ("dtype=torch.float64", "torch.bfloat16"), fp8_call(dtype=torch.float64)),
    Broken(
        "fp8_has_no_gradient",
        ("scales.q requires a gradient", "forward alone", "no_grad"),
        fp8_call(q=zeros(1, requires_grad=True)),
    ),
    Broken("dtypes_agree", ("q: torch.float32", "k: torch.float16", "cast"), dict(k=zeros(*K, **HALF))),
    Broken("dtypes_agree", ("v: torch.bfloat16", "cast"), dict(v=zeros(*K, dtype=torch.bfloat16))),
    Broken("dtype_is_supported", ("q.dtype=torch.int64", "torch.float64"), bare(dtype=torch.int64)),
    Broken(
        "dtype_is_supported",
        ("q.dtype=torch.float64", "impl='portable' takes", "impl=None for plain PyTorch"),
        bare(dtype=torch.float64) | dict(impl="portable"),
    ),
    Broken(
        "float64_is_of_one_piece",
        ("Bias.bias.dtype=torch.float64", "q is torch.float32", "torch.bfloat16"),
        dict(bias=zeros(5, 7, dtype=torch.float64)),
    ),
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
        "masks_and_scores_fit",
        ("mask (the bool tensor)", "mask.shape=(5, 6)", "(2, 4, 5, 7)"),
        dict(mask=zeros(5, 6, **BOOL)),
    ),
    Broken(
        "masks_and_scores_fit", ("Bias", "bias.shape=(3, 5, 7)", "(2, 4, 5, 7)"), dict(bias=zeros(3, 5, 7))
    ),
    Broken(
        "corners_are_clear",
        ("Causal beside Padding", "q_len=5", "kv_len=7", "align=kv_lens - q_len", "align='bottom_right'"),
        dict(mask=lambda d: tilewise.Causal() & tilewise.Padding(torch.tensor([7, 3], device=d))),
    ),
    Broken(
        "corners_are_clear",
        ("Window beside Documents", "kv_ids", "packed_attention", "align='bottom_right'"),
        dict(mask=lambda d: tilewise.Window(3, 0) & tilewise.Documents(*ids_of_both(d))),
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
    Broken("deterministic_is_a_bool", ("deterministic=1 ", "True or False"), dict(deterministic=1)),
    Broken("dropout_fits", ("dropout_p=1.5", "0 to 1"), dict(dropout_p=1.5)),
    Broken("dropout_fits", ("dropout_p=-0.1", "0 to 1"), dict(dropout_p=-0.1)),
    Broken("dropout_fits", ("dropout_p=nan", "0 to 1"), dict(dropout_p=math.nan)),
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
        ("strict=True", "and mask.shape=(5, 7)", "every pair", "Causal"),
        BARE | dict(mask=zeros(5, 7, **BOOL), impl="portable", strict=True),
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


RULES = {rule.__name__: rule for rule, _ in checks.RULES}


def name_of(case: Broken) -> str:
    return f"{case.rule}-{case.words[0]}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_broken_rule_raises_and_says_why(case, device, nothing_runs, monkeypatch):
    if case.interpreted is not None:
        set_interpreted(monkeypatch, case.interpreted)
    arguments = case.arguments(device)
    reasons = tilewise.why_not(**arguments)
    reason = RULES[case.rule](request_of(**arguments))
    assert reason in reasons, f"{case.rule} did not speak up; why_not says {reasons}"
    for word in case.words:
        assert word in reason, f"{word!r} is missing in: {reason}"
    with pytest.raises(ValueError) as raised:
        attend(**arguments)
    assert str(raised.value) == reasons[0]


def test_every_rule_has_a_case():
    # In test_place.py, test_sharded.py and test_fp8.py.
    elsewhere = {"part_lies_inside", "sharding_fits", "chip_multiplies_fp8", "fp8_is_plain"}
    assert RULES.keys() == {case.rule for case in CASES} | elsewhere


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_call_that_looks_like_one_that_passed_is_judged_again(case, device, nothing_runs, monkeypatch):
    """What passed is remembered by what rules look at: nothing that breaks a rule may look like it."""
    if case.interpreted is not None:
        set_interpreted(monkeypatch, case.interpreted)
    checks.check(request_of(**good(device)))
    for _ in range(2):
        with pytest.raises(ValueError):
            checks.check(request_of(**case.arguments(device)))


def test_rules_never_read_a_tensor():
    """On meta tensors there is nothing to read, so a rule that looked at contents would raise."""
    meta = torch.device("meta")
    changed = dict(impl="torch", score=tilewise.Softcap(5.0), mask=zeros(5, 7, **BOOL)(meta))
    arguments = good(meta) | changed
    assert tilewise.why_not(**arguments) == []
