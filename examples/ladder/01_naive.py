"""1. Naive: attention as it is written on paper, in three lines of PyTorch.

Each of N queries asks all N keys how alike they are: S = Q Kᵀ / √D. A softmax turns each row of S into
weights P that sum to one. The answer is the average of the values with these weights: O = P V.

What it costs  4 N² D FLOPs in two products, and three matrices of N × N numbers, each of which is
               written and read again: the products, the scaled ones, the weights. Twice as long a text is
               four times as much memory: at N = 131072 and D = 64 in fp16 each of them has 32 GiB, where Q
               has 16 MiB.
Source         "Attention is all you need" (Vaswani et al. 2017, arXiv 1706.03762).
The real one   reference/tilewise_reference/attention.py, which says what every result must be.
Exercise       Attention with a mask: a bool matrix, False where a query may not see a key. A query that
               may see no key at all gets 0, not NaN. Write it below, or in a file of your own, then:
               python -m tilewise.ladder check 1
"""

import ladder
import torch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [N, D], k [N, D], v [N, D] -> O [N, D]."""
    # S = Q Kᵀ / √D
    s = q @ k.T / q.shape[1] ** 0.5  # [N, N]
    p = torch.softmax(s, dim=1)  # [N, N]
    # O = P V
    return p @ v  # [N, D]


def with_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """q, k, v and dO [N, D] -> O, dQ, dK and dV [N, D], by autograd; rung 7 does it without the matrix."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, do))


def exercise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q [M, D], k [N, D], v [N, E], mask [M, N], True where the query may see the key -> O [M, E]."""
    raise NotImplementedError


def main() -> list[ladder.Counts]:
    """Count it for two lengths."""
    found = [ladder.count(attention, n, n, n) for n in ladder.SIZES]
    for n, counts in zip(ladder.SIZES, found, strict=True):
        # Q, K, V and O once. S is written and read, then S / √D, then P: six times N × N numbers.
        assert counts.memory == 2 * (4 * n * ladder.D + 6 * n * n)
        assert counts.matmul == 4 * n * n * ladder.D and counts.exponentials == n * n
    ladder.show(__doc__, {"1 naive": found})
    return found


if __name__ == "__main__":
    ladder.climb(__file__, main, {"1 naive": attention})
