"""Modules around `tilewise.attention`: projections to queries, keys and values, heads, projection out."""

from .core import AttentionCore
from .cross_attention import CrossAttention
from .rotary import Rotary
from .self_attention import SelfAttention

__all__ = ["AttentionCore", "CrossAttention", "Rotary", "SelfAttention"]
