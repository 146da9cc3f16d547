"""Which tiles has `tilewise tune` stored for this GPU, and which of them apply here?

A row applies to the GPU that it was timed on, compiled by the Triton that it was timed with, for the kernels
that were timed: another compiler, or other kernels, may spill or ask for more than the chip has.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton

from .tile_table import Key, Row, load

JIT = (b"@triton.jit", b"@gluon.jit", b"@gluon.constexpr_function")


class UserTable(NamedTuple):
    """The rows of one file: those that override the shipped table, and those that do not, with the reason."""

    path: Path
    applied: dict[Key, Row]
    refused: list[tuple[Row, str]]


def cache_folder() -> Path:
    """Where tilewise keeps what it finds out on this machine."""
    if given := os.environ.get("TILEWISE_CACHE"):
        return Path(given).expanduser()
    # The XDG specification: a path that is not absolute does not count.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))) / "tilewise"


def table_path(gpu: str) -> Path:
    """The file of a GPU's tiles: "NVIDIA H200" has tiles/nvidia-h200.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return cache_folder() / "tiles" / f"{slug}.json"


@functools.cache
def kernels_hash() -> str:
    """Of the sources that a kernel is made of: the files with jit functions, and those of what they are
    given."""
    package = Path(__file__).parents[1]
    paths = sorted(path for folder in ("parts", "kernels") for path in package.glob(f"{folder}/**/*.py"))
    sources = {path: path.read_bytes() for path in paths}
    kernels = [source for path, source in sources.items() if is_of_a_kernel(path, source)]
    return hashlib.sha256(b"\0".join(kernels)).hexdigest()[:12]


def is_of_a_kernel(path: Path, source: bytes) -> bool:
    return any(word in source for word in JIT) or path.stem in ("call", "launch")


def read_user_table(gpu: str, arch: str, fits: Callable[[Row], bool]) -> UserTable:
    """The stored tiles of a GPU; without a file there are none.

    Raises ValueError, naming the file and what to do, where it cannot be read or holds something else.
    """
    path = table_path(gpu)
    try:
        rows = load(path)
    except (FileNotFoundError, NotADirectoryError):
        return UserTable(path, {}, [])
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the tiles tuned for {gpu} cannot be read: {error}. Delete {path} "
            "(`tilewise tune --forget` does it) or tune again"
        ) from None
    table = UserTable(path, {}, [])
    for key, row in rows.items():
        reason = why_not_here(row, gpu, arch, fits)
        if reason is None:
            table.applied[key] = row
        else:
            table.refused.append((row, reason))
    return table


def why_not_here(row: Row, gpu: str, arch: str, fits: Callable[[Row], bool]) -> str | None:
    """Why a stored row does not apply to this GPU, compiler and kernels; None if it does."""
    evidence = row.evidence
    if evidence.gpu != gpu or row.arch != arch:
        return f"tuned on {evidence.gpu} ({row.arch}), and this is {gpu} ({arch})"
    if evidence.triton != triton.__version__:
        return f"tuned with Triton {evidence.triton}, and {triton.__version__} runs"
    if evidence.kernels != kernels_hash():
        return "tuned with another version of tilewise's kernels"
    if not fits(row):
        return f"too large for {arch}"
    return None
