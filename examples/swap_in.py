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

from starting import start

if __name__ == "__main__":
    start(
        "swap_in",
        "transformers,demo",
        {"transformers", "safetensors", "tokenizers", "typer", "rich", "matplotlib"},
    )
