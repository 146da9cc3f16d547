"""`tilewise.explain`: its numbers against counts made otherwise, its reasons, its advice, and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import typer
from torch._subclasses import FakeTensorMode
from typer.testing import CliRunner

import tilewise
from harness.interpreted import set_interpreted
from tilewise.kernels import prepare
from tilewise.kernels.forward import forward_launch
from tilewise.kernels.tile import Tile
from tilewise.parts.shape import Shape
from tilewise.plan import passes
from tilewise.plan.bind import bind
from tilewise.plan.implementation import IMPLEMENTATIONS
from tilewise.plan.passes import run_backward, run_forward
from tilewise.plan.request import make_request
from tilewise.plan.tiles import gpu_tile
from tilewise.tools.chips import find_chip
from tilewise.tools.explain import command as explain_command
from tilewise.tools.explain import workload
from tilewise.tools.explain.command import GROUPS, explain_case
from tilewise.tools.explain.coverage import Coverage
from tilewise_reference import Case

ALL_CASES = {case.name: case for cases in GROUPS.values() for case in cases}
MODELS = [name for name in ALL_CASES if not name.startswith(("paper", "short"))]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", **options)


def attend(q_len: int = 4096, heads: int = 16, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> list:
    return [meta(1, heads, q_len, dim, dtype=dtype) for _ in range(3)]


@pytest.fixture
def nothing_runs(monkeypatch):
    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("explain ran attention")

    monkeypatch.setattr("tilewise.plan.passes.launch_forward", reached)
    monkeypatch.setattr("tilewise_reference.attention", reached)


@pytest.fixture
def without_interpreter(monkeypatch):
    """As on a CPU where TRITON_INTERPRET is not set."""
    set_interpreted(monkeypatch, False)
    for module in ("explain", "coverage"):
        monkeypatch.setattr(f"tilewise.tools.explain.{module}.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---- Numbers


@pytest.mark.parametrize("name", MODELS)
def test_flops_and_bytes_are_those_of_the_named_case(name, nothing_runs):
    """The case counts from its own description, and knows nothing of tiles."""
    case = ALL_CASES[name]
    found = explain_case(case, "H200", training=True)
    forward = found.kernels[0]
    assert forward.flops == case.flops()
    assert found.flops == case.flops() + case.flops("backward")
    # Seven products where five count: S and dP are computed twice.
    products = sum(k.flops for k in found.kernels if k.name in ("dq", "dkv"))
    again = 2 * case.batch * case.q_heads * case.pairs() * (case.head_dim + case.value_dim)
    assert products == case.flops("backward") + again
    kept = 3 * 4 * case.batch * case.q_heads * case.q_len  # lse and two statistics, which the case leaves out
    # Document ids, factors of the cosine and the like are all that may come on top.
    assert case.bytes() <= forward.bytes - kept <= 1.04 * case.bytes() + 1000


@pytest.mark.parametrize("name", ["llama3-8b-prefill", "deepseek-v3-prefill", "beginner-article"])
@pytest.mark.parametrize("gpu", ["H200", "A100", "MI300X"])
def test_tiles_are_those_of_the_table(name, gpu):
    case = ALL_CASES[name]
    found = explain_case(case, gpu, training=True)
    shape = Shape(
        case.batch, case.q_heads, case.kv_heads, case.q_len, case.kv_len, case.head_dim, case.value_dim
    )
    for kernel in found.kernels:
        work = "dkv" if kernel.name == "prepare" else kernel.name
        assert kernel.tile == gpu_tile(find_chip(gpu).arch, case.torch_dtype.itemsize, shape, work)
        assert kernel.tile_from == "shipped table"
        assert kernel.waves == kernel.programs / find_chip(gpu).multiprocessors


def test_programs_are_the_grids_of_the_launches(device, monkeypatch):
    """Against the grids that the launchers of every kernel ask for."""
    q = torch.randn(2, 4, 45, 24, device=device)
    k, v = torch.randn(2, 2, 70, 24, device=device), torch.randn(2, 2, 70, 40, device=device)
    table = torch.randn(4, 32, device=device, requires_grad=True)
    arguments = dict(mask=tilewise.Causal(), score=tilewise.RelativePosition(table))
    grids: dict[str, int] = {}

    class Launcher:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            grids[self.name] = grid[0]
            return lambda **_: None

    for name, module in (
        ("forward", "forward.forward"), ("prepare", "prepare.prepare"), ("dq", "backward.dq"),
        ("dkv", "backward.dkv"), ("gradient of RelativePosition.table", "parameters.parameter"),
    ):  # fmt: skip
        monkeypatch.setattr(f"tilewise.kernels.{module}_kernel", Launcher(name))
    with tilewise.tiles.use(Tile(16, 32)):
        found = tilewise.explain(q, k, v, **arguments, work="training", gpu="H200")
        request = make_request(q, k, v, **arguments, impl="portable")
        out, _, statistics = run_forward(request, True, True)
        needs = [True, True, True, *(t.requires_grad for _, t in request.other_tensors)]
        run_backward(request, out, statistics, out, None, needs)
    assert {kernel.name: kernel.programs for kernel in found.kernels} == grids


def test_memory_is_what_the_launchers_allocate(device, monkeypatch):
    q = torch.randn(2, 4, 45, 24, device=device)
    k, v = torch.randn(2, 2, 70, 24, device=device), torch.randn(2, 2, 70, 40, device=device)
    bias = torch.randn(4, 1, 70, device=device, requires_grad=True)
    prepared: list[prepare.BackwardCall] = []
    monkeypatch.setattr(
        passes, "prepare", lambda *args: prepared.append(prepare.prepare(*args)) or prepared[-1]
    )
    with tilewise.tiles.use(Tile(32, 32)):
        found = tilewise.explain(q, k, v, bias=bias, work="training", gpu="H200")
        request = make_request(q, k, v, bias=bias, impl="portable")
        out, lse, statistics = run_forward(request, True, True)
        dq, dk, dv, dbias = run_backward(request, out, statistics, out, None, [True] * 4)
    assert {x.name: x.bytes for x in found.memory} == {
        "out": out.nbytes, "lse": lse.nbytes, "row statistics": statistics.nbytes,
        "delta": prepared[0].delta.nbytes, "ranges": prepared[0].ranges.nbytes,
        "dq": dq.nbytes, "dk and dv": dk.nbytes + dv.nbytes,
        "sums of Bias.bias": 4 * 2 * 4 * 70, "gradient of Bias.bias": dbias.nbytes,
    }  # fmt: skip
    assert sum(x.bytes for x in found.memory) < 45 * 70 * 2 * 4 * 4 * 4, "more than a few score matrices"


def test_inference_keeps_nothing_but_the_result():
    assert [x.name for x in tilewise.explain(*attend()).memory] == ["out"]
    assert [x.name for x in tilewise.explain(*attend(), return_lse=True).memory] == ["out", "lse"]


@pytest.mark.parametrize("dim, ratio", [(64, 1.0), (128, 0.5), (256, 0.25)])
def test_limits_on_a_hopper_are_the_textbook_ones(dim, ratio):
    """16 exponentials against 4096 FLOPs a clock: a pair takes 4 · head_dim of these and one of those."""
    found = tilewise.explain(*attend(dim=dim, heads=2048 // dim), gpu="h200")
    (kernel,) = found.kernels
    assert kernel.executed_flops == kernel.flops == found.flops == 4 * 4096 * 4096 * 2048
    assert kernel.limits.matmul == pytest.approx(found.flops / 989.5e12, rel=1e-3)
    assert kernel.limits.exponentials / kernel.limits.matmul == pytest.approx(ratio)
    assert kernel.limits.memory == pytest.approx(4 * 4096 * 2048 * 2 / 4.8e12)
    assert kernel.intensity == pytest.approx(4096 / 2)
    assert found.seconds == kernel.limits.overlapped == kernel.limits.matmul
    assert found.seconds_in_turns == pytest.approx((1 + ratio) * found.seconds)


def test_a_softcap_doubles_the_exponentials():
    plain, capped = (
        tilewise.explain(*attend(), score=score, work="training") for score in (None, tilewise.Softcap(5))
    )
    for before, after in zip(plain.kernels, capped.kernels, strict=True):
        assert after.exponentials == {"forward": 2, "prepare": 0}.get(after.name, 3) * before.exponentials
    assert capped.kernels[0].limits.largest in ("matmul", "exponentials")


def test_decoding_is_bound_by_memory():
    found = explain_case(ALL_CASES["llama3-8b-decode"], "H200", training=False)
    assert found.limit == "memory"
    assert found.seconds == pytest.approx(16 * 8 * 8192 * 256 * 2 / 4.8e12, rel=0.01)


def test_idle_multiprocessors_make_the_rest_slower():
    """One head of one row tile: the same work on 1 of 132 multiprocessors."""
    one, many = (tilewise.explain(*attend(128, heads), gpu="H200").kernels[0] for heads in (1, 132))
    assert (one.programs, many.programs) == (1, 132)
    assert one.limits.matmul == pytest.approx(many.limits.matmul)
    assert one.limits.memory == pytest.approx(many.limits.memory / 132)


def test_fp32_follows_the_precision_that_pytorch_is_set_to(monkeypatch):
    ieee = tilewise.explain(*attend(dtype=torch.float32), gpu="H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    tf32 = tilewise.explain(*attend(dtype=torch.float32), gpu="H200")
    assert ieee.limits.matmul / tf32.limits.matmul == pytest.approx(2048 / 256)


# ---- Which implementation, and for which GPU


def test_the_interpreter_answers_where_it_is_on(device):
    q = torch.randn(1, 1, 20, 16, device=device)
    found = tilewise.explain(q, q, q)
    assert found.implementation == "portable" and not found.refused
    assert "it could" in found.others["torch"] and "quadratic" in found.others["torch"]
    if device.type == "cpu":
        assert "interpreter is on" in found.because and "tiles of 32 × 32" in found.because


def test_plain_pytorch_answers_on_a_cpu_and_a_gpu_would_run_the_kernels(without_interpreter, nothing_runs):
    q = torch.randn(1, 4, 100, 64)
    found = tilewise.explain(q, q, q, mask=tilewise.Causal())
    assert (found.implementation, found.gpu) == ("torch", "H200")
    assert "interpreter is off" in found.because and "TRITON_INTERPRET=1" in found.others["portable"]
    assert "assumed" in found.gpu_because
    assert [x.bytes for x in found.memory_here] == [4 * 4 * 100 * 100]
    assert [kernel.name for kernel in found.kernels] == ["forward"]
    assert "the portable kernels would answer" in " ".join(str(found).split())


def test_a_call_that_is_refused_here_is_explained_for_a_gpu(without_interpreter):
    q = torch.randn(1, 4, 100, 64)
    for asked, said in ((dict(impl="portable"), "TRITON_INTERPRET"), (dict(strict=True), "score matrix")):
        found = tilewise.explain(q, q, q, **asked)
        assert said in found.refused[0] and found.kernels
        assert f"attention() raises here: {found.refused[0]}" in " ".join(str(found).split())


def test_what_only_plain_pytorch_takes_has_no_kernels(device):
    q = torch.randn(1, 1, 20, 16, device=device)
    score = tilewise.UserScore(doubled, twin=lambda s, *_: 2 * s)
    found = tilewise.explain(q, q, q, score=score, impl="torch", work="training")
    assert found.implementation == "torch" and found.kernels == () and "derivative=" in found.no_kernels
    assert "derivative=" in found.others["portable"] and "derivative=" in str(found)


@triton.jit
def doubled(s, batch, head, q_idx, kv_idx, args):
    return s * 2.0


@triton.jit
def even_keys(q_idx, kv_idx, batch, head, args):
    return (q_idx >= 0) & (kv_idx % 2 == 0)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(q=meta(1, 3, 8, 16)), "kv_heads=2"),
        (dict(q=[1.0]), "torch.Tensor"),
        (dict(mask=tilewise.Padding(torch.tensor([1, 2, 3]))), "kv_lens.shape=(3,)"),
        (dict(sink=meta(3)), "sink=(3,)"),
        (dict(impl="fast"), "impl='fast'"),
        (dict(mask="causal"), "mask='causal'"),
    ],
)
def test_what_attention_refuses_everywhere_is_refused(changes, words):
    arguments = dict(q=meta(1, 2, 8, 16), k=meta(1, 2, 8, 16), v=meta(1, 2, 8, 16)) | changes
    with pytest.raises(ValueError) as raised:
        tilewise.explain(**arguments)
    assert words in str(raised.value)


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match=r"gpu='Voodoo2'.*H200"):
        tilewise.explain(*attend(), gpu="Voodoo2")
    with pytest.raises(ValueError, match="work='backward' must be 'forward' or 'training'"):
        tilewise.explain(*attend(), work="backward")
    with pytest.raises(TypeError, match="causal"):
        tilewise.explain(*attend(), causal=True)


@pytest.mark.parametrize(
    "name, chip, said",
    [("NVIDIA A100-SXM4-80GB", "A100", "this machine's GPU"), ("NVIDIA T1000", "A100", "not known")],
)
def test_the_gpu_of_this_machine_is_the_default(name, chip, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr("tilewise.tools.explain.explain.architecture", lambda device: "sm_80")
    found = tilewise.explain(*attend())
    assert found.gpu == chip and said in found.gpu_because
    assert tilewise.explain(*attend(), gpu="H200").gpu == "H200"


def test_a_chip_without_a_tile_says_so():
    """fp32 at 256 has no backward tile in 64 KiB of shared memory."""
    turing = replace(find_chip("A100"), name="T4", arch="sm_75")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilewise.tools.explain.explain.find_chip", lambda name: turing)
        found = tilewise.explain(*attend(dim=256, dtype=torch.float32), gpu="T4", work="training")
    assert found.kernels == () and "too little shared memory" in found.no_kernels
    assert "too little shared memory" in str(found)


# ---- Without running anything


def test_nothing_is_drawn_and_nothing_runs(device, nothing_runs):
    q = torch.randn(1, 2, 20, 16, device=device, requires_grad=True)
    state = torch.random.get_rng_state()
    found = tilewise.explain(q, q, q, dropout_p=0.5, work="training")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert any("Philox" in s.text for s in found.suggestions)
    assert q.grad is None


def test_fake_tensors_inside_and_outside_their_mode():
    with FakeTensorMode():
        q = torch.empty(1, 4, 300, 64, device="cuda", dtype=torch.float16)
        lengths = torch.ones(1, dtype=torch.int64, device="cuda")
        inside = tilewise.explain(q, q, q, mask=tilewise.Causal(), gpu="H200", work="training")
        unread = tilewise.explain(q, q, q, mask=tilewise.Padding(lengths), gpu="H200")
    outside = tilewise.explain(q, q, q, mask=tilewise.Causal(), gpu="H200", work="training")
    assert inside == outside and inside.implementation == "portable"
    same = tilewise.explain(*[meta(1, 4, 300, 64)] * 3, mask=tilewise.Causal(), gpu="H200", work="training")
    assert [k.tiles for k in same.kernels] == [k.tiles for k in inside.kernels]
    assert not unread.exact and "Padding: its tensors have no contents here" in unread.notes[0]
    assert unread.kernels[0].tiles.full == unread.kernels[0].tiles.skipped == 0
    assert "at most" in str(unread).lower()


def test_masks_may_have_contents_beside_meta_tensors():
    """Lengths on the CPU, q, k and v nowhere: the counts are those of real tensors."""
    lengths = torch.tensor([100, 1000])
    shapes = (2, 4, 1024, 64)
    found = tilewise.explain(*[meta(*shapes)] * 3, mask=tilewise.Padding(lengths), gpu="H200")
    assert found.exact and found.pairs_that_count == 4 * 1024 * 1100
    # 8 tiles of rows a head; 1 and 8 of 128 keys, the last of each cut
    assert (found.kernels[0].tiles.visited, found.kernels[0].tiles.masked) == (4 * 8 * 9, 4 * 8 * 2)


def test_nested_tensors_and_autocast():
    parts = [torch.randn(n, 2, 64) for n in (100, 28)]
    q = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    found = tilewise.explain(q, q, q, mask=tilewise.Causal(), gpu="H200")
    assert found.sizes["q_len"] == 128 and found.pairs_that_count == 2 * (100 * 101 + 28 * 29) // 2
    x = torch.randn(1, 2, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert tilewise.explain(x, x, x).dtype == "bfloat16"


def test_every_pass_of_a_trained_call_and_zero_lengths():
    found = tilewise.explain(
        *attend(), sink=meta(16, requires_grad=True), bias=meta(4096, 1, requires_grad=True), work="training"
    )
    assert [k.name for k in found.kernels] == ["forward", "prepare", "dq", "dkv", "gradient of Bias.bias"]
    for q_len, kv_len in ((0, 5), (5, 0), (0, 0)):
        q, k = meta(1, 1, q_len, 16), meta(1, 1, kv_len, 16)
        empty = tilewise.explain(q, k, k, mask=tilewise.Causal(), work="training")
        assert empty.flops == 0 and empty.limits.matmul == 0 and str(empty)


# ---- Advice


def advice(found: Any, word: str) -> list[Any]:
    return [s for s in found.suggestions if word in s.text]


SQUARE = 1024
LOWER = torch.ones(SQUARE, SQUARE, dtype=torch.bool).tril()
RANDOM = torch.rand(SQUARE, SQUARE, generator=torch.Generator().manual_seed(0)) < 0.5
# The first key and its own each row keeps: the first and last are those of a causal mask.
GAPS = LOWER & (RANDOM | torch.eye(SQUARE).bool() | (torch.arange(SQUARE) == 0))
BAND = LOWER & ~LOWER.tril(-100)
DOCUMENTS = torch.arange(SQUARE) % 8


def strided(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device="meta")


ROWS = attend(SQUARE)
ADVICE = {
    "a causal mask as a tensor": (
        lambda: dict(mask=LOWER), "says what tilewise.Causal() says", lambda: dict(mask=tilewise.Causal()),
        1.5,
    ),
    "a mask that a causal one bounds": (
        lambda: dict(mask=GAPS), "tilewise.Causal() & mask", lambda: dict(mask=RANDOM), 1.5,
    ),
    "a band": (
        lambda: dict(mask=BAND), "says what tilewise.Intervals", lambda: dict(mask=tilewise.Window(99, 0)),
        2.5,
    ),
    "key padding as a tensor": (
        lambda: dict(mask=torch.arange(SQUARE)[None, None, None] < 300),
        "says what tilewise.Padding", lambda: dict(mask=tilewise.Padding(300)), 2.0,
    ),
    "a mask without contents": (
        lambda: dict(mask=meta(SQUARE, SQUARE, dtype=torch.bool)), "skips no tile", lambda: {}, None,
    ),
    "a user's mask without interval": (
        lambda: dict(mask=tilewise.UserMask(even_keys)), "UserMask(even_keys) has no interval",
        lambda: {}, None,
    ),
    "documents in pieces": (
        lambda: dict(mask=tilewise.Documents(DOCUMENTS)), "documents come in pieces",
        lambda: dict(mask=tilewise.Documents(DOCUMENTS.sort().values)), 2.5,
    ),
    "fp32": (
        lambda: {n: x.float() for n, x in zip("qkv", ROWS, strict=True)}, "TF32", lambda: {}, 10.0,
    ),
    "a padded dimension": (
        lambda: {n: meta(1, 16, SQUARE, 80) for n in "qkv"}, "head_dim=80 is multiplied as 128",
        lambda: {n: meta(1, 16, SQUARE, 64) for n in "qkv"}, 1.3,
    ),
    "columns apart": (
        lambda: dict(k=strided(ROWS[1], (0, SQUARE * 128, 1, SQUARE))), "dimension has a stride: k (1024)",
        lambda: {}, None,
    ),
    "rows apart by odd bytes": (
        lambda: dict(v=strided(ROWS[2], (0, SQUARE * 129, 129, 1))), "v (strides of 258 bytes)",
        lambda: {}, None,
    ),
    "expanded heads": (
        lambda: dict(k=meta(1, 1, SQUARE, 128).expand(1, 16, SQUARE, 128),
                     v=meta(1, 1, SQUARE, 128).expand(1, 16, SQUARE, 128)),
        "give k[:, :1]", lambda: {}, None,
    ),
    "few programs": (
        lambda: {n: meta(1, 8, SQUARE, 128) for n in "qkv"}, "64 programs", lambda: {}, 2.0,
    ),
    "a bias of every pair": (
        lambda: dict(bias=meta(1, 16, SQUARE, SQUARE, dtype=torch.float32)), "64.0 MiB to read",
        lambda: dict(bias=meta(1, 16, 1, SQUARE, dtype=torch.float32)), 1.1,
    ),
    "a window narrower than a tile": (
        lambda: dict(mask=tilewise.Window(15, 0), k=meta(1, 1, SQUARE, 128), v=meta(1, 1, SQUARE, 128)),
        "pairs for each that counts", lambda: dict(mask=tilewise.Window(900, 0)), None,
    ),
    "dropout": (lambda: dict(dropout_p=0.1), "Philox", lambda: {}, None),
    "plain PyTorch": (lambda: dict(impl="torch"), "impl='torch'", lambda: dict(impl="portable"), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVICE)
def test_advice_is_given_where_it_applies_and_nowhere_else(name):
    applies, words, does_not, at_least = ADVICE[name]
    usual = dict(zip("qkv", ROWS, strict=True)) | dict(gpu="H200", work="forward")
    (said,) = advice(tilewise.explain(**(usual | applies())), words)
    if at_least is None:
        assert said.factor is None
    else:
        assert said.factor >= at_least
    assert not advice(tilewise.explain(**(usual | does_not())), words)


def test_factors_are_ratios_of_explained_times():
    """What a suggestion promises is what the changed call is explained to take."""
    usual = dict(zip("qkv", ROWS, strict=True)) | dict(gpu="H200", work="training")
    dense, causal = (tilewise.explain(**usual, mask=m) for m in (LOWER, tilewise.Causal()))
    (said,) = advice(dense, "tilewise.Causal()")
    assert said.factor == pytest.approx(dense.seconds / causal.seconds)
    single = {n: x.float() for n, x in zip("qkv", ROWS, strict=True)}
    (said,) = advice(tilewise.explain(**(usual | single)), "fp32")
    assert said.factor == pytest.approx(
        tilewise.explain(**(usual | single)).seconds / tilewise.explain(**usual).seconds
    )
    factors = [s.factor or 0 for s in dense.suggestions]
    assert factors == sorted(factors, reverse=True)


def test_addresses_are_looked_at_where_there_are_any(device):
    storage = torch.zeros(2 * 64 * 64 + 1, dtype=torch.float16, device=device)
    shifted = storage[1:].view(1, 2, 64, 64)
    fresh = torch.zeros(1, 2, 64, 64, dtype=torch.float16, device=device)
    (said,) = advice(tilewise.explain(shifted, fresh, fresh, gpu="H200"), "16 bytes")
    assert "q (its address)" in said.text
    assert not advice(tilewise.explain(fresh, fresh, fresh, gpu="H200"), "16 bytes")


# ---- How it reads


def test_everything_is_json_and_plain_text():
    found = tilewise.explain(*attend(), mask=tilewise.Causal(), work="training", gpu="H200")
    read = json.loads(json.dumps(found.to_dict()))
    assert read["kernels"][0]["tile"] == {"tile_q": 128, "tile_kv": 128, "num_warps": 8, "num_stages": 2}
    assert read["limit"] == found.limit and read["seconds"] == found.seconds
    assert read["kernels"][0]["tiles"] == {"total": 16384, "skipped": 7936, "masked": 512, "full": 7936}
    text = str(found)
    for words in ("Implementation", "Launches", "Tiles", "Work", "Limits on an H200", "Memory", "faster"):
        assert words in text
    assert "128 × 128" in text and "48.4 %" in text and "dkv" in text
    assert max(map(len, text.splitlines())) <= 102


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    app = typer.Typer()
    app.command()(explain_command.explain)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_explains_a_named_case(command, nothing_runs):
    ran = command("--case", "gemma2-2b-local", "--gpu", "A100", "--training")
    assert ran.exit_code == 0, ran.output
    for words in ("gemma2-2b-local", "window 4096", "Limits on an A100", "dkv", "skipped"):
        assert words in ran.output


def test_the_command_explains_sizes(command, nothing_runs):
    sizes = ("--q", "2,16,4096,80", "--kv", "2,4,1024,80", "--value-dim", 64, "--dtype", "fp16", "--causal")
    features = (
        "--window",
        "511,-",
        "--softcap",
        50,
        "--sink",
        "--alibi",
        "--bias",
        "1,16,1,1024",
        "--dropout",
        0.1,
    )
    ran = command(*sizes, *features, "--json", "--gpu", "H200")
    assert ran.exit_code == 0, ran.output
    read = json.loads(ran.output)
    assert read["sizes"] == dict(
        batch=2, q_heads=16, kv_heads=4, q_len=4096, kv_len=1024, head_dim=80, value_dim=64
    )
    assert read["dtype"] == "float16" and read["exact"]
    assert read["kernels"][0]["exponentials"] % 2 == 0


def test_packed_documents_are_counted(command):
    ran = command("--q", "2,16,1024,64", "--documents", 8, "--bool-mask", "--json", "--gpu", "H200")
    read = json.loads(ran.output)
    assert read["pairs_that_count"] == 2 * 16 * 1024 * 128 and read["kernels"][0]["tiles"]["full"] == 0
    assert read["kernels"][0]["tiles"]["masked"] == 2 * 16 * 8


def test_every_named_case_is_listed(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    ran = command("--list")
    assert ran.exit_code == 0
    assert all(name in ran.output for name in ALL_CASES) and "arXiv 2407.21783" in ran.output


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "--case NAME"),
        (("--case", "llama3-8b"), "did you mean llama3-8b-prefill"),
        (("--case", "x"), "--list"),
        (("--case", "llama3-8b-prefill", "--causal"), "leave the others out"),
        (("--case", "llama3-8b-prefill", "--gpu", "Voodoo2"), "gpu='Voodoo2'"),
        (("--q", "1,2,3"), "4 whole numbers"),
        (("--q", "1,2,3,x"), "4 whole numbers"),
        (("--q", "1,2,3,16", "--kv", "1,2,3,32"), "head_dim (16)"),
        (("--q", "1,2,3,16", "--dtype", "int8"), "bf16, fp16, fp32"),
        (("--q", "1,2,3,16", "--window", "5"), "left,right"),
        (("--q", "1,2,3,16", "--kv", "1,2,9,16", "--documents", 2), "as many keys"),
        (("--q", "1,3,8,16", "--kv", "1,2,8,16"), "q_heads=3"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, said, command):
    ran = command(*words)
    assert ran.exit_code == 2 and said in ran.output
    assert "Traceback" not in ran.output


def test_a_case_by_sizes_is_the_named_one():
    named = ALL_CASES["feature-window"]
    sizes = explain_command.case_of_sizes(
        "4,16,4096,128", None, None, "bf16", dict(named.features, window="511,0")
    )
    assert isinstance(sizes, Case)
    assert explain_case(sizes, "H200", False) == explain_case(named, "H200", False)


def test_the_forward_grid_of_an_explained_call(device):
    """The launch itself, without a stand-in for the kernel."""
    q = torch.randn(1, 2, 45, 16, device=device)
    found = tilewise.explain(q, q, q, gpu="H200")
    request = make_request(q, q, q, impl="portable")
    out = torch.empty_like(q)
    grid, _ = forward_launch(bind(request), out, None, None, found.kernels[0].tile)
    assert grid == (found.kernels[0].programs,)


def test_reasons_come_from_the_rules(monkeypatch):
    """An implementation that is added to the list is judged by the same rules, and named."""
    monkeypatch.setattr("tilewise.tools.explain.explain.IMPLEMENTATIONS", (*IMPLEMENTATIONS, "metal"))
    found = tilewise.explain(*attend())
    assert "impl='metal' must be None" in found.others["metal"]
    assert [*found.others] == ["hopper", "torch", "metal"] and "metal" not in IMPLEMENTATIONS


# ---- Hopper's forward


WAITS = "it must be asked for, impl='hopper': no GPU has shown yet that it is right and faster"


def test_hoppers_forward_is_explained_where_it_is_asked_for(nothing_runs):
    q, k, v = attend(dim=256)
    found = tilewise.explain(q, k, v, impl="hopper", gpu="H200", work="training", mask=tilewise.Causal())
    assert [kernel.name for kernel in found.kernels] == ["hopper forward", "prepare", "dq", "dkv"]
    kernel = found.kernels[0]
    assert kernel.tile == gpu_tile("sm_90", 2, found_shape(found), "hopper")
    assert (kernel.programs, kernel.waves, kernel.tile_from) == (132, 1.0, "shipped table")
    # 32 tiles of 128 rows a head; tile i sees 2 (i + 1) tiles of 64 keys, the last two of them cut.
    assert (kernel.tiles.total, kernel.tiles.visited) == (16 * 32 * 64, 16 * 32 * 33)
    assert kernel.tiles.masked == 16 * 32 * 2
    text = " ".join(str(found).split())
    assert found.implementation == found.on_gpu == "hopper" and not found.refused
    assert "Hopper's forward has not run on a GPU yet." in text and "What follows is for an H200" in text


def found_shape(found: Any) -> Shape:
    return Shape(**found.sizes)


def test_a_tile_of_rows_that_sees_nothing_visits_one_tile():
    q, k = meta(1, 2, 512, 64), meta(1, 2, 128, 64)
    found = tilewise.explain(q, k, k, impl="hopper", mask=tilewise.Causal(), gpu="H200")
    # Rows 0 to 383 see no key, which is three tiles of rows a head.
    assert found.kernels[0].tiles == Coverage(total=8, skipped=0, masked=8, full=0)
    portable = tilewise.explain(q, k, k, mask=tilewise.Causal(), gpu="H200")
    assert portable.kernels[0].tiles == Coverage(total=8, skipped=6, masked=2, full=0)


@pytest.mark.parametrize("heads, lengths", [(1, (300, 40)), (64, (300, 700))])
def test_programs_and_columns_are_those_of_hoppers_launch(heads, lengths, monkeypatch):
    from tilewise.kernels.hopper import launch

    monkeypatch.setattr(launch, "resident_programs", lambda device: 132)
    q, k = (torch.zeros(1, heads, length, 24, dtype=torch.float16) for length in lengths)
    request = make_request(q, k, k, impl="hopper")
    grid, arguments = launch.forward_launch(
        bind(request), q, None, None, gpu_tile("sm_90", 2, request.shape, "hopper")
    )
    found = tilewise.explain(q, k, k, impl="hopper", gpu="H200").kernels[0]
    assert (found.programs,) == grid
    assert arguments["k_desc"].block_shape[3] == workload.HOPPER_COLUMNS
    pairs = found.tiles.visited * found.tile.tile_q * found.tile.tile_kv
    assert found.executed_flops == 2 * pairs * 2 * 64


BY_DOCUMENT = tilewise.Documents(torch.arange(4096) // 1000)
CASES_FOR_HOPPER: dict[str, tuple[str, torch.dtype, dict[str, Any], str]] = {
    "it could": ("H200", torch.bfloat16, {}, WAITS),
    "another chip": ("A100", torch.bfloat16, {}, "it needs a Hopper GPU (sm_90), and A100 is sm_80"),
    "Blackwell": ("B200", torch.bfloat16, {}, "it needs a Hopper GPU (sm_90), and B200 is sm_100"),
    "fp32": ("H100", torch.float32, {}, "q.dtype=torch.float32 must be torch.float16"),
    "gaps": ("H100", torch.bfloat16, dict(mask=BY_DOCUMENT), "mask Documents may leave out a key"),
    "dropout": ("H100", torch.bfloat16, dict(dropout_p=0.1), "dropout_p=0.1 must be 0"),
    "two rules": ("H100", torch.float32, dict(dropout_p=0.1), "torch.bfloat16; dropout_p=0.1 must be 0"),
}


@pytest.mark.parametrize("name", CASES_FOR_HOPPER)
def test_why_hoppers_forward_does_not_answer(name):
    gpu, dtype, arguments, said = CASES_FOR_HOPPER[name]
    found = tilewise.explain(*attend(dtype=dtype), **arguments, gpu=gpu)
    assert said in found.others["hopper"] and found.on_gpu == "portable" and found.on_gpu_note == ""
    assert [kernel.name for kernel in found.kernels] == ["forward"]


def test_the_rule_on_chips_is_asked_about_the_gpu_that_is_named(monkeypatch):
    """Whatever q is on: the CPU, nothing, or a GPU that is none."""
    with FakeTensorMode():
        fake = torch.empty(1, 2, 256, 64, device="cuda", dtype=torch.float16)
    tensors = [fake, torch.zeros(1, 2, 256, 64, dtype=torch.float16), meta(1, 2, 256, 64)]
    for q in tensors:
        assert tilewise.explain(q, q, q, gpu="H200").others["hopper"] == WAITS
        assert "A100 is sm_80" in tilewise.explain(q, q, q, gpu="A100").others["hopper"]
        hopper = tilewise.explain(q, q, q, gpu="H200", impl="hopper")
        assert (hopper.on_gpu, hopper.refused, "hopper" in hopper.others) == ("hopper", (), False)
        other = tilewise.explain(q, q, q, gpu="A100", impl="hopper")
        assert other.on_gpu == "portable" and "A100 is sm_80" in other.on_gpu_note
        assert [kernel.name for kernel in other.kernels] == ["forward"]
    (refused,) = tilewise.explain(fake, fake, fake, gpu="A100", impl="hopper").refused
    assert refused == "impl='hopper': it needs a Hopper GPU (sm_90), and A100 is sm_80"


def test_what_hoppers_forward_does_not_take_is_explained_for_the_portable_one():
    found = tilewise.explain(*attend(), impl="hopper", mask=BY_DOCUMENT, gpu="H200")
    assert "mask Documents may leave out" in found.refused[0] and found.on_gpu == "portable"
    text = " ".join(str(found).split())
    assert "On an H200 (as asked for) the portable kernels would answer" in text
    assert "impl='hopper' cannot answer there: mask Documents may leave out" in text


def test_once_a_gpu_has_shown_it_hoppers_forward_is_what_a_hopper_runs(monkeypatch):
    monkeypatch.setattr("tilewise.plan.tiles.PROVEN", {("hopper", "sm_90", 2, 128)})
    found = tilewise.explain(*attend(), gpu="H200")
    assert found.kernels[0].name == "hopper forward" and found.others["hopper"] == "it does on an H200"
    assert "Hopper's forward answers there: a GPU has shown" in " ".join(str(found).split())
    asked = tilewise.explain(*attend(), gpu="H200", impl="portable")
    assert asked.on_gpu == "portable"
    assert asked.others["hopper"] == "it could; impl='portable' asks for another"
    assert tilewise.explain(*attend(), gpu="H200", impl="hopper").on_gpu_note == ""
    assert tilewise.explain(*attend(dim=64), gpu="H200").others["hopper"] == WAITS


def test_the_command_asks_for_an_implementation(command):
    ran = command("--q", "1,16,4096,128", "--gpu", "H200", "--impl", "hopper", "--json")
    found = json.loads(ran.output)
    assert ran.exit_code == 0 and found["on_gpu"] == found["implementation"] == "hopper"
    assert found["kernels"][0]["tile"]["has_turns"] is True
    ran = command("--case", "minilm-l6-encoder", "--impl", "fast")
    assert ran.exit_code == 2 and "impl='fast' must be" in ran.output
