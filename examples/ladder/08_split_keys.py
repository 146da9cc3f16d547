"""8. Split keys: one query, many keys, and work for the whole chip.

What changed   Writing a text word by word has one new query a step, and so one tile of rows: of rung 6 a
               single program would walk over all keys, while the rest of the chip idles. Now SPLITS
               programs take a part of the keys each, and write their O and lse. A second kernel merges
               them.
Why            The states of two sets of keys can be joined in any order: the merge is the online softmax
               once more, with a split for a key, its lse for the score and its O for the value.
What it saves  Time, on a chip with many processors: the longest walk is as many times shorter as there
               are splits. It costs memory for the parts, which does not depend on N.
Source         "Flash-Decoding" (Dao, Haziza, Massa and Sizov 2023,
               https://pytorch.org/blog/flash-decoding/).
The real one   kernels/tilewise/kernels/combine.py; tilewise.merge joins results of two calls.
Exercise       The merge of two results, each with its natural lse. Rows of either may have seen no key: O
               is 0 and lse -inf.
               python -m tilewise.ladder check 8
"""

import ladder
import torch
import triton
import triton.language as tl

TILE_Q, TILE_KV = 16, 64
LENGTHS = [8 * n for n in ladder.SIZES]


@triton.jit
def split_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, m, n, keys_each, factor,
    D: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
):  # fmt: skip
    """Of one part of the keys, O for all m queries, and lse in base 2."""
    split, rows, column = tl.program_id(0), tl.arange(0, TILE_Q), tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + rows[:, None] * D + column, rows[:, None] < m, 0.0)  # [TILE_Q, D]
    row_max, row_sum = tl.full([TILE_Q], float("-inf"), tl.float32), tl.zeros([TILE_Q], tl.float32)
    o = tl.zeros([TILE_Q, D], tl.float32)
    for start in range(split * keys_each, tl.minimum((split + 1) * keys_each, n), TILE_KV):
        keys = start + tl.arange(0, TILE_KV)
        k = tl.load(k_ptr + keys[:, None] * D + column, keys[:, None] < n, 0.0)  # [TILE_KV, D]
        v = tl.load(v_ptr + keys[:, None] * D + column, keys[:, None] < n, 0.0)  # [TILE_KV, D]
        # S = Q Kᵀ
        s = tl.where(keys[None, :] < n, tl.dot(q, tl.trans(k)), float("-inf"))  # [TILE_Q, TILE_KV]
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        p = tl.exp2(s * factor - new_max[:, None])  # [TILE_Q, TILE_KV]
        rescale = tl.exp2(row_max - new_max)
        row_max, row_sum = new_max, row_sum * rescale + tl.sum(p, 1)
        # O = O · rescale + P V
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None])  # [TILE_Q, D]
    at = split * m + rows
    tl.store(part_ptr + at[:, None] * D + column, o / row_sum[:, None], rows[:, None] < m)
    tl.store(lse_ptr + at, row_max + tl.log2(row_sum), rows < m)


@triton.jit
def merge_kernel(part_ptr, lse_ptr, out_ptr, splits, m, D: tl.constexpr):
    """One row of O: the online softmax over splits."""
    row, column = tl.program_id(0), tl.arange(0, D)
    row_max, row_sum, o = float("-inf"), 0.0, tl.zeros([D], tl.float32)
    for split in range(splits):
        score = tl.load(lse_ptr + split * m + row)
        value = tl.load(part_ptr + (split * m + row) * D + column)  # [D]
        new_max = tl.maximum(row_max, score)
        p, rescale = tl.exp2(score - new_max), tl.exp2(row_max - new_max)
        # O = O · rescale + P V
        row_max, row_sum, o = new_max, row_sum * rescale + p, o * rescale + p * value
    tl.store(out_ptr + row * D + column, o / row_sum)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, splits: int = 8) -> torch.Tensor:
    """q [M, D] with M <= 16, k [N, D], v [N, D] -> O [M, D]."""
    (m, d), n, out = q.shape, len(k), torch.empty_like(q)
    keys_each = triton.cdiv(triton.cdiv(n, TILE_KV), splits) * TILE_KV  # whole tiles
    splits = triton.cdiv(n, keys_each)  # no part without a key
    part, lse = q.new_empty(splits, m, d, dtype=torch.float32), q.new_empty(splits, m, dtype=torch.float32)
    sizes = dict(D=d, TILE_Q=TILE_Q, TILE_KV=TILE_KV)
    split_kernel[(splits,)](q, k, v, part, lse, m, n, keys_each, ladder.LOG2E * d**-0.5, **sizes)
    merge_kernel[(m,)](part, lse, out, splits, m, D=d)
    return out


def one_walk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same without splits."""
    return attention(q, k, v, splits=1)


def exercise(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [M, D] and lse [M] of each of two sets of keys, in fp32 -> those of all keys."""
    raise NotImplementedError


def main() -> list[ladder.Counts]:
    """Count one new query over two lengths of keys: in one walk, and split."""
    one, split = ([ladder.count(way, 1, n, n) for n in LENGTHS] for way in (one_walk, attention))
    for found, splits in ((one, 1), (split, 8)):
        for n, counts in zip(LENGTHS, found, strict=True):
            # Q, K, V and O once; of each part O and lse, in fp32, which are written and read.
            assert counts.memory == 2 * ladder.D * (1 + 2 * n + 1) + 2 * 4 * splits * (ladder.D + 1)
            assert counts.longest == 4 * TILE_Q * (n // splits) * ladder.D
    ladder.count(attention, 3, 700, 700)  # parts of unlike lengths
    ladder.show(__doc__, {"in one walk": one, "8 split keys": split}, f"1 query, {LENGTHS[1]} keys")
    return split


if __name__ == "__main__":
    ways = {"in one walk": one_walk, "8 split keys": attention}
    ladder.climb(__file__, main, ways, lengths=lambda n: (1, n, n))
