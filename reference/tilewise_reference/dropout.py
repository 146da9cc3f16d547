"""Which weights dropout leaves: a random number a pair, computed from the pair's position alone.

    word(b, h, i, j) = word j mod 4 of philox(seed, j div 4, i, h, b)       uint32
    keep(b, h, i, j) = (word >> 1) >= round(p · 2³¹)

So forward and backward find the same mask without storing it, and neither tile sizes nor lengths change it.

Philox is a block cipher used as a generator: the seed is its key, the position its counter (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3", doi 10.1145/2063384.2063405). Dropout: Srivastava et al.
2014, Journal of Machine Learning Research 15.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The paper's constants. The key's increments are the fractions of the golden ratio and of √3, times 2³².
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
INCREMENTS = 0x9E3779B9, 0xBB67AE85
UINT32 = 0xFFFFFFFF  # x & UINT32 is x mod 2³², also of a negative x


def philox(
    seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four random words from the counter c0 .. c3.

    seed: a Python int or an int64 tensor of one element, 64 bits of which the low 32 are the first word of
    the key; a negative one stands for its two's complement. c0 .. c3: int64 tensors that hold uint32 values
    and broadcast together; the four results have their common shape and hold uint32 values in int64. Raises
    ValueError for any other seed.
    """
    k0, k1 = _key(seed)
    for _ in range(rounds):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + INCREMENTS[0]) & UINT32, (k1 + INCREMENTS[1]) & UINT32
    w0, w1, w2, w3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return w0, w1, w2, w3


def dropout_keep(
    seed: int | Tensor,
    p: float,
    shape: tuple[int, int, int, int],
    device: torch.device | str | None = None,
    origin: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Tensor:
    """The pairs that dropout with probability ``p`` keeps: bool ``shape`` = [batch, q_heads, q_len, kv_len].

    seed: as in ``philox``. device: by default the seed's, or the CPU. origin: the numbers of the first
    sequence, head, query and key. Raises ValueError unless 0 <= p <= 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"{p=} must be from 0 to 1")
    if device is None and isinstance(seed, Tensor):
        device = seed.device
    batch, head, row, key = (
        torch.arange(first, first + size, device=device) for first, size in zip(origin, shape, strict=True)
    )
    quad = torch.arange(origin[3] // 4, (origin[3] + shape[3] + 3) // 4, device=device)
    words = philox(seed, quad, row[:, None], head[:, None, None], batch[:, None, None, None])
    word = torch.stack(words, dim=4).flatten(3)  # of key j: number j mod 4 of counter j div 4
    word = word[..., key - 4 * (origin[3] // 4)]  # [batch, q_heads, q_len, kv_len]
    return (word >> 1) >= round(p * 2**31)


def _key(seed: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """The low and the high 32 bits of the seed."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"{seed.dtype=} must be torch.int64 and {tuple(seed.shape)=} hold one element")
        seed = seed.reshape(())
    elif not -(2**63) <= seed < 2**64:
        raise ValueError(f"{seed=} must fit into 64 bits")
    return seed & UINT32, (seed >> 32) & UINT32


def _multiply(multiplier: int, counter: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of two uint32, of which int64 holds only 63 bits: the counter
    goes in two halves of 16 bits."""
    low = multiplier * (counter & 0xFFFF)  # below 2⁴⁸
    upper = multiplier * (counter >> 16) + (low >> 16)  # product = upper · 2¹⁶ + low mod 2¹⁶
    return upper >> 16, (upper & 0xFFFF) << 16 | low & 0xFFFF
