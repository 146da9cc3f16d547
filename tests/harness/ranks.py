"""Functions run by several processes that talk over gloo: ranks of torch.distributed, without a GPU.

    run((3,), function, x)            [function(mesh, x) of ranks 0, 1 and 2], on a DeviceMesh of that shape
    errors((2, 2), function, x)       what each of four ranks raised; all of them must raise

The processes are kept from call to call: a call that does little takes milliseconds. They are forks of one
process that has imported PyTorch and tilewise and runs nothing, so that also a new set of them costs little:
it is needed after a call that failed, whose messages may still be under way, and for what kills a process
(`Pool`).
Nothing hangs: whoever takes longer than `limit` seconds is killed, with the stacks of all in the error.

The function must be found by its name in its module. Arguments and results are pickled, tensors by value.
A function that makes groups or meshes itself must run on all four: PyTorch numbers groups as they are made.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import importlib
import importlib.util
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

RANKS = 4
LIMIT = 60.0  # seconds a call may take
AXES = {1: ("context",), 2: ("outer", "inner")}  # the names of a mesh's dimensions, by how many there are


class RankError(RuntimeError):
    """The traceback of the rank that raised; or a rank that died, or gave no answer in time."""


# ---- The test's side


def run(shape: Sequence[int], function: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
    """function(mesh, *args) on each rank of a mesh of `shape`: the results, by rank.

    Raises what the first rank that failed raised, from a RankError with that rank's traceback; RankError for
    a rank that died or took longer than `limit`.
    """
    with discarded_if_it_raises() as pool:
        return pool.run(shape, function, *args, limit=limit)


def errors(
    shape: Sequence[int], function: Callable[..., Any], *args: Any, limit: float = LIMIT
) -> list[Exception]:
    """What function(mesh, *args) raised on each rank. Whoever calls vouches that nobody waits for, and nobody
    has sent, a message that the others do not know of: the processes go on. AssertionError if a rank raised
    nothing."""
    with discarded_if_it_raises() as pool:
        found = [failed for failed, _ in pool.outcomes(shape, function, *args, limit=limit)]
        calm = [rank for rank, error in enumerate(found) if error is None]
        assert not calm, f"ranks {calm} raised nothing; the others: {[e for e in found if e is not None]}"
        return found


_kept: list[Pool] = []


@contextmanager
def discarded_if_it_raises() -> Iterator[Pool]:
    if not _kept:
        _kept.append(Pool())
    try:
        yield _kept[0]
    except BaseException:
        _kept.pop().close()
        raise


class Pool:
    """`size` processes in one process group whose operations fail after `timeout` seconds. A context."""

    def __init__(self, size: int = RANKS, timeout: float = LIMIT) -> None:
        control = template()  # before the sockets: it may be a fork of this process
        self.size, self.shapes = size, set()
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.workers: list[Connection] = []
        theirs = []
        for _ in range(size):
            ours, other = socket.socketpair()
            self.workers.append(Connection(ours.detach()))
            theirs.append(other)
        job = pickle.dumps((self.folder.name, size, timeout))
        socket.send_fds(control, [len(job).to_bytes(4, "little") + job], [s.fileno() for s in theirs])
        for other in theirs:
            other.close()
        self.pids = [pid for _, pid in self.answers(range(size), LIMIT, "the start")]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, shape: Sequence[int], function: Callable[..., Any], *args: Any, limit: float = LIMIT
    ) -> list[Any]:
        """As the function `run`."""
        found = self.outcomes(shape, function, *args, limit=limit)
        for rank, (error, value) in enumerate(found):
            if error is not None:
                raise error from RankError(f"rank {rank} of {tuple(shape)} in {function.__name__}:\n{value}")
        return [value for _, value in found]

    def outcomes(
        self, shape: Sequence[int], function: Callable[..., Any], *args: Any, limit: float = LIMIT
    ) -> list[tuple[Exception | None, Any]]:
        """(None, result) or (error, its traceback) of each rank."""
        shape = tuple(shape)
        count = functools.reduce(int.__mul__, shape)
        if shape not in self.shapes:  # all processes make a mesh's groups, whether they are in it or not
            self.tell(range(self.size), ("mesh", shape))
            self.answers(range(self.size), LIMIT, f"making the mesh {shape}")
            self.shapes.add(shape)
        self.tell(range(count), ("call", shape, home(function), pickle.dumps((function, args))))
        return self.answers(range(count), limit, function.__name__)

    def tell(self, ranks: Sequence[int], message: Any) -> None:
        data = pickle.dumps(message)
        for rank in ranks:
            with suppress(BrokenPipeError):  # its answer, the end of the file, says so
                self.workers[rank].send_bytes(data)

    def answers(self, ranks: Sequence[int], limit: float, what: str) -> list[Any]:
        """One from each of these ranks, in their order; an error for a rank that died is (RankError, "")."""
        found: dict[int, Any] = {}
        end = time.monotonic() + limit
        while late := [self.workers[rank] for rank in ranks if rank not in found]:
            ready = wait(late, max(0.0, end - time.monotonic()))
            if not ready:
                missing = [rank for rank in ranks if rank not in found]
                raise RankError(f"{what}: ranks {missing} gave no answer in {limit} s.\n{self.stacks()}")
            for worker in ready:
                rank = self.workers.index(worker)
                try:
                    found[rank] = pickle.loads(worker.recv_bytes())
                except (EOFError, ConnectionResetError):
                    found[rank] = RankError(f"{what}: the process of rank {rank} ended"), self.said(rank)
        return [found[rank] for rank in ranks]

    def stacks(self) -> str:
        """Where each process stands, and what it has written to stderr."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)
        return "\n".join(f"rank {rank}:\n{self.said(rank)}" for rank in range(self.size))

    def said(self, rank: int) -> str:
        return (Path(self.folder.name) / f"stderr-{rank}").read_text(errors="replace")[-4000:]

    def close(self) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for worker in self.workers:
            worker.close()
        self.folder.cleanup()


