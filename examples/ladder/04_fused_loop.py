"""4. One fused loop over tiles: the matrix of scores is never stored.

What changed   One kernel does the work of three. A program owns a tile of rows of Q and walks over K and
               V, a tile at a time, with the state of rung 3 for each of its rows: row_max, row_sum and o.
Why            S and P went through memory only to reach the next kernel. Now a tile of them lives in
               registers, for one step of the loop, and dies there.
What it saves  N × N numbers, written and read, twice over. What memory still gives and takes is Q, K, V
               and O, which grow with N and not with N². K and V are asked for once for each tile of rows,
               so more rows in a tile ask for less. No FLOPs are saved: the products are the same.
Source         FlashAttention (Dao et al. 2022, arXiv 2205.14135). Rows in the outer loop and one division
               at the end are from FlashAttention-2 (Dao 2023, arXiv 2307.08691).
The real one   kernels/tilewise/kernels/forward.py, explained in docs/kernel.md.
Exercise       Cross-attention: M queries and N keys, and values of another width E (a power of two).
               Return lse = row_max + ln row_sum beside O.
               python -m tilewise.ladder check 4
"""

import ladder
import torch
import triton
import triton.language as tl

TILE_Q = TILE_KV = 64


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, n, scale, D: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr
):
    """One tile of rows of O."""
    rows = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    column = tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + rows[:, None] * D + column, rows[:, None] < n, 0.0)  # [TILE_Q, D]
    row_max = tl.full([TILE_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_Q], tl.float32)
    o = tl.zeros([TILE_Q, D], tl.float32)

    for start in range(0, n, TILE_KV):
        keys = start + tl.arange(0, TILE_KV)
        k = tl.load(k_ptr + keys[:, None] * D + column, keys[:, None] < n, 0.0)  # [TILE_KV, D]
        v = tl.load(v_ptr + keys[:, None] * D + column, keys[:, None] < n, 0.0)  # [TILE_KV, D]
        # S = Q Kᵀ / √D
        s = tl.dot(q, tl.trans(k)) * scale  # [TILE_Q, TILE_KV]
        s = tl.where(keys[None, :] < n, s, float("-inf"))
        # P = exp(S - row_max)
        new_max = tl.maximum(row_max, tl.max(s, 1))  # [TILE_Q]
        p = tl.exp(s - new_max[:, None])  # [TILE_Q, TILE_KV]
        rescale = tl.exp(row_max - new_max)  # [TILE_Q]
        row_max, row_sum = new_max, row_sum * rescale + tl.sum(p, 1)
        # O = O · rescale + P V
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None])  # [TILE_Q, D]

    tl.store(out_ptr + rows[:, None] * D + column, o / row_sum[:, None], rows[:, None] < n)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [N, D], k [N, D], v [N, D] -> O [N, D]."""
    (n, d), out = q.shape, torch.empty_like(q)
    grid = (triton.cdiv(n, TILE_Q),)
    attention_kernel[grid](q, k, v, out, n, d**-0.5, D=d, TILE_Q=TILE_Q, TILE_KV=TILE_KV)
    return out


def exercise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [M, D], k [N, D], v [N, E] in fp16 -> O [M, E] in fp16 and lse [M] in fp32."""
    raise NotImplementedError


def main() -> list[ladder.Counts]:
    """Count it for two lengths, beside the rung before."""
    found = [ladder.count(attention, n, n, n) for n in ladder.SIZES]
    for n, counts in zip(ladder.SIZES, found, strict=True):
        # Q, K, V and O, each once, and nothing that grows with N².
        assert counts.memory == 2 * 4 * n * ladder.D and counts.written == 2 * n * ladder.D
        assert counts.asked == 2 * n * ladder.D * (1 + 2 * n // TILE_Q)
        assert counts.matmul == 4 * n * n * ladder.D
    ladder.count(attention, 100, 100, 100)  # no multiple of a tile
    ladder.show(__doc__, {"2 three kernels": ladder.counts_of(2), "4 fused loop": found})
    return found


if __name__ == "__main__":
    ladder.climb(__file__, main, {"2 three kernels": ladder.rung(2).attention, "4 fused loop": attention})
