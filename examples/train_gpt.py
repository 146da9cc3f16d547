"""A small character-level GPT in training, once with tilewise's attention and once with PyTorch's own.

    python examples/train_gpt.py
    PYTHONPATH=kernels:reference python examples/train_gpt.py    # from a clone, nothing installed
    python examples/train_gpt.py --help

Both models start from the same weights and see the same batches, so their losses must agree; the command
checks that and fails if they do not. A third model shows how close is close enough: PyTorch's attention with
every result moved by up to one rounding, which is how far two right runs drift apart. On a CPU it takes a
minute or two: attention is plain PyTorch there, and a few steps of a tiny model go through the kernels in
Triton's interpreter. On a GPU the kernels do all of it.

The folder beside this file holds it: `train_gpt/model.py` the model, `compare.py` what agreeing means,
`training.py` a step, `loop.py` all of them, `checkpoint.py` how nothing is lost, `command.py` the options.
"""

import os
import sys

# What the extra "demo" brings. A missing module that is not listed is a bug of ours.
EXTRAS = {"typer", "rich", "matplotlib"}
OURS = {"tilewise", "tilewise_reference", "torch", "triton"}


def main() -> None:
    """Run the command; where a package is missing, say what to install and exit with 1."""
    # Threads with nothing to do sleep rather than spin. On two cores that others kept busy (a load of 7), one
    # step of all three models took 460 ms instead of 2080. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from train_gpt.command import app  # the folder train_gpt, which comes before this file
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        if name not in EXTRAS | OURS:
            raise
        sys.exit(f"train_gpt: {name} is not installed: pip install '.[demo]' in the clone of tilewise")
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
