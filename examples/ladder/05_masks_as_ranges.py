"""5. Masks as ranges: tiles that nobody may see are not visited, and most others need no mask.

What changed   A query may see the WINDOW keys before it, and itself. The loop of rung 4 now runs over
               three ranges of keys: tiles that the mask cuts, full ones, and cut ones again. Only a cut
               tile asks, pair by pair, who sees whom; all other tiles lie outside of every range.
Why            A matrix of the mask would be N × N numbers once more. Two bounds for each row say the
               same: row i sees the keys from i - WINDOW to i. From these follow the ranges for a tile of
               rows.
What it saves  Everything for the skipped tiles: loads, FLOPs, exponentials. With a window of fixed size,
               work grows with N. In full tiles, the comparisons of the mask.
Source         Sliding windows: Longformer (Beltagy et al. 2020, arXiv 2004.05150). Which tiles to skip and
               which to mask: FlashAttention-2 (Dao 2023, arXiv 2307.08691), section 3.1.
The real one   kernels/tilewise/parts/intervals.py; masks are in kernels/tilewise/parts/masks/.
Exercise       The ranges of another mask, that of a prefix: every query sees the first keys, `prefix` of
               them, and all keys up to itself.
               python -m tilewise.ladder check 5
"""

import ladder
import torch
import triton
import triton.language as tl

window = ladder.masks.window
TILE, WINDOW = 32, 100


@triton.jit
def step(state, q, k_ptr, v_ptr, start, rows, scale, WINDOW: tl.constexpr, IS_CUT: tl.constexpr):
    """Take one tile of keys into the state; what a full tile does has no mask in it."""
    row_max, row_sum, o = state
    keys = start + tl.arange(0, q.shape[0])
    at = keys[:, None] * q.shape[1] + tl.arange(0, q.shape[1])[None, :]
    k, v = tl.load(k_ptr + at), tl.load(v_ptr + at)  # [TILE, D]: see `ranges` for why they are all there
    # S = Q Kᵀ / √D
    s = tl.dot(q, tl.trans(k)) * scale  # [TILE, TILE]
    if IS_CUT:
        behind = rows[:, None] - keys[None, :]
        s = tl.where((behind >= 0) & (behind <= WINDOW), s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet: not -inf - -inf
    p = tl.exp(s - base[:, None])  # [TILE, TILE]
    rescale = tl.exp(row_max - base)
    # O = O · rescale + P V
    return new_max, row_sum * rescale + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, o * rescale[:, None])


@triton.jit
def ranges(first_row, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """Where the keys of a tile of rows begin, where the full tiles do, where these end, and where all end. N
    is a multiple of TILE, so no tile of keys reaches beyond the end."""
    begin = tl.maximum(first_row - WINDOW, 0) // TILE * TILE
    full_begin = (tl.maximum(first_row + TILE - 1 - WINDOW, 0) + TILE - 1) // TILE * TILE
    return begin, tl.minimum(full_begin, first_row), first_row, first_row + TILE


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, scale, D: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr
):
    """One tile of rows of O."""
    first_row = tl.program_id(0) * TILE
    rows = first_row + tl.arange(0, TILE)
    at = rows[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + at)  # [TILE, D]
    row_max, row_sum = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.float32)
    state = row_max, row_sum, tl.zeros([TILE, D], tl.float32)
    begin, full_begin, full_end, end = ranges(first_row, WINDOW, TILE)
    for start in range(begin, full_begin, TILE):
        state = step(state, q, k_ptr, v_ptr, start, rows, scale, WINDOW, True)
    for start in range(full_begin, full_end, TILE):
        state = step(state, q, k_ptr, v_ptr, start, rows, scale, WINDOW, False)
    for start in range(full_end, end, TILE):
        state = step(state, q, k_ptr, v_ptr, start, rows, scale, WINDOW, True)
    row_max, row_sum, o = state
    tl.store(out_ptr + at, o / row_sum[:, None])


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [N, D], k [N, D], v [N, D], N a multiple of TILE -> O [N, D]."""
    (n, d), out = q.shape, torch.empty_like(q)
    assert n % TILE == 0
    attention_kernel[(n // TILE,)](q, k, v, out, d**-0.5, D=d, WINDOW=WINDOW, TILE=TILE)
    return out


def exercise(first_row: int, rows: int, n: int, prefix: int, tile: int) -> tuple[list[int], list[int]]:
    """Of n keys in tiles of `tile`, where the cut and the full ones begin that the rows from first_row on, so
    many, must visit. A tile in which somebody sees something but not everybody all is cut, and so is the last
    one where it reaches beyond n."""
    raise NotImplementedError


def main() -> list[ladder.Counts]:
    """Count it for two lengths, beside the rung before, and draw the tiles."""
    found = [ladder.count(attention, n, n, n, mask=window(WINDOW, 0, n, n)) for n in ladder.SIZES]
    for n, counts in zip(ladder.SIZES, found, strict=True):
        # What the mask says, pair by pair, and what the kernel did: two products a visit, one `where` if cut.
        behind = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        tiles = ((behind >= 0) & (behind <= WINDOW)).unfold(0, TILE, TILE).unfold(1, TILE, TILE).sum((2, 3))
        seen, full = int((tiles > 0).sum()), int((tiles == TILE * TILE).sum())
        assert counts.products == 2 * seen and counts.selects == seen - full
    ladder.show(__doc__, {"4 fused loop": ladder.counts_of(4), "5 masks as ranges": found})
    for row in tiles.tolist():
        print("   ", " ".join("·" if pairs == 0 else "█" if pairs == TILE * TILE else "▒" for pairs in row))
    print(f"    {full} full (█), {seen - full} cut (▒), {tiles.numel() - seen} skipped (·)")
    return found


if __name__ == "__main__":
    ways = {"4 fused loop, no mask": ladder.rung(4).attention, "5 window": attention}
    ladder.climb(__file__, main, ways, masks_of={"5 window": lambda n: window(WINDOW, 0, n, n)})
