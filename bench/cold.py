"""How long does the first call take? In a new process whose caches of compiled code are empty.

    python -m bench.cold        with a pickled (implementation, case, device) on stdin: prints JSON

Imports and the GPU's own start are behind the process when its clock starts: what counts is what the
implementation makes ready and compiles until the first result is there.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tilewise.tools.inputs import case_inputs
from tilewise_reference.cases import Case

from .answers import judge_forward
from .implementations import IMPLEMENTATIONS, Implementation
from .results import Row

ROOT = Path(__file__).resolve().parents[1]
# Where Triton, PyTorch's compiler, CUDA's and FlashInfer keep what they compiled.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "FLASHINFER_WORKSPACE_BASE")
PATIENCE = 300.0  # seconds for one process


def sample_cold_start(
    implementation: Implementation, case: Case, row: Row, device: torch.device, seconds: float, most: int
) -> None:
    """Start processes until the seconds are spent, one at least and `most` at most; fill the row in.

    Raises RuntimeError with the last line that a process said where it fails.
    """
    began = time.perf_counter()
    while not row.seconds or (len(row.seconds) < most and time.perf_counter() - began < seconds):
        found = first_call(implementation.name, case, device)
        row.error, row.torch_error, row.allowed_error = found["error"], found["torch_error"], found["allowed"]
        if found["wrong"]:
            row.status, row.reason, row.seconds = "wrong", found["wrong"], []
            return
        row.seconds.append(found["seconds"])


def first_call(name: str, case: Case, device: torch.device) -> dict[str, Any]:
    """Seconds of one first call, and how right it was."""
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {cache: str(Path(empty) / cache.lower()) for cache in CACHES}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
        done = subprocess.run(
            [sys.executable, "-m", "bench.cold"],
            input=pickle.dumps((name, case, str(device))),
            capture_output=True,
            timeout=PATIENCE,
            cwd=ROOT,
            env=environment,
        )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(said[-1] if said else f"the process ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    name, case, where = pickle.load(sys.stdin.buffer)
    implementation, device = IMPLEMENTATIONS[name], torch.device(where)
    reason = implementation.unavailable(device)  # imports its library
    if reason is not None:
        raise SystemExit(reason)
    inputs = case_inputs(case, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.matmul(inputs.q, inputs.q.mT[..., :16])  # starts the GPU and PyTorch's libraries
    wait()
    with torch.no_grad():
        began = time.perf_counter()
        prepared = implementation.prepare(case, inputs, "forward")
        prepared.call()
        wait()
        seconds = time.perf_counter() - began
        judgement = judge_forward(implementation, case, inputs, prepared)
    print(json.dumps(judgement._asdict() | {"seconds": seconds}))


if __name__ == "__main__":
    main()
