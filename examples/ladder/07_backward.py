"""7. The backward: gradients without the matrix, which is computed again where it is needed.

What changed   The forward keeps lse, one number a row, and no matrix. Two kernels walk the same tiles:
               one by rows for dQ, one by keys for dK and dV. Each computes its tile of P again:

                   P = 2^(S - lse)    dP = dO Vᵀ    dS = P ∘ (dP - delta)    delta = Σ_column dO ∘ O
                   dV = Pᵀ dO         dK = dSᵀ Q / √D         dQ = dS K / √D

Why            Autograd stores P for the backward, N × N numbers, and makes dP and dS as large. Two walks,
               for a row of dQ is a sum over keys, and a row of dK one over queries: each program owns
               what it adds up, and nobody waits for anybody.
What it saves  All N × N numbers. It costs FLOPs: with the forward, nine products where autograd has six.
Source         FlashAttention (Dao et al. 2022, arXiv 2205.14135), appendix B; two walks as in Triton's
               tutorial.
The real one   kernels/tilewise/kernels/backward.py, explained in docs/backward.md.
Exercise       Let lse have a gradient as well, dlse. It changes one line: which delta makes the rest
               right?
               python -m tilewise.ladder check 7
"""

import ladder
import torch
import triton
import triton.language as tl

TILE, LOG2E = 64, tl.constexpr(ladder.LOG2E)
forward, by_autograd = ladder.rung(6).attention, ladder.rung(1).with_gradients


@triton.jit
def load_tile(ptr, start, n, D: tl.constexpr, TILE: tl.constexpr):
    """Rows from start on, 0 beyond the end."""
    rows = start + tl.arange(0, TILE)[:, None]
    return tl.load(ptr + rows * D + tl.arange(0, D)[None, :], rows < n, 0.0)


@triton.jit
def store_tile(ptr, value, start, n, D: tl.constexpr, TILE: tl.constexpr):
    """The same, the other way."""
    rows = start + tl.arange(0, TILE)[:, None]
    tl.store(ptr + rows * D + tl.arange(0, D)[None, :], value, rows < n)


@triton.jit
def dq_walk(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, n, scale,
    D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of rows of dQ, and their delta; scale = 1 / √D."""
    first = tl.program_id(0) * TILE
    rows = first + tl.arange(0, TILE)
    q = load_tile(q_ptr, first, n, D, TILE)  # [TILE, D]
    do = load_tile(do_ptr, first, n, D, TILE)  # [TILE, D]
    lse = tl.load(lse_ptr + rows, rows < n, 0.0)  # [TILE]
    delta = tl.sum(do.to(tl.float32) * load_tile(o_ptr, first, n, D, TILE).to(tl.float32), 1)  # [TILE]
    tl.store(delta_ptr + rows, delta, rows < n)
    dq = tl.zeros([TILE, D], tl.float32)
    for start in range(0, n, TILE):
        k, v = load_tile(k_ptr, start, n, D, TILE), load_tile(v_ptr, start, n, D, TILE)  # [TILE, D]
        # P = 2^(Q Kᵀ · log2 e / √D - lse)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2E) - lse[:, None])  # [rows, keys]
        p = tl.where(start + tl.arange(0, TILE)[None, :] < n, p, 0.0)
        # dS = P ∘ (dO Vᵀ - delta)
        ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])  # [rows, keys]
        # dQ = dQ + dS K
        dq = tl.dot(ds.to(k.dtype), k, dq)  # [TILE, D]
    store_tile(dq_ptr, dq * scale, first, n, D, TILE)


@triton.jit
def dkv_walk(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, n, scale,
    D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of rows of dK and dV. Everything is transposed: a row of a tile is a key."""
    first = tl.program_id(0) * TILE
    k, v = load_tile(k_ptr, first, n, D, TILE), load_tile(v_ptr, first, n, D, TILE)  # [TILE, D]
    dk, dv = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE, D], tl.float32)
    for start in range(0, n, TILE):
        rows = start + tl.arange(0, TILE)
        q, do = load_tile(q_ptr, start, n, D, TILE), load_tile(do_ptr, start, n, D, TILE)  # [TILE, D]
        lse = tl.load(lse_ptr + rows, rows < n, 0.0)  # [TILE]
        delta = tl.load(delta_ptr + rows, rows < n, 0.0)  # [TILE]
        # Pᵀ = 2^(K Qᵀ · log2 e / √D - lse)
        pt = tl.exp2(tl.dot(k, tl.trans(q)) * (scale * LOG2E) - lse[None, :])  # [keys, rows]
        # dV = dV + Pᵀ dO
        dv = tl.dot(pt.to(do.dtype), do, dv)  # [TILE, D]
        # dSᵀ = Pᵀ ∘ (V dOᵀ - delta)
        dst = pt * (tl.dot(v, tl.trans(do)) - delta[None, :])  # [keys, rows]
        # dK = dK + dSᵀ Q
        dk = tl.dot(dst.to(q.dtype), q, dk)  # [TILE, D]
    store_tile(dk_ptr, dk * scale, first, n, D, TILE)
    store_tile(dv_ptr, dv, first, n, D, TILE)


def with_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """q, k, v and dO [N, D] -> O, dQ, dK and dV [N, D]."""
    (n, d), (out, lse), delta = q.shape, forward(q, k, v), q.new_empty(len(q), dtype=torch.float32)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grid = (triton.cdiv(n, TILE),)
    dq_walk[grid](q, k, v, out, do, lse, delta, dq, n, d**-0.5, D=d, TILE=TILE)
    dkv_walk[grid](q, k, v, do, lse, delta, dk, dv, n, d**-0.5, D=d, TILE=TILE)
    return out, dq, dk, dv


def exercise(out: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor) -> torch.Tensor:
    """O and dO [N, D] in fp16, dlse [N] in fp32 -> the delta [N] in fp32 with which the kernels above are
    right for a loss that depends on O and on the natural lse."""
    raise NotImplementedError


def main() -> list[ladder.Counts]:
    """Count forward and backward for two lengths, beside those of rung 1."""
    before = [ladder.count(by_autograd, n, n, n, n) for n in ladder.SIZES]
    found = [ladder.count(with_gradients, n, n, n, n) for n in ladder.SIZES]
    for n, counts, naive in zip(ladder.SIZES, found, before, strict=True):
        # Three kernels read 3, 5 and 4 matrices [N, D] and write 1, 1 and 2; lse and delta are in fp32.
        assert counts.memory == 2 * n * ladder.D * (4 + 6 + 6) + 4 * n * (1 + 2 + 2)
        assert counts.matmul == 9 * 2 * n * n * ladder.D and naive.matmul == 6 * 2 * n * n * ladder.D
    ladder.count(with_gradients, 100, 100, 100, 100)  # no multiple of a tile
    ladder.show(__doc__, {"1 by autograd": before, "7 backward": found})
    return found


if __name__ == "__main__":
    ways = {"1 by autograd": by_autograd, "7 backward": with_gradients}
    ladder.climb(__file__, main, ways, lengths=lambda n: (n, n, n, n))
