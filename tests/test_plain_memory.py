"""Plain PyTorch holds a block of scores at a time, in the backward too: its memory is linear in length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import tilewise
from harness.memory import peak_bytes
from tilewise.pytorch import plain

Tensor = torch.Tensor
SHORT, LONG = 96, 384
BLOCK = 1 << 13  # scores: 32 KiB in fp32, where all of LONG are 576 KiB a head


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """On one thread: several would mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(plain, "BLOCK", BLOCK)
    yield
    torch.set_num_threads(threads)


def leaf(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes, dtype=dtype, requires_grad=True)


def step(length: int, dtype: torch.dtype = torch.float32, **arguments: Any) -> Callable[[], Any]:
    x = leaf(1, 2, length, 8, dtype=dtype)
    return lambda: tilewise.attention(x, x, x, impl="torch", **arguments).sum().backward()


def lse_step(length: int) -> Callable[[], Any]:
    """PyTorch's kernel answers, and has no gradient of lse: the backward is the definition's."""
    x = leaf(1, 2, length, 8)
    return lambda: tilewise.attention(x, x, x, impl="torch", return_lse=True)[1].sum().backward()


def packed_step(length: int) -> Callable[[], Any]:
    """Many sequences, each of them in one block."""
    x, offsets = leaf(length, 2, 8), torch.arange(0, length + 1, 32)
    score = tilewise.Softcap(5.0)
    return lambda: (
        tilewise.packed_attention(x, x, x, q_offsets=offsets, score=score, impl="torch").sum().backward()
    )


STEPS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "score": lambda n: step(n, score=tilewise.Softcap(5.0)),
    "float64": lambda n: step(n, torch.float64, mask=tilewise.Causal(), sink=leaf(2, dtype=torch.float64)),
    "window": lambda n: step(n, mask=tilewise.Window(20, 0)),
    "bias of keys": lambda n: step(n, bias=leaf(n)),
    "dropout": lambda n: step(n, dropout_p=0.3),
    "lse": lse_step,
}


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_is_linear_in_length(name):
    """Four times as long: less than five times the memory, where all scores would take sixteen."""
    torch.use_deterministic_algorithms(False)  # which fills what is empty, and allocates for it
    short, long = (STEPS[name](length) for length in (SHORT, LONG))
    short(), long()  # .grad is there now, and caches are filled
    assert peak_bytes(long) < 5 * peak_bytes(short)


def test_scores_of_one_sequence_at_a_time(monkeypatch):
    """Of packed ones, each in one block."""
    step = packed_step(LONG)
    step()
    again = peak_bytes(step)
    monkeypatch.setattr(plain, "can_run_again", lambda request: False)
    assert peak_bytes(step) > 1.5 * again


def test_every_score_at_once_would_be_noticed(monkeypatch):
    """The yardstick above: a step that keeps what all blocks computed."""
    monkeypatch.setattr(plain, "can_run_again", lambda request: False)
    short, long = (STEPS["score"](length) for length in (SHORT, LONG))
    assert peak_bytes(long) > 10 * peak_bytes(short)


# ---- What goes on around it


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return tilewise.attention(q, k, v, bias=bias, mask=tilewise.Window(30, 9), impl="torch")


def inputs() -> list[Tensor]:
    return [leaf(1, 2, 70, 8), leaf(1, 1, 70, 8), leaf(1, 1, 70, 8), leaf(70, 70)]


def gradients(run: Callable[..., Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(*given).sin().sum(), given)


def test_the_same_gradients_as_without(monkeypatch):
    given = inputs()
    got = gradients(attend, given)
    monkeypatch.setattr(plain, "can_run_again", lambda request: False)
    assert all(map(torch.equal, got, gradients(attend, given)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_within_a_checkpoint_of_the_callers_own(reentrant):
    given = inputs()
    nested = lambda *x: checkpoint(attend, *x, use_reentrant=reentrant)  # noqa: E731
    want = gradients(attend, given)
    nested(*given).sin().sum().backward()
    assert all(torch.equal(x.grad, dx) for x, dx in zip(given, want, strict=True))


def test_a_graph_that_is_walked_twice_and_in_parts():
    given = inputs()
    want = gradients(attend, given)
    loss = attend(*given).sin().sum()
    for x, dx in zip(given, want, strict=True):
        assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], dx)
    assert all(map(torch.equal, torch.autograd.grad(loss, given), want))


def test_within_hooks_on_saved_tensors():
    """Those see no scores: a block keeps none. Where such hooks are forbidden, everything is kept."""
    given = inputs()
    want, seen = gradients(attend, given), []
    with saved_tensors_hooks(lambda x: seen.append(x.numel()) or x.clone(), lambda x: x):
        assert all(map(torch.equal, gradients(attend, given), want))
    assert sum(seen) < 70 * 70
    with disable_saved_tensors_hooks("none of these, please"):
        assert all(map(torch.equal, gradients(attend, given), want))


@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_a_tensor_that_has_changed_since_is_noticed(name):
    given = inputs()
    loss = attend(*given).sin().sum()
    with torch.no_grad():
        dict(zip(("q", "k", "v", "bias"), given, strict=True))[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_function_of_the_callers_own_that_closes_over_a_parameter():
    q, k, v, factor = (*inputs()[:3], leaf(1))
    twin = lambda s, batch, head, q_idx, kv_idx: s * factor  # noqa: E731
    run = lambda: tilewise.attention(  # noqa: E731
        q, k, v, score=tilewise.UserScore(None, twin=twin), impl="torch"
    )
    (got,) = torch.autograd.grad(run().sin().sum(), factor)
    with torch.no_grad():
        ends = []
        for h in (1e-2, -1e-2):
            factor.add_(h)
            ends.append(run().sin().sum().item())
            factor.sub_(h)
    assert abs(got.item() - (ends[0] - ends[1]) / 2e-2) < 1e-2 * abs(got.item()) + 1e-3
