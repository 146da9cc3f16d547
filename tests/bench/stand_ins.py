"""Libraries that need a GPU, on the CPU, as their documentation describes them: what the adapters call.

Each is the float64 reference behind the library's own signature, layouts and conventions (where windows and
causal masks are aligned, what a limit counts, what is returned), so that an adapter that misunderstands an
argument gives a wrong answer.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch

import tilewise_reference
from tilewise_reference import masks, scores

Tensor = torch.Tensor


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: list[Any], score: list[Any], **options: Any
) -> tuple[Tensor, Tensor]:
    """[batch, length, heads, dim] each; out in q's dtype, and lse [batch, heads, length]."""
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = tilewise_reference.attention(
        q_, k_, v_, mask=mask, score=score, scale=scale, return_lse=True, dtype=torch.float64, **options
    )
    return out.transpose(1, 2).to(q.dtype), lse.float()


def corner(q_len: int, kv_len: int, causal: bool, window: tuple[Any, Any]) -> list[Any]:
    """Both aligned to the bottom right; None or -1 sets no limit."""
    left, right = (None if x in (None, -1) else x for x in window)
    found = [masks.causal(q_len, kv_len, "bottom_right")] if causal else []
    if left is not None or right is not None:
        found.append(masks.window(left, right, q_len, kv_len, "bottom_right"))
    return found


def packed(function: Any) -> Any:
    """The same over sequences that follow each other: [tokens, heads, dim]."""

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, **options: Any,
    ) -> Any:  # fmt: skip
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        outs = []
        bounds = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
        for q0, q1, k0, k1 in bounds:
            assert q1 - q0 <= max_seqlen_q and k1 - k0 <= max_seqlen_k
            out = function(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], **options)
            outs.append((out[0] if isinstance(out, tuple) else out)[0])
        return torch.cat(outs)

    return varlen


def flash_attn() -> types.ModuleType:
    """flash_attn 2."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and softmax_scale is not None
        q_len, kv_len = q.shape[1], k.shape[1]
        score = [scores.softcap(softcap)] if softcap else []
        if alibi_slopes is not None:
            assert alibi_slopes.dtype == torch.float32
            score.append(scores.alibi(alibi_slopes, q_len, kv_len, "bottom_right"))
        options: dict[str, Any] = {}
        if dropout_p:
            shape = (q.shape[0], q.shape[2], q_len, kv_len)
            options = dict(dropout_p=dropout_p, dropout_keep=torch.rand(shape) >= dropout_p)
        out, lse = dense(q, k, v, softmax_scale, corner(q_len, kv_len, causal, window_size), score, **options)
        return (out, lse.detach(), None) if return_attn_probs else out

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
        rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
        cache_seqlens: Tensor | None = None, cache_batch_idx: Tensor | None = None,
        cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
        softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None,
        num_splits: int = 0, return_softmax_lse: bool = False,
    ) -> Tensor:  # fmt: skip
        assert cache_seqlens is not None and cache_seqlens.dtype == torch.int32
        assert k_cache.stride(-1) == v_cache.stride(-1) == 1
        if block_table is not None:
            assert block_table.dtype == torch.int32 and k_cache.shape[1] % 256 == 0
            k_cache, v_cache = (x[block_table.long()].flatten(1, 2) for x in (k_cache, v_cache))
        assert k_cache.shape[0] == q.shape[0]
        rows = enumerate(cache_seqlens.tolist())
        return torch.cat([
            flash_attn_func(
                q[i : i + 1], k_cache[i : i + 1, :n].contiguous(), v_cache[i : i + 1, :n].contiguous(), 0.0,
                softmax_scale, causal, window_size, softcap, alibi_slopes,
            )
            for i, n in rows
        ])  # fmt: skip

    module = types.ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = packed(flash_attn_func)
    return module


def flash_attn_cute() -> types.ModuleType:
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None), learnable_sink: Tensor | None = None,
        softcap: float = 0.0,
    ) -> Any:  # fmt: skip
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and softmax_scale is not None
        assert not (causal and window_size != (None, None))
        assert learnable_sink is None or learnable_sink.dtype == torch.bfloat16
        score = [scores.softcap(softcap)] if softcap else []
        mask = corner(q.shape[1], k.shape[1], causal, window_size)
        return dense(q, k, v, softmax_scale, mask, score, sink=learnable_sink)

    module = types.ModuleType("flash_attn.cute.interface")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = packed(flash_attn_func)
    return module


def flash_attn_3() -> types.ModuleType:
    """Its fp8: out in bf16, and a scale of q for each head of keys."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
        qv: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
        v_descale: Tensor | None = None, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn and softmax_scale is not None
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and qv is None
        numbers = []
        for x, scale in ((q, q_descale), (k, k_descale), (v, v_descale)):
            assert scale is not None and scale.dtype == torch.float32
            assert scale.shape == (k.shape[0], k.shape[2])
            numbers.append(x.double() * scale[:, None, :, None])
        score = [scores.softcap(softcap)] if softcap else []
        mask = corner(q.shape[1], k.shape[1], causal, window_size)
        q_, k_, v_ = numbers
        return dense(q_, k_, v_, softmax_scale, mask, score)[0].bfloat16()

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func
    return module


