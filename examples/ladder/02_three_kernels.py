"""2. Three kernels: the same in Triton, with the matrix still in memory.

What changed   PyTorch's operations are kernels of ours now: scores, softmax, times V. A kernel is written
               for one tile: a program loads tiles of its inputs, computes, and stores a tile of its
               output; many programs run at once. 1 / √D is taken in the first kernel, while the scores
               are at hand.
Why            To see what a kernel is made of, and where the bytes go: S and P go through memory only to
               get from one kernel to the next.
What it saves  The pass over N × N numbers that divided by √D: six of them become four. No FLOPs.
Source         Programs of tiles: "Triton" (Tillet, Kung and Cox 2019, doi 10.1145/3315508.3329973).
Exercise       A softmax in place: replace each row of s by its weights, with one kernel of your own that
               reads and writes each number once. A row of -inf becomes 0. Rows may lie further apart than
               they are long; what is between them is not yours.
               python -m tilewise.ladder check 2
"""

import ladder
import torch
import triton
import triton.language as tl

TILE = 64


@triton.jit
def tile_at(rows, columns, stride):
    """Where the numbers of a tile lie in a matrix, seen from its first one."""
    return rows[:, None] * stride + columns[None, :]


@triton.jit
def scores_kernel(q_ptr, k_ptr, s_ptr, n, scale, D: tl.constexpr, TILE: tl.constexpr):
    """One tile of S."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    keys = tl.program_id(1) * TILE + tl.arange(0, TILE)
    q = tl.load(q_ptr + tile_at(rows, tl.arange(0, D), D), rows[:, None] < n, 0.0)  # [TILE, D]
    k = tl.load(k_ptr + tile_at(keys, tl.arange(0, D), D), keys[:, None] < n, 0.0)  # [TILE, D]
    # S = Q Kᵀ / √D
    s = tl.dot(q, tl.trans(k)) * scale  # [TILE, TILE]
    tl.store(s_ptr + tile_at(rows, keys, n), s, (rows[:, None] < n) & (keys[None, :] < n))


@triton.jit
def softmax_kernel(s_ptr, p_ptr, n, WIDTH: tl.constexpr):
    """One row of P; WIDTH is a power of two, and at least n."""
    at = tl.program_id(0) * n + tl.arange(0, WIDTH)
    inside = tl.arange(0, WIDTH) < n
    s = tl.load(s_ptr + at, inside, float("-inf")).to(tl.float32)  # [WIDTH]
    p = tl.exp(s - tl.max(s, 0))  # [WIDTH]
    tl.store(p_ptr + at, p / tl.sum(p, 0), inside)


@triton.jit
def values_kernel(p_ptr, v_ptr, out_ptr, n, D: tl.constexpr, TILE: tl.constexpr):
    """One tile of rows of O."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o = tl.zeros([TILE, D], tl.float32)
    for start in range(0, n, TILE):
        keys = start + tl.arange(0, TILE)
        inside = (rows[:, None] < n) & (keys[None, :] < n)
        p = tl.load(p_ptr + tile_at(rows, keys, n), inside, 0.0)  # [TILE, TILE]
        v = tl.load(v_ptr + tile_at(keys, tl.arange(0, D), D), keys[:, None] < n, 0.0)  # [TILE, D]
        # O = O + P V
        o = tl.dot(p, v, o)  # [TILE, D]
    tl.store(out_ptr + tile_at(rows, tl.arange(0, D), D), o, rows[:, None] < n)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [N, D], k [N, D], v [N, D] -> O [N, D]."""
    n, d = q.shape
    tiles = triton.cdiv(n, TILE)
    s, p, out = q.new_empty(n, n), q.new_empty(n, n), torch.empty_like(q)
    scores_kernel[tiles, tiles](q, k, s, n, d**-0.5, D=d, TILE=TILE)
    softmax_kernel[(n,)](s, p, n, WIDTH=triton.next_power_of_2(n))
    values_kernel[(tiles,)](p, v, out, n, D=d, TILE=TILE)
    return out


def exercise(s: torch.Tensor) -> None:
    """s [M, N] in fp32, neighbours in a row are neighbours in memory: replace it by its softmax."""
    raise NotImplementedError


def main() -> list[ladder.Counts]:
    """Count it for two lengths, beside the rung before."""
    found = [ladder.count(attention, n, n, n) for n in ladder.SIZES]
    for n, counts in zip(ladder.SIZES, found, strict=True):
        # Q, K, V and O once. S is written and read, then P: four times N × N numbers.
        assert counts.memory == 2 * (4 * n * ladder.D + 4 * n * n)
        assert counts.matmul == 4 * n * n * ladder.D and counts.exponentials == n * n
    ladder.count(attention, 100, 100, 100)  # no multiple of a tile
    ladder.show(__doc__, {"1 naive": ladder.counts_of(1), "2 three kernels": found})
    return found


if __name__ == "__main__":
    ladder.climb(__file__, main, {"1 naive": ladder.rung(1).attention, "2 three kernels": attention})
