"""tilewise behind models that others have written: one word in the call that makes the model.

    python examples/swap_in.py
    PYTHONPATH=kernels:reference python examples/swap_in.py    # from a clone, nothing installed
    python examples/swap_in.py --help

First the pretrained all-MiniLM-L6-v2 in Transformers' own BertModel, with attn_implementation="tilewise":
it must see the sentences of `tilewise demo` as alike as with "eager", Transformers' own attention. Then a
tiny Llama learns the text that ships with the examples, once with each: their losses must agree. The command
checks both and fails if they do not. On a CPU plain PyTorch computes, in half a minute; on a GPU the kernels
do.

The folder beside this file holds it: `swap_in/sentences.py` the encoder, `learning.py` the Llama,
`command.py` the options. What agreeing means is that of `train_gpt/compare.py`.
"""

import os
import sys

# What the extras "transformers" and "demo" bring. A missing module that is not listed is a bug of ours.
EXTRAS = {"transformers", "safetensors", "tokenizers", "typer", "rich", "matplotlib"}
OURS = {"tilewise", "tilewise_reference", "torch", "triton"}


def main() -> None:
    """Run the command; where a package is missing, say what to install and exit with 1."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train_gpt.py does
    try:
        from swap_in.command import app  # the folder swap_in, which comes before this file
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        if name not in EXTRAS | OURS:
            raise
        sys.exit(
            f"swap_in: {name} is not installed: pip install '.[transformers,demo]' in the clone of tilewise"
        )
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