def flashinfer() -> types.ModuleType:
    class BatchPrefillWithRaggedKVCacheWrapper:
        def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
            assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"

        def plan(
            self, qo_indptr: Tensor, kv_indptr: Tensor, num_qo_heads: int, num_kv_heads: int,
            head_dim_qk: int, head_dim_vo: int | None = None, causal: bool = False, window_left: int = -1,
            logits_soft_cap: float | None = None, sm_scale: float | None = None,
            q_data_type: Any = "float16",
        ) -> None:  # fmt: skip
            assert isinstance(q_data_type, torch.dtype)
            self.bounds, self.sizes = (qo_indptr, kv_indptr), (num_qo_heads, num_kv_heads, head_dim_qk)
            score = [scores.softcap(logits_soft_cap)] if logits_soft_cap else []

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                mask = corner(q.shape[1], k.shape[1], causal, (window_left, -1))
                return dense(q, k, v, sm_scale, mask, score)[0]

            self.attend = packed(attend)

        def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert (q.shape[1], k.shape[1], q.shape[2]) == self.sizes and q.dim() == 3
            return self.attend(q, k, v, *self.bounds, 1 << 30, 1 << 30)

    class Paged:
        """What its two wrappers for pages have in common."""

        def __init__(
            self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_tensor_cores: bool = False
        ) -> None:
            assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"

        def laid_out(
            self, qo_indptr: Tensor, indptr: Tensor, indices: Tensor, last_page_len: Tensor,
            num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, causal: bool,
            window_left: int = -1, logits_soft_cap: float | None = None, sm_scale: float | None = None,
            q_data_type: Any = "float16",
        ) -> None:  # fmt: skip
            assert all(x.dtype == torch.int32 for x in (qo_indptr, indptr, indices, last_page_len))
            assert (
                int(indptr[-1]) == len(indices)
                and 1 <= last_page_len.min() <= last_page_len.max() <= page_size
            )
            assert isinstance(q_data_type, torch.dtype)
            self.sizes, score = (num_qo_heads, num_kv_heads, head_dim, page_size), []
            if logits_soft_cap:
                score = [scores.softcap(logits_soft_cap)]

            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                outs = []
                for i, last in enumerate(last_page_len.tolist()):
                    mine = indices[indptr[i] : indptr[i + 1]].long()
                    rows = (len(mine) - 1) * page_size + last
                    own = [x[mine].flatten(0, 1)[None, :rows] for x in (k, v)]
                    here = q[None, qo_indptr[i] : qo_indptr[i + 1]]
                    mask = corner(here.shape[1], rows, causal, (window_left, -1))
                    outs.append(dense(here, *own, sm_scale, mask, score)[0][0])
                return torch.cat(outs)

            self.attend = run

        def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
            k, v = paged_kv_cache
            assert (q.shape[1], k.shape[2], q.shape[2], k.shape[1]) == self.sizes and q.dim() == 3
            return self.attend(q, k, v)

    class BatchDecodeWithPagedKVCacheWrapper(Paged):
        def plan(
            self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int,
            num_kv_heads: int, head_dim: int, page_size: int, **options: Any,
        ) -> None:  # fmt: skip
            one_each = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
            sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
            self.laid_out(one_each, indptr, indices, last_page_len, *sizes, causal=False, **options)

    class BatchPrefillWithPagedKVCacheWrapper(Paged):
        def plan(
            self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor,
            paged_kv_last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
            page_size: int, *, causal: bool = False, **options: Any,
        ) -> None:  # fmt: skip
            pages = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
            sizes = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
            self.laid_out(qo_indptr, *pages, *sizes, causal=causal, **options)

    module = types.ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    module.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    module.BatchPrefillWithRaggedKVCacheWrapper = BatchPrefillWithRaggedKVCacheWrapper
    return module


