import torch
import triton
import triton.language as tl


@triton.jit
def kernel(q_ptr, k_ptr, v_ptr, out_ptr, n, factor, sign, D: tl.constexpr, TILE: tl.constexpr):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + rows[:, None] * D + column, rows[:, None] < n, 0.0)
    q = (q * sign).to(tl.float16)
    row_max = tl.full([TILE], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)
    o = tl.zeros([TILE, D], tl.float32)
    for start in range(0, n, TILE):
        keys = start + tl.arange(0, TILE)
        k = tl.load(k_ptr + keys[:, None] * D + column, keys[:, None] < n, 0.0)
        v = tl.load(v_ptr + keys[:, None] * D + column, keys[:, None] < n, 0.0)
        s = tl.dot(q, tl.trans(k))
        new_max = tl.maximum(row_max, tl.max(tl.where(keys[None, :] < n, s, float("-inf")), 1) * factor)
        p = tl.exp2(s * factor - new_max[:, None])
        p = tl.where(keys[None, :] < n, p, 0.0)
        rescale = tl.exp2(row_max - new_max)
        row_max, row_sum = new_max, row_sum * rescale + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None])
    tl.store(out_ptr + rows[:, None] * D + column, o / row_sum[:, None], rows[:, None] < n)


def exercise(q, k, v, scale):
    (n, d), out = q.shape, torch.empty_like(q)
    factor, sign = abs(scale) * 1.4426950408889634, 1.0 if scale >= 0 else -1.0
    kernel[(triton.cdiv(n, 32),)](q, k, v, out, n, factor, sign, D=d, TILE=32)
    return out
