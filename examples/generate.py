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

from starting import start

if __name__ == "__main__":
    start("generate", "demo", {"typer", "rich"})
