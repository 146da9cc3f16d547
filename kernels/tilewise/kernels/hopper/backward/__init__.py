"""The backward pass for Hopper GPUs (sm_90): warp-specialised, in Gluon, one walk with five products.

    launch.py      a call as the kernel's arguments
    kernel.py      the kernel: which roles there are, what they share, who waits for whom
    walk.py        which keys a program owns, and which tiles of rows visit them
    producer.py    a warp that has tiles copied
    consumer.py    a warpgroup that computes: the walk
    step.py        and what it does for one tile of rows
    cleaning.py    what no pair may see becomes 0
    reducer.py     a warp that adds dQ to memory, in order
    plan.py        what all roles know

Rings, named barriers and limits are the forward's. docs/hopper_backward.md teaches it.
"""
