"""Where the examples are, and how one runs from a clone with nothing installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SOURCES = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "reference")])


def run_python(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python process as from a clone with nothing installed, on plain PyTorch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": SOURCES, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=600)
