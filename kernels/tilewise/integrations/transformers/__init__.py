"""tilewise as an attention implementation of Hugging Face Transformers."""

from .register import register
from .rows import attention_rows

__all__ = ["attention_rows", "register"]
