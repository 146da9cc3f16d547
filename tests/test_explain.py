"""`tilewise.explain`: which implementation answers and why, and nothing runs to find it out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tilewise
from harness.calls import doubled
from harness.explained import attend, leave_interpreter, meta, prose
from tilewise.plan.implementation import IMPLEMENTATIONS
from tilewise.pytorch import plain
from tilewise.tools.chips import find_chip


@pytest.fixture
def without_interpreter(monkeypatch):
    leave_interpreter(monkeypatch)


def test_the_interpreter_answers_where_it_is_on(device):
    q = torch.randn(1, 1, 20, 16, device=device)
    found = tilewise.explain(q, q, q)
    assert found.implementation == "portable" and not found.refused
    assert "it could" in found.others["torch"] and "through memory" in found.others["torch"]
    if device.type == "cpu":
        assert "interpreter is on" in found.because and "tiles of 32 × 32" in found.because


def test_plain_pytorch_answers_on_a_cpu_and_a_gpu_would_run_the_kernels(without_interpreter, nothing_runs):
    q = torch.randn(1, 4, 100, 64)
    mask = tilewise.Causal() & tilewise.Window(9, 0)
    found = tilewise.explain(q, q, q, mask=mask)
    assert (found.implementation, found.gpu) == ("torch", "H200")
    assert "interpreter is off" in found.because and "TRITON_INTERPRET=1" in found.others["portable"]
    assert "assumed" in found.gpu_because
    assert [x.bytes for x in found.memory_here] == [4 * 4 * 100 * 100]
    assert not tilewise.explain(q, q, q, mask=tilewise.Causal()).memory_here  # in PyTorch's fused kernel
    assert [kernel.name for kernel in found.kernels] == ["forward"]
    assert "the portable kernels would answer" in " ".join(str(found).split())


def test_plain_pytorch_holds_a_block_of_scores_whatever_is_asked(without_interpreter):
    q = torch.empty(1, 4, 8192, 64)
    bytes_of = {}
    for work in ("forward", "training"):
        for score in (None, tilewise.Softcap(9.0)):
            q.requires_grad_(work == "training")
            found = tilewise.explain(q, q, q, score=score, work=work)
            bytes_of[work, score is None] = sum(x.bytes for x in found.memory_here)
    assert bytes_of["forward", True] == bytes_of["training", True] == 0
    assert 0 < bytes_of["forward", False] == bytes_of["training", False] <= 4 * plain.BLOCK


def test_a_call_that_is_refused_here_is_explained_for_a_gpu(without_interpreter):
    q = torch.randn(1, 4, 100, 64)
    found = tilewise.explain(q, q, q, impl="portable")
    assert "TRITON_INTERPRET" in found.refused[0] and found.kernels
    assert f"attention() raises here: {found.refused[0]}" in " ".join(str(found).split())


def test_float64_is_explained_as_plain_pytorch(without_interpreter):
    q = torch.randn(1, 4, 100, 64, dtype=torch.float64)
    for on in (q, q.to("meta")):
        found = tilewise.explain(on, on, on, score=tilewise.Softcap(9.0), work="training")
        assert found.implementation == "torch" and "in float64, in which no kernel" in found.because
        assert "impl='portable' takes" in found.no_kernels and not found.kernels and not found.refused
        assert [x.bytes for x in found.memory_here] == [8 * 4 * 100 * 100]
        assert "score matrices in fp64" in str(found)


def test_what_was_asked_about_comes_first():
    """Of meta tensors that is the GPU: nothing happens here."""
    words = prose(tilewise.explain(*attend(), gpu="A100")).split(" Implementation ")[1]
    assert words.startswith("On an A100 (as asked for) the portable kernels answer. hopper does not:")
    assert words.index("q is a meta tensor") < words.index("Launches")
    words = prose(tilewise.explain(*attend(), gpu="A100", impl="torch")).split(" Implementation ")[1]
    assert words.startswith("torch answers here: impl='torch' asks for it.")
    assert "On an A100 (as asked for) the portable kernels would answer" in words


@pytest.mark.parametrize(
    "q, kv, is_noted",
    [
        ((2, 4096, 32, 128), (2, 4096, 32, 128), True),  # [batch, length, heads, dim]
        ((2, 512, 32, 128), (2, 512, 8, 128), True),
        ((2, 32, 4096, 128), (2, 8, 4096, 128), False),
        ((2, 128, 1, 128), (2, 128, 512, 128), False),  # decoding with many heads
        ((64, 128, 49, 32), (64, 128, 49, 32), False),  # windows of an image
        ((64, 16, 3, 32), (64, 16, 3, 32), False),  # few rows, and no more heads than there are
    ],
)
def test_heads_and_length_that_look_exchanged_are_noted(q, kv, is_noted):
    found = tilewise.explain(meta(*q), meta(*kv), meta(*kv), gpu="H200")
    assert any("give transpose(1, 2) of each" in note for note in found.notes) == is_noted


def test_what_only_plain_pytorch_takes_has_no_kernels(device):
    q = torch.randn(1, 1, 20, 16, device=device)
    score = tilewise.UserScore(doubled, twin=lambda s, *_: 2 * s)
    found = tilewise.explain(q, q, q, score=score, impl="torch", work="training")
    assert found.implementation == "torch" and found.kernels == () and "derivative=" in found.no_kernels
    assert "derivative=" in found.others["portable"] and "derivative=" in str(found)


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


def test_reasons_come_from_the_rules(monkeypatch):
    """An implementation that is added to the list is judged by the same rules, and named."""
    monkeypatch.setattr("tilewise.tools.explain.explain.IMPLEMENTATIONS", (*IMPLEMENTATIONS, "metal"))
    found = tilewise.explain(*attend())
    assert "impl='metal' must be None" in found.others["metal"]
    assert [*found.others] == ["hopper", "torch", "metal"] and "metal" not in IMPLEMENTATIONS
