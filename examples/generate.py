"""Text from the GPT that train_gpt has trained, three ways: attention over the whole text again for each
character, or over keys and values that are kept, in one piece or in pages.

    python examples/train_gpt.py                               # writes train-gpt/checkpoint.pt
    python examples/generate.py
    PYTHONPATH=kernels:reference python examples/generate.py    # from a clone, nothing installed
    python examples/generate.py --help

The three must write the same text; the command checks that and fails if they do not.

The folder beside this file holds it: `generate/ways.py` the three ways, `command.py` the options. The model
is that of `train_gpt/model.py`.
"""

import os
import sys

# What the extra "demo" brings. A missing module that is not listed is a bug of ours.
EXTRAS = {"typer", "rich"}
OURS = {"tilewise", "tilewise_reference", "torch", "triton"}


def main() -> None:
    """Run the command; where a package is missing, say what to install and exit with 1."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train_gpt.py does
    try:
        from generate.command import app  # the folder generate, which comes before this file
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        if name not in EXTRAS | OURS:
            raise
        sys.exit(f"generate: {name} is not installed: pip install '.[demo]' in the clone of tilewise")
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
