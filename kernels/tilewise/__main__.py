"""`tilewise` and `python -m tilewise`: choose GPU or interpreter, then hand over to the command line."""

import os
import sys

import torch

RUN_KERNELS = {"demo", "tune"}  # the other commands look at kernels without running them
INTERPRET_KERNELS = {"watch"}  # on a GPU too: only there can each statement be seen


def interpret_without_gpu() -> None:
    """Where no GPU is found, start this command again with the kernels in Triton's interpreter, and say so.

    Triton reads TRITON_INTERPRET while it decorates a kernel. The kernels were decorated by the import of
    `tilewise` that led here, so setting the variable now would come too late for this process. Does nothing
    where TRITON_INTERPRET is set, to whatever value, or a GPU is there.
    """
    # True for NVIDIA and for AMD: torch built for ROCm answers under the same name.
    if "TRITON_INTERPRET" in os.environ or torch.cuda.is_available():
        return
    print(
        "tilewise: no GPU found: the kernels run in Triton's interpreter, on the CPU",
        file=sys.stderr,
        flush=True,
    )
    interpret()


def interpret() -> None:
    """Start this command again in Triton's interpreter, unless that is set, to whatever value."""
    if "TRITON_INTERPRET" in os.environ:
        return
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main() -> None:
    """The entry point of the `tilewise` command."""
    if RUN_KERNELS & set(sys.argv[1:2]) and "--help" not in sys.argv:
        interpret_without_gpu()
    if INTERPRET_KERNELS & set(sys.argv[1:2]) and "--help" not in sys.argv:
        interpret()
    from tilewise import cli

    cli.main()


if __name__ == "__main__":
    main()
