"""tilewise as an attention implementation of Hugging Face Transformers."""

from .register import register

__all__ = ["register"]
