"""What a benchmark run leaves behind: a file of JSON lines, appended as results come; a cut loses none.

The first line says on what machine it ran. Every line names its kind: "machine", "ceilings", "stage", "row",
"check". `load` also reads the JSON of pytest-benchmark, whose `extra_info` carries the same rows.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Work = Literal[
    "forward",
    "backward",
    "double backward",
    "forward mode",
    "max logit",
    "statistics",
    "fp8",
    "quantize",
    "host forward",
    "host forward and backward",
    "cold start",
]
Status = Literal["ok", "wrong", "unsupported", "unavailable", "failed", "left out"]
CheckStatus = Literal["right", "wrong", "failed", "hung", "crashed", "left out", "not applicable"]


@dataclass
class Machine:
    """Where and with what a run was made. On a CPU `gpu` is None, and no time says anything about speed."""

    gpu: str | None
    arch: str | None  # "sm_90"
    driver: str | None
    versions: dict[str, str]  # of python, torch, triton, cuda and of every rival that is installed
    revision: str | None  # of git; ends in "-dirty" where files differ from it
    date: str  # UTC, ISO 8601
    clocks: dict[str, float] = field(default_factory=dict)  # MHz and °C and W, before the first row


@dataclass
class Ceilings:
    """What the machine can do, measured in the same run."""

    copy_bytes_per_second: float | None  # read and written
    matmul_flops_per_second: dict[str, float]  # by dtype, random data


@dataclass
class Row:
    """One implementation's answer to one case: its time and its error, or why it has none."""

    group: str  # "forward grid", "backward grid", "models forward", "features backward", ...
    case: str  # the case's name
    work: Work  # "backward" is timed without the forward, "double backward" without these
    implementation: str  # "tilewise portable", "tilewise hopper", "sdpa cudnn", "flex", ...
    status: Status
    reason: str = ""  # of any status but "ok"
    seconds: list[float] = field(default_factory=list)  # a sample each; of one call
    error: float | None = None  # largest absolute error against float64
    torch_error: float | None = None  # of PyTorch's own computation in the same dtype, same rows
    allowed_error: float | None = None
    flops: int = 0  # of the matmuls over the pairs that count
    bytes: int = 0  # the least that must be read and written; 0 where nobody worked it out (the backward)
    dtype: str = ""
    peak_bytes: int | None = None  # most memory in use beyond what was there before the call
    sizes: dict[str, int] = field(
        default_factory=dict
    )  # batch, q_heads, kv_heads, q_len, kv_len, head_dim, ...; tokens, where sequences are packed

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def key(self) -> tuple[str, str, str]:
        """What rows of different implementations are compared under."""
        return self.group, self.case, self.work


@dataclass
class Check:
    """One correctness check on the machine.

    "failed": it raised; "hung": its process had to be ended; "crashed": its process ended; "left out": what
    it needs was found not to work; "not applicable": the machine lacks what it needs.
    """

    name: str
    status: CheckStatus
    seconds: float
    detail: str = ""  # what was wrong, or, where it is right, how much it looked at

    @property
    def passed(self) -> bool:
        return self.status == "right"

    @property
    def is_bad(self) -> bool:
        """Whether it was made and did not pass."""
        return self.status in ("wrong", "failed", "hung", "crashed")


@dataclass
class Stage:
    """What a run set out to do next, written before it did: how the GPU stood then, and which checks and
    comparisons were left to do, of which fewer may follow where the time ran out."""

    name: str
    jobs: list[str]
    seconds: float  # its share of the time
    seed: int
    date: str  # UTC, ISO 8601
    clocks: dict[str, float] = field(default_factory=dict)  # as in Machine


@dataclass
class Results:
    machine: Machine
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    name: str = ""


Entry = Machine | Ceilings | Stage | Row | Check
KINDS: dict[str, type] = {
    "machine": Machine,
    "ceilings": Ceilings,
    "stage": Stage,
    "row": Row,
    "check": Check,
}


def append(path: Path, *entries: Entry) -> None:
    """Add a line for each, with the system when this returns: the end of this process cannot lose them."""
    lines = []
    for entry in entries:
        kind = next(name for name, cls in KINDS.items() if type(entry) is cls)
        lines.append(json.dumps({"kind": kind, **asdict(entry)}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def mend(path: Path) -> None:
    """Drop a last line that was cut off, so that more can be appended."""
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def load(path: Path) -> Results:
    """Read a file that `append` wrote (a last line that was cut off is left out) or pytest-benchmark's JSON.

    Raises ValueError where the file is neither.
    """
    text = path.read_text(encoding="utf-8")
    try:
        return _collect(path, _of_pytest(json.loads(text)))
    except json.JSONDecodeError:
        pass
    entries, lines = [], text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
    return _collect(path, entries)


def _of_pytest(report: Any) -> list[dict[str, Any]]:
    """The entries within pytest-benchmark's report; a file of one line is one entry."""
    if not isinstance(report, dict) or "benchmarks" not in report:
        return [report]
    machine = report["machine_info"].get("tilewise", {})
    rows = [benchmark["extra_info"].get("row") for benchmark in report["benchmarks"]]
    found: Iterable[dict[str, Any]] = [{"kind": "row", **row} for row in rows if row]
    parts = [{"kind": kind, **machine[kind]} for kind in ("machine", "ceilings") if machine.get(kind)]
    return [*parts, *found]


def _collect(path: Path, entries: list[dict[str, Any]]) -> Results:
    results: Results | None = None
    for entry in entries:
        kind = entry.pop("kind", None) if isinstance(entry, dict) else None
        if kind not in KINDS:
            raise ValueError(f"{path} holds an entry of kind {kind!r}; known: {', '.join(KINDS)}")
        value = KINDS[kind](**entry)
        if isinstance(value, Machine):
            results = results or Results(value, name=path.stem)
        elif results is None:
            raise ValueError(f"{path} does not say first on what machine it was made")
        elif isinstance(value, Ceilings):
            results.ceilings = value
        elif isinstance(value, Stage):
            results.stages.append(value)
        elif isinstance(value, Row):
            results.rows.append(value)
        else:
            results.checks.append(value)
    if results is None:
        raise ValueError(f"{path} is empty")
    return results
