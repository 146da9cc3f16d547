"""The name "tilewise" in Transformers' two tables: of attention functions, and of what makes their masks."""

from __future__ import annotations

import re

NAME = "tilewise"
OLDEST = (5, 4)  # the first whose masks are asked for by lengths and offsets; as in pyproject.toml
INSTALL = 'pip install "transformers>=5.4"'


def register() -> None:
    """Make attn_implementation="tilewise" known to Transformers, in this process. A second call changes
    nothing.

        tilewise.integrations.transformers.register()
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tilewise")

    Every model then runs on it that gets its attention from Transformers' AttentionInterface; docs/drop_in.md
    lists those that are tested. Masks stay structured: Transformers' own mask functions are recognised and
    become masks of tilewise, and a bool tensor is made of functions that are not (with a warning).

    Raises ImportError, with the command that installs it, if Transformers is missing or older than 5.4.
    """
    try:
        import transformers
    except ModuleNotFoundError as missing:
        if missing.name != "transformers":
            raise
        raise ImportError(f"Transformers is not installed: {INSTALL}") from None
    found = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise ImportError(
            f"Transformers {transformers.__version__} is too old for attn_implementation={NAME!r}: {INSTALL}"
        )
    from transformers import AttentionInterface, AttentionMaskInterface

    from .attention import attention_forward
    from .known import tag_mask_functions
    from .masks import model_mask

    tag_mask_functions()
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, model_mask)
