"""A small character-level GPT in training, once with tilewise's attention and once with PyTorch's own.

    python examples/train_gpt.py
    PYTHONPATH=kernels:reference python examples/train_gpt.py    # from a clone, nothing installed
    python examples/train_gpt.py --help
    torchrun --nproc-per-node 4 examples/train_gpt.py --ranks 4 --context 2 --shard 2    # on four GPUs

Both models start from the same weights and see the same batches, so their losses must agree; the command
checks that and fails if they do not. A third model shows how close is close enough: PyTorch's attention with
every result moved by up to one rounding, which is how far two right runs drift apart. On a CPU it takes a
minute or two: attention is plain PyTorch there, and a few steps of a tiny model go through the kernels in
Triton's interpreter. On a GPU the kernels do all of it.

The folder beside this file holds it: `train_gpt/model.py` the model, `compare.py` what agreeing means,
`training.py` a step, `loop.py` all of them, `parallel.py` what several ranks do of one, `checkpoint.py` how
nothing is lost, `command.py` the options.
"""

from starting import start

if __name__ == "__main__":
    start("train_gpt", "demo", {"typer", "rich", "matplotlib"})
