"""The forward pass for Hopper GPUs (sm_90): warp-specialised, in Gluon, the language under Triton.

    limits.py         what the hardware prescribes
    launch.py         a call as the kernel's arguments
    forward.py        the kernel: which roles there are, what they share, who waits for whom
    producer.py       a warp, or four, that has tiles copied
    consumer.py       a warpgroup that computes: the loop
    pieces.py         its products, of tiles whose columns are in pieces
    plan.py           what all roles know
    channels.py       how they hand tiles to one another
    schedule.py       which tile comes next
    instructions.py   what Gluon has no name for

It has not run on a GPU yet, so it answers only when it is asked for: `attention(..., impl="hopper")`.
docs/hopper.md teaches it. Importing this package does not import Gluon.
"""
