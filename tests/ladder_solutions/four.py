import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, m, n, scale, D: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr
):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column, value_column = tl.arange(0, D)[None, :], tl.arange(0, E)[None, :]
    q = tl.load(q_ptr + rows[:, None] * D + column, rows[:, None] < m, 0.0)
    row_max = tl.full([TILE], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)
    o = tl.zeros([TILE, E], tl.float32)
    for start in range(0, n, TILE):
        keys = start + tl.arange(0, TILE)
        k = tl.load(k_ptr + keys[:, None] * D + column, keys[:, None] < n, 0.0)
        v = tl.load(v_ptr + keys[:, None] * E + value_column, keys[:, None] < n, 0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        s = tl.where(keys[None, :] < n, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp(s - new_max[:, None])
        rescale = tl.exp(row_max - new_max)
        row_max, row_sum = new_max, row_sum * rescale + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None])
    tl.store(out_ptr + rows[:, None] * E + value_column, o / row_sum[:, None], rows[:, None] < m)
    tl.store(lse_ptr + rows, row_max + tl.log(row_sum), rows < m)


def exercise(q, k, v):
    (m, d), (n, e) = q.shape, v.shape
    out, lse = q.new_empty(m, e), q.new_empty(m, dtype=torch.float32)
    kernel[(triton.cdiv(m, 32),)](q, k, v, out, lse, m, n, d**-0.5, D=d, E=e, TILE=32)
    return out, lse
