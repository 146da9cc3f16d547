"""What a call costs the host, measured without a GPU: that it runs, and what it says where it cannot."""

import os
import shutil
import subprocess
import sys

NO_COMPILER = "there is no cc on the PATH"
ONCE = "from bench import host_without_gpu as host; host.ROUNDS = host.TIMES = 1; host.main({names})"


def run(names, **environment):
    command = [sys.executable, "-c", ONCE.format(names=names)]
    given = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.run(command, env=given, capture_output=True, text=True)


def test_a_call_is_measured():
    found = run(["forward"])
    if shutil.which("cc") is None:
        assert NO_COMPILER in found.stderr
        return
    assert found.returncode == 0, found.stderr
    head, *rows = found.stdout.splitlines()
    assert head.split()[-5:] == ["long", "way", "repeated", "sdpa", "ratio"]
    ((name, *numbers),) = [row.split() for row in rows]
    assert name == "forward" and len(numbers) == 4 and all(float(each) > 0 for each in numbers)


def test_what_is_missing_is_said():
    found = run([], PATH="")
    assert found.returncode == 1 and NO_COMPILER in found.stderr and "Traceback" not in found.stderr
    found = run([], TRITON_INTERPRET="1")
    assert found.returncode == 1 and "nothing is launched" in found.stderr
