"""Modules around `tilewise.attention`: projections to queries, keys and values, heads, projection out. And
caches of keys and values for generation."""

from .core import AttentionCore
from .cross_attention import CrossAttention
from .kv_cache import CacheFull, KVCache
from .paged_kv_cache import PagedKVCache
from .rotary import Rotary
from .self_attention import SelfAttention

__all__ = [
    "AttentionCore",
    "CacheFull",
    "CrossAttention",
    "KVCache",
    "PagedKVCache",
    "Rotary",
    "SelfAttention",
]
