"""Planted bugs: do the tests catch them? One-line mutations of the package, each run against a few tests.

    PYTHONPATH=tests python -m harness.mutate                 every mutation of mutations.py
    PYTHONPATH=tests python -m harness.mutate --only NAME     one of them; may be given several times
    PYTHONPATH=tests python -m harness.mutate --list          names, files and tests
    PYTHONPATH=tests python -m harness.mutate --in-turns      every fourth one, in four days all

Each worker has a copy of the tree. All chosen tests must pass there unmutated: a failing test catches
nothing. Then, a mutation at a time, the line is changed, its tests run, and the line is put back.

    caught     a test failed, as it should, or crashed, or hung until the time limit
    SURVIVED   all of its tests passed: the bug could ship
    STALE      `old` does not occur exactly once in the file: the mutation must follow the code
    BROKEN     pytest could not run the tests, so nothing is known: a syntax error, or tests that are gone

Exit status 1 unless every mutation was caught.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode

from .mutation import Mutation
from .mutations import MUTATIONS
from .turns import DAYS, VARIABLE, has_its_turn, today

ROOT = Path(__file__).resolve().parents[2]
COPIED = (".ci", "kernels", "reference", "tests", "bench", "pyproject.toml", "LICENSE")


@dataclass(frozen=True)
class Outcome:
    mutation: Mutation
    status: str  # caught, SURVIVED, STALE or BROKEN
    detail: str
    seconds: float


def copy_tree(root: Path, target: Path) -> Path:
    """What the tests need of the project, and its bytecode, each file's for the very text that it has: by its
    time, bytecode can outlive a change made within a second."""
    unwanted = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=unwanted)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
    for name in COPIED:
        if (target / name).is_dir():
            compileall.compile_dir(target / name, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return target


class Runner:
    """Runs pytest on a tree, each time in a fork of a process that has imported what all runs need."""

    def __init__(self, tree: Path) -> None:
        self.tree, self.log = tree, tree.parent / f"{tree.name}.log"
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        environment.setdefault(VARIABLE, today())  # not everything because a kernel has changed: it has a bug
        command = [sys.executable, str(Path(__file__).with_name("forked.py"))]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def __call__(self, tests: Iterable[str], timeout: float) -> tuple[int | str, str]:
        """The exit code (or "timeout") and the output of these tests, up to the first failure."""
        arguments = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
        request = dict(tree=str(self.tree), arguments=arguments, log=str(self.log), timeout=timeout)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline()), self.log.read_text(errors="replace")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def occurrences(mutation: Mutation, tree: Path = ROOT) -> int:
    """How often what it replaces occurs in its file."""
    file = tree / mutation.file
    return file.read_text().count(mutation.old) if file.exists() else 0


def try_mutation(run: Runner, mutation: Mutation, timeout: float) -> tuple[str, str]:
    """Status and detail of one mutation; the tree is as before afterwards."""
    if (found := occurrences(mutation, run.tree)) != 1:
        return "STALE", f"{mutation.file} contains {mutation.old!r} {found} times, not once"
    file = run.tree / mutation.file
    source = file.read_text()
    file.write_text(source.replace(mutation.old, mutation.new))
    try:
        code, output = run(mutation.tests, timeout)
    finally:
        file.write_text(source)
    if code == "timeout":
        return "caught", f"no end within {timeout:.0f} s"
    if code == 0:
        return (
            "SURVIVED",
            f"{mutation.old!r} -> {mutation.new!r} in {mutation.file}: {' '.join(mutation.tests)}",
        )
    if code == 1:
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.M)
        return "caught", failed[1] if failed else ""
    if code < 0:
        return "caught", f"killed by signal {-code}"
    return "BROKEN", output[-1500:]


def check_unmutated(run: Runner, mutations: Sequence[Mutation]) -> None:
    """Exit unless every test that a mutation names passes on the code as it is."""
    code, output = run(sorted({test for mutation in mutations for test in mutation.tests}), 3600)
    if code:
        sys.exit(f"The tests fail without any mutation:\n{output}")


def run_mutations(
    mutations: Sequence[Mutation],
    root: Path = ROOT,
    workers: int = 2,
    timeout: float = 300,
    tests_pass: bool = False,
) -> list[Outcome]:
    """Try each mutation and print its outcome as soon as it is known; `timeout` seconds for each. tests_pass:
    the tests are known to pass on the code as it is."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch, ThreadPoolExecutor(workers) as pool:
        runners: queue.Queue[Runner] = queue.Queue()
        for worker in range(workers):
            runners.put(Runner(copy_tree(root, Path(scratch) / str(worker))))

        def job(mutation: Mutation) -> Outcome:
            run, began = runners.get(), time.perf_counter()
            try:
                status, detail = try_mutation(run, mutation, timeout)
            finally:
                runners.put(run)
            return Outcome(mutation, status, detail, time.perf_counter() - began)

        if not tests_pass:
            print("The tests without any mutation ...", flush=True)
            check_unmutated(runners.queue[0], mutations)
        width = max(len(mutation.name) for mutation in mutations)
        for future in as_completed([pool.submit(job, mutation) for mutation in mutations]):
            outcome = future.result()
            outcomes.append(outcome)
            print(
                f"[{len(outcomes):2}/{len(mutations)}] {outcome.mutation.name:{width}}  {outcome.status:8} "
                f"{outcome.seconds:5.1f} s  {outcome.detail}",
                flush=True,
            )
        for run in list(runners.queue):
            run.close()
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m harness.mutate", description="Do the tests catch these bugs?"
    )
    parser.add_argument("--list", action="store_true", help="show the mutations and run nothing")
    parser.add_argument("--only", action="append", metavar="NAME", help="run this mutation; may be repeated")
    parser.add_argument(
        "--tests-pass",
        action="store_true",
        help="do not run the tests without any mutation first: they passed",
    )
    parser.add_argument(
        "--in-turns",
        action="store_true",
        help="every fourth mutation, in four days all, by TILEWISE_TURN (harness/turns.py); those that are "
        "stale every day",
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at a time (default 2)")
    options = parser.parse_args(argv)

    names = [mutation.name for mutation in MUTATIONS]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}; --list shows the names")
    chosen = [mutation for mutation in MUTATIONS if not options.only or mutation.name in options.only]
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name}\n    {mutation.file}: {mutation.old!r} -> {mutation.new!r}")
            print("".join(f"    {test}\n" for test in mutation.tests), end="")
        return 0
    if options.in_turns:
        days = [f"in {day} days" for day in range(DAYS)]
        chosen = [
            mutation
            for i, mutation in enumerate(chosen)
            if has_its_turn(i, days[0], days) or occurrences(mutation) != 1
        ]
    outcomes = run_mutations(chosen, workers=options.workers, tests_pass=options.tests_pass)
    missed = [outcome for outcome in outcomes if outcome.status != "caught"]
    print(f"\n{len(outcomes) - len(missed)} of {len(outcomes)} mutations caught.")
    for outcome in missed:
        print(f"{outcome.status:8} {outcome.mutation.name}: {outcome.detail}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
