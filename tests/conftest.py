"""What every test starts from: a device, the interpreter where there is no GPU, a seed, poisoned memory."""

import os
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Triton decides how `@triton.jit` runs when it is imported, which happens after this file.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton

HAS_GPU = torch.cuda.is_available()

# The same examples in every run. Shrinking takes minutes in the interpreter, so it is left to a person who
# wants it: `pytest --hypothesis-profile=shrink`.
PLAIN = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
settings.register_profile("plain", PLAIN)
settings.register_profile("shrink", PLAIN, phases=(Phase.explicit, Phase.generate, Phase.shrink))
settings.load_profile("plain")


# The workers of a parallel run fill the cores; more threads in each would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


# The files that test tilewise behind another library, and that library. Where it is missing, as on a machine
# that is lent with a GPU, they are not collected, and the header says so.
NEEDED = {
    "test_transformers*.py": "transformers",
    "test_sdpa_models.py": "timm",
    "test_hub.py": "kernels",
}
collect_ignore = [
    file.name
    for file in Path(__file__).parent.glob("test_*.py")
    for pattern, library in NEEDED.items()
    if fnmatch(file.name, pattern) and find_spec(library) is None
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--also",
        action="append",
        default=[],
        choices=["hopper"],
        help="an implementation that must give every answer too, where it takes the call",
    )


def pytest_configure(config: pytest.Config) -> None:
    from harness import oracle, turns

    oracle.ALSO[:] = config.getoption("also")
    config.addinivalue_line("markers", "in_turns: a sweep, of which a day tries a quarter: harness/turns.py")
    os.environ.setdefault(turns.VARIABLE, turns.due())  # the same for all workers, also about midnight
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[turns.SWEEPS] = "whole" if names_tests(config) or HAS_GPU else "in turns"


def names_tests(config: pytest.Config) -> bool:
    """Whether a run is of tests that somebody named."""
    by_path = config.args_source is pytest.Config.ArgsSource.ARGS
    return by_path or bool(config.option.keyword or config.option.markexpr)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the cases of sweeps for the day that has their turn."""
    from harness import turns

    if os.environ[turns.SWEEPS] == "whole":
        return
    sweeps: dict[str, list[str]] = {}
    for item in items:
        if item.get_closest_marker("in_turns"):
            sweeps.setdefault(item.nodeid.split("[")[0], []).append(item.nodeid)
    left = {case for cases in sweeps.values() for case in {*cases} - turns.whose_turn(cases)}
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left])
        items[:] = [item for item in items if item.nodeid not in left]


def pytest_report_header() -> str:
    if triton.knobs.runtime.interpret:
        where = "Triton's interpreter on the CPU"
    elif torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}, compiled"
    else:
        where = "plain PyTorch on the CPU: TRITON_INTERPRET=0 is set, so tests of the kernel fail"
    header = f"tilewise: torch {torch.__version__}, triton {triton.__version__}, kernels run in: {where}"
    header += f"; kernels compiled for one chip or another by TILEWISE_TURN={os.environ['TILEWISE_TURN']}"
    if os.environ["TILEWISE_SWEEPS"] == "in turns" and os.environ["TILEWISE_TURN"] != "all":
        header += ", as is the quarter of each sweep that runs (TILEWISE_TURN=all: whole sweeps)"
    missing = [library for library in dict.fromkeys(NEEDED.values()) if find_spec(library) is None]
    return f"{header}; without the tests of {', '.join(missing)}, not installed" if missing else header


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    from harness import quick

    with quick.quick_interpreter():
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors live: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    """As torch.manual_seed, which without a GPU takes milliseconds to note what to do should one be there."""
    torch.default_generator.manual_seed(0)
    if HAS_GPU:
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def poison():
    """Fill `torch.empty` with NaN (integers with their largest value), so that a missing write shows in the
    result instead of hiding behind whatever the memory held. PyTorch ties this to its deterministic mode."""
    mode, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as soon as either implementation is reached."""

    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("attention ran")

    monkeypatch.setattr("tilewise.plan.passes.launch_forward", reached)
    monkeypatch.setattr("tilewise.api.run_torch", reached)
