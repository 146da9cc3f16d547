"""Scripts, each run in a process of its own that need not import PyTorch and Triton: it is forked from one
that has, and has done nothing else. Settings in the environment are those of the first script's time."""

from __future__ import annotations

import multiprocessing
import os
import runpy
from pathlib import Path

IMPORTED = ["torch", "torch._dynamo", "triton.experimental.gluon.nvidia.hopper", "triton.runtime.interpreter"]


def run_script(path: Path, log: Path) -> int:
    """The exit code of this script; what it prints goes to the file `log`."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(IMPORTED)
    process = processes.Process(target=as_main, args=(str(path), str(log)))
    process.start()
    process.join()
    code = process.exitcode
    process.close()
    return code


def as_main(path: str, log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    runpy.run_path(path, run_name="__main__")