def xformers() -> types.ModuleType:
    class LowerTriangularMask:
        align, window = "top_left", None

    class LowerTriangularFromBottomRightMask:
        align, window = "bottom_right", None

        def make_local_attention(self, window_size: int) -> Any:
            """No key whose distance is window_size or more."""
            self.window = window_size
            return self

    @dataclass
    class BlockDiagonalMask:
        lengths: list[int]
        causal: bool = False

        @classmethod
        def from_seqlens(cls, q_seqlen: list[int]) -> Any:
            return cls(q_seqlen)

        def make_causal(self) -> Any:
            return BlockDiagonalMask(self.lengths, True)

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        if query.dim() == 5:
            shape = query.shape
            flat = (x.flatten(2, 3) for x in (query, key, value))
            return memory_efficient_attention(*flat, attn_bias, p, scale).unflatten(2, shape[2:4])
        q_len, kv_len = query.shape[1], key.shape[1]
        mask: list[Any] = []
        options: dict[str, Any] = {}
        if isinstance(attn_bias, Tensor):
            assert attn_bias.shape == (query.shape[0], query.shape[2], q_len, kv_len)
            assert attn_bias.stride(2) % 8 == 0 and attn_bias.dtype == query.dtype
            options["bias"] = attn_bias
        elif isinstance(attn_bias, BlockDiagonalMask):
            assert query.shape[0] == 1 and sum(attn_bias.lengths) == q_len == kv_len
            ids = torch.repeat_interleave(
                torch.arange(len(attn_bias.lengths)), torch.tensor(attn_bias.lengths)
            )
            mask = [ids[:, None] == ids]
            mask += corner(q_len, kv_len, attn_bias.causal, (None, None))
        elif attn_bias is not None:
            mask = [masks.causal(q_len, kv_len, attn_bias.align)]
            if attn_bias.window is not None:
                mask.append(masks.window(attn_bias.window - 1, None, q_len, kv_len, attn_bias.align))
        if p:
            shape = (query.shape[0], query.shape[2], q_len, kv_len)
            options |= dict(dropout_p=p, dropout_keep=torch.rand(shape) >= p)
        return dense(query, key, value, scale, mask, [], **options)[0]

    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention = memory_efficient_attention
    kinds = types.SimpleNamespace(
        LowerTriangularMask=LowerTriangularMask,
        LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask,
        BlockDiagonalMask=BlockDiagonalMask,
    )
    module.fmha = types.SimpleNamespace(attn_bias=kinds)
    return module


def jax() -> types.ModuleType:
    """Arrays are tensors; what JAX calls a derivative is autograd's."""

    def dot_product_attention(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *,
        scale: float | None = None, is_causal: bool = False, local_window_size: Any = None,
        implementation: str | None = None,
    ) -> Tensor:  # fmt: skip
        assert implementation == "cudnn" and key.shape == value.shape
        assert all(x is None or x.dim() == 4 for x in (bias, mask))
        q_len, kv_len = query.shape[1], key.shape[1]
        kept: list[Any] = [masks.causal(q_len, kv_len, "top_left")] if is_causal else []
        if local_window_size is not None:
            left, right = local_window_size
            assert is_causal and right == 0
            kept.append(masks.window(left, right, q_len, kv_len, "top_left"))
        if mask is not None:
            kept.append(mask)
        return dense(query, key, value, scale, kept, [], bias=bias)[0]

    def vjp(function: Any, *primals: Tensor) -> tuple[Tensor, Any]:
        leaves = [x.detach().requires_grad_() for x in primals]
        with torch.enable_grad():
            out = function(*leaves)
        return out.detach(), lambda do: torch.autograd.grad(out, leaves, do, retain_graph=True)

    module = types.ModuleType("jax")
    module.nn = types.SimpleNamespace(dot_product_attention=dot_product_attention)
    module.dlpack = types.SimpleNamespace(from_dlpack=lambda x: x)
    module.jit, module.vjp = lambda function: function, vjp
    return module


def varlen() -> types.ModuleType:
    """PyTorch's own, which has no kernel for a CPU."""

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[1]
        left, right = window_size

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dense(q, k, v, scale, corner(q.shape[1], k.shape[1], False, (left, right)), [])[0]

        return packed(attend)(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = varlen_attn
    return module


def nested_attention(functional: Any) -> Any:
    """scaled_dot_product_attention, whose backends for nested tensors that have a causal mask need a GPU."""
    real = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if not query.is_nested:
            return real(query, key, value, **options)
        assert query.shape[1] == key.shape[1] == value.shape[1] and options.keys() == {"is_causal", "scale"}
        causal, scale, offsets = options["is_causal"], options["scale"], query.offsets()

        def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dense(q, k, v, scale, corner(q.shape[1], k.shape[1], causal, (None, None)), [])[0]

        rows = [x.transpose(1, 2).values() for x in (query, key, value)]
        longest = query._maybe_max_seqlen
        out = packed(one)(*rows, offsets, offsets, longest, longest)
        return torch.nested.nested_tensor_from_jagged(out, offsets).transpose(1, 2)

    return attend


MODULES = {
    "flash_attn": flash_attn,
    "flash_attn.cute.interface": flash_attn_cute,
    "flash_attn_interface": flash_attn_3,
    "flashinfer": flashinfer,
    "xformers.ops": xformers,
    "jax": jax,
    "torch.nn.attention.varlen": varlen,
}
