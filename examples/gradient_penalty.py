"""A model trained not to react strongly to small changes of its input, and the memory that this takes.

    TRITON_INTERPRET=1 python examples/gradient_penalty.py

The penalty is the squared gradient of the loss by the input (Drucker and Le Cun, Double backpropagation,
1991), so a step differentiates a gradient. Without a GPU, TRITON_INTERPRET=1 runs the kernels; else plain
PyTorch answers, which keeps all scores for a second derivative, as a textbook softmax does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import tilewise as tw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_DIM = 16
WEIGHT = 0.1  # of the penalty


class Model(nn.Module):
    """One layer of attention, and a number for each position."""

    def __init__(self, width: int = HEAD_DIM) -> None:
        super().__init__()
        self.attend = tw.nn.SelfAttention(width, heads=1)
        self.answer = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x + self.attend(x, mask=tw.Causal()))[..., 0]  # [batch, length]


def train(steps: int = 3, length: int = 16) -> None:
    """Learn the mean of what has been seen so far of the first number."""
    torch.manual_seed(0)
    model = Model().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    x = torch.randn(1, length, HEAD_DIM, device=DEVICE, requires_grad=True)
    wanted = x[..., 0].detach().cumsum(1) / torch.arange(1, length + 1, device=DEVICE)
    for step in range(steps):
        loss = (model(x) - wanted).square().mean()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        penalty = length * dx.square().sum()
        optimizer.zero_grad()
        (loss + WEIGHT * penalty).backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}, penalty {penalty.item():.4f}")


# ---- Memory of one second derivative, beside its inputs: q, k, v, dO and directions


def tilewise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return tw.attention(q, k, v, mask=tw.Causal())


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / q.shape[3] ** 0.5
    unseen = torch.ones_like(s, dtype=torch.bool).triu(1)
    return torch.softmax(s.masked_fill(unseen, -torch.inf), dim=3) @ v


def differentiated_twice(attend: Callable[..., Tensor], length: int) -> int:
    """The most bytes that are held at a time."""
    torch.manual_seed(0)
    sizes = 1, 1, length, HEAD_DIM
    q, k, v = (torch.randn(sizes, device=DEVICE, requires_grad=True) for _ in range(3))
    do, *directions = (torch.randn(sizes, device=DEVICE) for _ in range(4))

    def run() -> None:
        gradients = torch.autograd.grad(attend(q, k, v), (q, k, v), do, create_graph=True)
        torch.autograd.grad(gradients, (q, k, v), directions)

    return peak_bytes(run)


def peak_bytes(run: Callable[[], None]) -> int:
    """Of tensors that are made while it runs."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def predicted(length: int, heads: int = 1, head_dim: int = HEAD_DIM, element: int = 4) -> int:
    """What the kernels' results and what they keep of each row come to: docs/derivatives.md."""
    of_query = element * 4 * head_dim + 24  # O, Ȯ, dQ and its tangent; six numbers
    of_key = element * 4 * head_dim  # dK, dV and their tangents
    return heads * length * (of_query + of_key)


def main() -> None:
    train()
    lengths = (1024, 2048, 4096) if DEVICE == "cuda" else (64, 128)
    q = torch.empty(1, 1, 1, HEAD_DIM, device=DEVICE)
    if reasons := tw.why_not(q, q, q, impl="portable"):
        print(f"tilewise: plain PyTorch answers, for {'; '.join(reasons)}")
    print("\nKB of a second derivative\nlength  tilewise  predicted  textbook")
    for length in lengths:
        found = (
            differentiated_twice(tilewise, length),
            predicted(length),
            differentiated_twice(textbook, length),
        )
        print(f"{length:6}  {found[0] / 1e3:8.0f}  {found[1] / 1e3:9.0f}  {found[2] / 1e3:8.0f}")
    ours, scores = predicted(32768, heads=16, head_dim=128, element=2), 4 * 16 * 32768**2
    print(
        f"\nOn a GPU, 32768 tokens, 16 heads of 128, 16 bits: {ours / 1e9:.1f} GB by the same count; one "
        f"matrix of scores in fp32 is {scores / 1e9:.0f} GB"
    )


if __name__ == "__main__":
    main()
