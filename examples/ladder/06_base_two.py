"""6. Exponentials in base 2, with the scale folded in.

What changed   Three lines of rung 4. exp(x) is 2^(x · log2 e), and that is how a GPU computes it: a
               multiplication, then an instruction for 2^x. The scores have just been multiplied too, by 1
               / √D. One factor does for both: log2 e / √D. The maximum is taken of the raw products Q Kᵀ.
Why            A step of the loop has TILE_Q · TILE_KV exponentials, and the unit for them is slow. What
               stands around them should be as little as can be: now one multiplication for each pair, and
               with the subtraction of row_max it is a single instruction, a multiply-add.
What it saves  One of two multiplications for each pair; those that rescale O remain. No bytes, and no
               FLOPs in products.
What it needs  A scale above 0: otherwise the largest product is not the largest score.
Source         FlashAttention-2 (Dao 2023, arXiv 2307.08691), in its kernels. exp as 2^x: Triton's
               ExpOpConversionApprox.
The real one   kernels/tilewise/parts/softmax.py, `softmax_step`.
Exercise       A scale that may be negative or 0, still with one multiplication for each pair.
               python -m tilewise.ladder check 6
"""

import ladder
import torch
import triton
import triton.language as tl

TILE = 64


@triton.jit
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, n, factor, D: tl.constexpr, TILE: tl.constexpr):
    """One tile of rows of O, and lse = log2 Σ 2^score for the backward; factor = log2 e / √D."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + rows[:, None] * D + column, rows[:, None] < n, 0.0)  # [TILE, D]
    row_max = tl.full([TILE], float("-inf"), tl.float32)  # in units of base 2
    row_sum = tl.zeros([TILE], tl.float32)
    o = tl.zeros([TILE, D], tl.float32)

    for start in range(0, n, TILE):
        keys = start + tl.arange(0, TILE)
        k = tl.load(k_ptr + keys[:, None] * D + column, keys[:, None] < n, 0.0)  # [TILE, D]
        v = tl.load(v_ptr + keys[:, None] * D + column, keys[:, None] < n, 0.0)  # [TILE, D]
        # S = Q Kᵀ
        s = tl.dot(q, tl.trans(k))  # [TILE, TILE]
        s = tl.where(keys[None, :] < n, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)  # [TILE]
        # P = 2^(S · log2 e / √D - row_max)
        p = tl.exp2(s * factor - new_max[:, None])  # [TILE, TILE]
        rescale = tl.exp2(row_max - new_max)  # [TILE]
        row_max, row_sum = new_max, row_sum * rescale + tl.sum(p, 1)
        # O = O · rescale + P V
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None])  # [TILE, D]

    tl.store(out_ptr + rows[:, None] * D + column, o / row_sum[:, None], rows[:, None] < n)
    tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), rows < n)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [N, D], k [N, D], v [N, D] -> O [N, D] and lse [N], in base 2."""
    (n, d), out = q.shape, torch.empty_like(q)
    lse = q.new_empty(n, dtype=torch.float32)
    attention_kernel[(triton.cdiv(n, TILE),)](q, k, v, out, lse, n, ladder.LOG2E * d**-0.5, D=d, TILE=TILE)
    return out, lse


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """O alone."""
    return attention(q, k, v)[0]


def exercise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale · Q Kᵀ) V for q [N, D], k [N, D], v [N, D] in fp16, by a kernel -> O [N, D]."""
    raise NotImplementedError


def main() -> list[ladder.Counts]:
    """Count it for two lengths, beside rung 4."""
    found, before = [ladder.count(forward, n, n, n) for n in ladder.SIZES], ladder.counts_of(4)
    for n, counts, four in zip(ladder.SIZES, found, before, strict=True):
        # One multiplication a pair; for each row of each tile its maximum, its sum and O; O / row_sum.
        assert counts.multiplications == n * n + n * (n // TILE) * (2 + ladder.D) + n * ladder.D
        assert four.multiplications == counts.multiplications + n * n
    ladder.count(forward, 100, 100, 100)  # no multiple of a tile
    ladder.show(__doc__, {"4 fused loop": before, "6 base two": found})
    return found


if __name__ == "__main__":
    ways = {"4 fused loop": ladder.rung(4).attention, "6 base two": forward}
    ladder.climb(__file__, main, ways)
