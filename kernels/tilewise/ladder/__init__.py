"""The ladder's tools: what a call does, counted, and the hidden checks of its exercises.

The rungs themselves are examples/ladder/: nine small programs from plain PyTorch to warp roles, each with an
exercise at its end.

    python -m tilewise.ladder list
    python -m tilewise.ladder check 4              # the exercise in 04_*.py, in ./examples/ladder or here
    python -m tilewise.ladder check 4 mine.py      # or in a file of your own

    counting.py         bytes and FLOPs of a call, counted while it runs
    exercises.py        which there are, and the file that holds an answer
    checks.py           the checks of those that are plain functions
    kernel_checks.py    of those that are kernels
    verdict.py          what is said of a wrong one
"""
