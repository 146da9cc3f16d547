"""The forward pass for Hopper GPUs (sm_90): warp-specialised, in Gluon, the language under Triton.

    rules.py          which calls it takes
    launch.py         a call as the kernel's arguments
    forward.py        the kernel: what the producer does, and what a consumer does
    channels.py       how they hand tiles to one another
    schedule.py       which tile comes next
    instructions.py   what Gluon has no name for

It has not run on a GPU yet, so it answers only when it is asked for: `attention(..., impl="hopper")`.
docs/hopper.md teaches it. Importing this package does not import Gluon.
"""
