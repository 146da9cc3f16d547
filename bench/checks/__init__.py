"""Are the answers right on this machine? A fixed set of checks, the most telling first.

They judge by the tests' rule: nothing further from float64 than `tests/harness/oracle.py` allows. On a GPU
they have real sizes; in Triton's interpreter the same functions are tiny, and those that need a GPU are left
out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from tilewise.tools.poison import poisoned_memory

from ..results import Check, CheckStatus
from ..workers import last_lines

TESTS = str(Path(__file__).resolve().parents[2] / "tests")
if TESTS not in sys.path:
    sys.path.append(TESTS)  # before the checks are imported, which import from there

from .accuracy import ACCURACY  # noqa: E402
from .fp8 import FP8  # noqa: E402
from .graphs import GRAPHS  # noqa: E402
from .hopper import HOPPER  # noqa: E402
from .large import LARGE  # noqa: E402
from .trial import NotApplicable, Trial  # noqa: E402

_PORTABLE = (*ACCURACY, *FP8, *GRAPHS, *LARGE)
# By the stage that performs them.
STAGES: dict[str, list[Trial]] = {
    "hopper": HOPPER,
    "correctness": [trial for trial in _PORTABLE if not trial.alone],
    "correctness at size": [trial for trial in _PORTABLE if trial.alone],
}
TRIALS: dict[str, Trial] = {trial.name: trial for found in STAGES.values() for trial in found}


def trials(device: torch.device, stage: str) -> list[str]:
    """The names of a stage's checks for this device, in order."""
    return [trial.name for trial in STAGES[stage] if device.type == "cuda" or not trial.needs_gpu]


def left_out(device: torch.device) -> list[str]:
    """The names of those that this device cannot run."""
    return [name for name, trial in TRIALS.items() if trial.needs_gpu and device.type != "cuda"]


def perform(name: str, device: str, seed: int) -> tuple[list[Check], str]:
    """Run one check. No result and the reason, where it does not apply to this machine after all."""
    began = time.monotonic()
    torch.manual_seed(seed)
    status: CheckStatus = "right"
    try:
        with poisoned_memory():
            detail = TRIALS[name].function(torch.device(device), seed) or ""
        if device != "cpu":
            torch.cuda.synchronize()  # a late failure is this check's, not the next one's
            torch.cuda.empty_cache()  # the processes beside this one need memory too
    except NotApplicable as reason:
        return [], str(reason)
    except AssertionError as wrong:
        status, detail = "wrong", str(wrong) or last_lines(wrong)
    except Exception as failure:
        status, detail = "failed", last_lines(failure)
    return [Check(name, status, time.monotonic() - began, detail)], ""
