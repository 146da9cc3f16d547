"""Runs pytest many times without importing PyTorch and Triton each time: a process that imports them once,
and forks for every run.

It is a script of its own, not imported as part of `harness`: each run must import the harness and tilewise
from the tree that it is told to test. Requests are lines of JSON on standard input, {"tree", "arguments",
"log", "timeout"}; each is answered by a line with pytest's exit code, minus a signal's number, or "timeout".
"""

import gc
import json
import os
import signal
import sys
import time
from importlib.metadata import entry_points


def run(tree: str, arguments: list[str], log: str) -> None:
    """In the child: pytest on the tree's own sources, its output in the file `log`."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    paths = [os.path.join(tree, name) for name in ("kernels", "reference", "tests")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    code = 3  # pytest's own "internal error", if it does not get as far as an exit code
    try:
        code = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, timeout: float) -> "int | str":
    """The child's exit code; it and what it started are killed once its time is up."""
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout"
        time.sleep(0.02)


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(request["tree"], request["arguments"], request["log"])
        print(json.dumps(wait(child, request["timeout"])), flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest
    import torch._dynamo
    import triton.experimental.gluon.nvidia.hopper
    import triton.runtime.interpreter  # noqa: F401

    for plugin in entry_points(group="pytest11"):
        plugin.load()  # else pytest would, in each run
    gc.freeze()  # nor need a run look through all this for garbage
    serve()
