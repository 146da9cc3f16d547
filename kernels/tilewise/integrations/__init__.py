"""tilewise inside other libraries, none of which it needs: each is imported when it is asked for."""

from . import transformers as transformers

__all__ = ["transformers"]
