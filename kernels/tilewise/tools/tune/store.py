"""Where do tuned tiles go, and with what evidence? The user's table, its journal, and a table to share."""

from __future__ import annotations

import datetime
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ...kernels.tile import describe
from ...plan.tile_table import Evidence, Key, Row, from_json, load, save, to_json
from ...plan.tiles import architecture, reload_user_tables
from ...plan.user_tiles import cache_folder, kernels_hash, table_path
from .journal import Journal, Subject, read_entries
from .search import Outcome

JOURNAL = ".journal.jsonl"
SMOKE_GPU = "interpreter"  # stands for a GPU and its architecture where there is none


class Where(NamedTuple):
    """What a time was taken on and with."""

    gpu: str
    arch: str
    driver: str | None
    torch: str
    triton: str
    kernels: str

    @property
    def stamp(self) -> str:
        """What must be the same for a time or a failure to count again."""
        return f"{self.gpu}, {self.arch}, triton {self.triton}, kernels {self.kernels}"


def here(device: torch.device) -> Where:
    """This machine; on the CPU the interpreter takes the GPU's place."""
    gpu = arch = SMOKE_GPU
    if device.type == "cuda":
        gpu, arch = torch.cuda.get_device_name(device), architecture(device)
    driver = driver_version() if device.type == "cuda" else None
    return Where(gpu, arch, driver, torch.__version__, triton.__version__, kernels_hash())


def driver_version() -> str | None:
    """NVIDIA's driver, as nvidia-smi tells it; None where it does not."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.split()[0] if said.split() else None


def row_of(outcome: Outcome, where: Where) -> Row:
    """The row that an outcome means, whether it changes the tile or confirms the shipped one."""
    verdict = outcome.verdict
    evidence = Evidence(
        triton=where.triton,
        registers=None if verdict is None else verdict.registers,
        shared_bytes=None if verdict is None else verdict.shared_bytes,
        gpu=where.gpu,
        milliseconds=rounded(outcome.milliseconds),
        before=rounded(outcome.before),
        before_tile=describe(outcome.shipped),
        gain=None if outcome.gain is None else round(outcome.gain, 4),
        samples=outcome.samples,
        over_portable=None if outcome.over_portable is None else round(outcome.over_portable, 4),
        error=None if verdict is None else round(verdict.error, 4),
        torch=where.torch,
        driver=where.driver,
        kernels=where.kernels,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    return Row(*outcome.key, outcome.tile, evidence)


def rounded(milliseconds: dict[str, float]) -> dict[str, float]:
    """To six digits: more are noise."""
    return {case: float(f"{value:.6g}") for case, value in milliseconds.items()}


def journal_of(table: Path) -> Path:
    """The journal that stands beside a table."""
    return table.with_name(table.stem + JOURNAL)


def store(table: Path, journal: Journal, subject: Subject, outcome: Outcome, where: Where) -> None:
    """Put a winner into the user's table; where the shipped tile stays, take out what stood there."""
    rows = load(table) if table.exists() else {}
    found_before = journal.row(subject) if outcome.settled else None
    row = row_of(outcome, where) if found_before is None else from_json(found_before)
    if outcome.winner is not None:
        rows[row.key] = row
    else:
        rows.pop(row.key, None)
    save(table, rows.values())
    reload_user_tables()
    if found_before is None and (outcome.winner is not None or not outcome.problem):
        journal.add("row", subject, data=to_json(row))


def measured_rows(journal: Path) -> tuple[dict[Key, Row], int]:
    """The rows that were timed with the kernels as they are now, winners and confirmed ones, the last of each
    key; and how many were timed with other kernels."""
    entries = [entry for entry in read_entries(journal) if entry["kind"] == "row"]
    rows = {row.key: row for row in (from_json(entry["data"]) for entry in entries)}
    current = {key: row for key, row in rows.items() if row.evidence.kernels == kernels_hash()}
    return current, len(rows) - len(current)


def merge(file: Path, rows: Iterable[Row]) -> None:
    """Write rows into a table: each takes the place of the one with its key, or comes last."""
    table = load(file) if file.exists() else {}
    save(file, (table | {row.key: row for row in rows}).values())


def stored_table(gpu: str | None) -> Path:
    """The table of a GPU; without one, that of the only GPU that something is stored of.

    Raises ValueError where there is none, or more than one.
    """
    if gpu is not None:
        return table_path(gpu)
    folder = cache_folder() / "tiles"
    found = sorted({path.name.removesuffix(JOURNAL).removesuffix(".json") for path in folder.glob("*.json*")})
    if len(found) != 1:
        names = ", ".join(found) or "nothing"
        raise ValueError(f"there is no GPU here, and {folder} holds {names}: one GPU's tiles were expected")
    return folder / f"{found[0]}.json"