def home(function: Callable[..., Any]) -> tuple[str, str]:
    """The module of a function and its file: what a process needs to find it."""
    return function.__module__, sys.modules[function.__module__].__file__


@functools.cache
def template() -> socket.socket:
    """Starts the process that the others are forks of; what is sent here makes it fork. It is itself a fork
    of this one, if this one has no other thread, as under `mutate`: that saves the imports."""
    ours, theirs = socket.socketpair()
    if len(os.listdir("/proc/self/task")) == 1:
        if (pid := os.fork()) == 0:
            ours.close()
            serve(theirs)
    else:
        one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        line = (
            "import json, socket, sys; sys.path[:] = json.loads(sys.argv[1]); import harness.ranks as r; "
            "r.serve(socket.socket(fileno=int(sys.argv[2])))"
        )
        pid = subprocess.Popen(
            [sys.executable, "-c", line, json.dumps(sys.path), str(theirs.fileno())],
            env={**os.environ, **one_thread},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        ).pid
    theirs.close()

    def end() -> None:
        while _kept:
            _kept.pop().close()
        ours.close()
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)

    atexit.register(end)
    return ours


# ---- The process that forks


def serve(control: socket.socket) -> None:
    """Import what all need, then fork: a set of processes for each message, until there are no more. Does not
    return."""
    import pytest  # noqa: F401
    import torch.distributed

    import tilewise  # noqa: F401

    from .quick import quick_interpreter

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # `torch.empty` is full of NaN; slow, once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test's process ends all
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how one ended
    with quick_interpreter():
        while True:
            data, fds, _, _ = socket.recv_fds(control, 4, RANKS)
            if not data:
                os._exit(0)
            folder, size, timeout = pickle.loads(control.recv(int.from_bytes(data, "little")))
            for rank in range(size):
                if os.fork() == 0:
                    control.close()
                    for other, fd in enumerate(fds):
                        if other != rank:
                            os.close(fd)
                    work(Connection(fds[rank]), folder, rank, size, timeout)
            for fd in fds:
                os.close(fd)


# ---- A rank's side


def work(test: Connection, folder: str, rank: int, size: int, timeout: float) -> None:
    """Join the process group, and answer calls until the test ends. Does not return."""
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    error = os.open(f"{folder}/stderr-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(error, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    store = dist.FileStore(f"{folder}/store", size)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    try:
        test.send_bytes(pickle.dumps((None, os.getpid())))
        while True:
            kind, shape, *call = pickle.loads(test.recv_bytes())
            made = answer(shape, *call) if kind == "call" else (mesh(shape) and None)
            test.send_bytes(pickle.dumps(made))
    except (EOFError, ConnectionResetError, BrokenPipeError):
        pass  # the test has ended
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def answer(shape: tuple[int, ...], where: tuple[str, str], call: bytes) -> tuple[Exception | None, Any]:
    import torch
    from torch.utils import _pytree

    torch.default_generator.manual_seed(0)
    try:
        load(*where)
        function, args = pickle.loads(call)
        result = function(mesh(shape), *args)
        own = _pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone(), result)
        pickle.dumps(own)
        return None, own
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return error, text


@functools.cache
def mesh(shape: tuple[int, ...]) -> Any:
    """The mesh of that shape over the first ranks, the same object each time."""
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    count = functools.reduce(int.__mul__, shape)
    return DeviceMesh("cpu", torch.arange(count).reshape(shape), mesh_dim_names=AXES[len(shape)])


def load(name: str, file: str) -> None:
    """Import a module as the test's process knows it, from that very file."""
    if name in sys.modules:
        return
    with suppress(ImportError):
        if importlib.import_module(name).__file__ == file:
            return
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
