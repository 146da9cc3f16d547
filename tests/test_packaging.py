"""What a wheel installs, what importing and starting it costs, and what bootstrap.py decides."""

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "tilewise": ROOT / "kernels" / "tilewise",
    "tilewise_reference": ROOT / "reference" / "tilewise_reference",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree as `pip install .` would build it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run(
        [*command, "--no-deps", "--target", str(folder), str(wheel)], check=True, capture_output=True
    )
    return folder


def run_python(arguments: list[str], path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `path` first on its search path, no GPU in sight and TRITON_INTERPRET unset."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    hidden = dict.fromkeys(["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"], "")
    environment |= hidden | {"PYTHONPATH": str(path)} | variables
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=path, capture_output=True, text=True, timeout=600
    )


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_installs_only_our_two_packages(wheel: Path, installed: Path) -> None:
    version = metadata_of(wheel)["Version"]
    ours = {"tilewise", "tilewise_reference", f"tilewise-{version}.dist-info"}
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == ours
    # pip puts the console script into bin/ of a --target folder.
    assert {entry.name for entry in installed.iterdir()} == ours | {"bin"}


@pytest.mark.parametrize("package", sorted(SOURCES))
def test_wheel_holds_every_source_and_data_file(package: str, installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(folder)) for path in found}

    unbuilt = str(Path("tools", "watch", "page", ""))  # what page.html is built from
    expected = {name for name in files(SOURCES[package]) if not name.startswith(f"{unbuilt}{os.sep}")}
    assert "py.typed" in expected
    assert files(installed / package) == expected


def test_wheel_requires_torch_and_triton_and_nothing_else(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(plain) == ["torch>=2.11", "triton>=3.6"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"test", "bench", "demo", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_importing_needs_no_gpu_and_compiles_nothing(wheel: Path, installed: Path, tmp_path: Path) -> None:
    """And the package tells the wheel's version."""
    cache = tmp_path / "triton_cache"
    program = (
        "import torch, tilewise, tilewise_reference\n"
        "print(tilewise.__version__); print(tilewise.__file__); print(tilewise_reference.__file__)\n"
        "assert not torch.cuda.is_available(), 'a GPU is in sight'\n"
        "assert not torch.cuda.is_initialized(), 'importing tilewise started CUDA'\n"
        "import sys\n"
        "late = {'torch._dynamo', 'sympy', 'tilewise.drop_in.switch'} & set(sys.modules)\n"
        "assert not late, f'importing tilewise imported {late}, which take as long as PyTorch'\n"
        "assert type(tilewise.sdpa()).__name__ == 'Region'\n"
    )
    ran = run_python(["-c", program], installed, TRITON_CACHE_DIR=str(cache))
    assert ran.returncode == 0, ran.stderr
    version, *files = ran.stdout.split()
    assert version == metadata_of(wheel)["Version"]
    assert [Path(file).parent for file in files] == [installed / name for name in sorted(SOURCES)]
    assert not cache.exists() or not any(cache.iterdir()), "importing tilewise compiled a kernel"


def test_source_roots_are_not_packages() -> None:
    # Either file would make pytest or a type checker take the folder itself for a package.
    for folder in (ROOT, ROOT / "kernels", ROOT / "reference"):
        for name in ("__init__.py", "conftest.py"):
            assert not (folder / name).exists(), f"{folder / name} must not exist"


def test_command_starts_in_the_interpreter_without_a_gpu_and_says_so(installed: Path) -> None:
    ran = run_python(["-m", "tilewise", "demo", "--file", "nowhere"], installed)
    said = "tilewise: no GPU found: the kernels run in Triton's interpreter, on the CPU\n"
    assert ran.stderr.startswith(said) and "cannot read nowhere" in ran.stderr


HELP = {  # what each must name
    "--help": ("explain", "inspect", "tune", "doctor", "demo"),
    "demo --help": ("Sentences to compare",),
    "tune --help": ("--forget",),
}


def test_help_starts_no_interpreter(installed: Path) -> None:
    program = "import sys; from tilewise.__main__ import main\n"
    program += f"for words in {[*HELP]}:\n    sys.argv = ['tilewise', *words.split()]\n"
    program += (
        "    try:\n        main()\n    except SystemExit as end:\n        print('ended with', end.code)"
    )
    ran = run_python(["-c", program], installed)
    assert (ran.returncode, ran.stderr) == (0, "")
    *told, rest = ran.stdout.split("ended with 0\n")
    assert len(told) == len(HELP) and rest == ""
    for text, names in zip(told, HELP.values(), strict=True):
        assert all(name in text for name in names), text


def test_command_leaves_a_set_interpreter_variable_alone(installed: Path) -> None:
    ran = run_python(["-m", "tilewise", "demo", "--file", "nowhere"], installed, TRITON_INTERPRET="0")
    assert "Triton's interpreter is off" in ran.stderr and "no GPU found" not in ran.stderr


@pytest.mark.parametrize(("missing", "extra"), [("typer", "tools"), ("tokenizers", "demo")])
def test_command_names_the_extra_that_is_missing(missing: str, extra: str, installed: Path) -> None:
    # None in sys.modules makes `import` raise what it raises for a package that is not installed.
    program = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['tilewise', 'demo', 'A sentence.']\n"
    program += "from tilewise.__main__ import main; main()"
    ran = run_python(["-c", program], installed, TRITON_INTERPRET="1")
    assert ran.returncode == 1
    assert ran.stderr == f"tilewise: {missing} is not installed: pip install 'tilewise[{extra}]'\n"


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    """bootstrap.py as a module."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bootstrap_parses_on_an_older_python() -> None:
    # Python 3.7 must get as far as the message that asks for a newer one.
    ast.parse((ROOT / "bootstrap.py").read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.parametrize(
    ("names", "cuda"),
    [
        (["torch", "filelock", "nvidia-cublas"], ["nvidia-cublas"]),
        (["nvidia_nccl_cu13==2.29; platform_system == 'Linux'"], ["nvidia_nccl_cu13"]),
        (["cuda-toolkit[cublas,cudart]==13.0.3", "cuda-bindings<14,>=13"], ["cuda-bindings", "cuda-toolkit"]),
        (["triton", "barracuda", "cudalike"], []),
        # Reads clocks, and is a file of Python; anything whose name only begins like it is not.
        (["nvidia-ml-py>=12.535", "nvidia_ml_py", "nvidia-ml-pylon"], ["nvidia-ml-pylon"]),
    ],
)
def test_bootstrap_knows_cuda_packages(bootstrap: ModuleType, names: list[str], cuda: list[str]) -> None:
    assert bootstrap.cuda_packages(names) == cuda


def test_bootstrap_knows_a_constraint_on_torch(bootstrap: ModuleType) -> None:
    assert all(bootstrap.names_torch(["numpy<2.4", spec]) for spec in ("torch==2.11.0", "torch", "torch <3"))
    assert not bootstrap.names_torch(["triton==3.6.0", "torchvision<1", "torch-geometric==2", "torch.x"])


def pip_that_finds(offers: dict[str, list[str]], brings: dict[str, list[str]], failure: type[Exception]):
    """A stand-in for bootstrap.would_install: `offers` is what torch asks for, `brings` what comes along."""

    def would_install(environment: object, *arguments: str) -> list[dict[str, object]]:
        (torch,) = (argument for argument in arguments if argument.startswith("torch=="))
        if torch not in offers:
            raise failure(f"ERROR: No matching distribution found for {torch}")
        if "--no-deps" in arguments:
            return [{"name": "torch", "requires_dist": offers[torch]}]
        forbidden = Path(arguments[arguments.index("--constraint") + 1]).read_text().split()
        for name in brings[torch]:
            if f"{name}<0" in forbidden:
                raise failure(f"ERROR: No matching distribution found for {name}")
        return [{"name": name} for name in ["torch", *brings[torch]]]

    return would_install


CPU, PLAIN = "torch==2.13.0+cpu", "torch==2.13.0"
LINUX_ONLY = ["filelock", "nvidia-nccl-cu13==2.29; platform_system == 'Linux'"]


@pytest.mark.parametrize(
    ("offers", "brings", "choice"),
    [
        ({CPU: ["filelock"], PLAIN: LINUX_ONLY}, {CPU: ["filelock"]}, CPU),
        # A Mac: no build is called +cpu, and the plain one names CUDA packages, but for another system.
        ({PLAIN: LINUX_ONLY}, {PLAIN: ["filelock"]}, PLAIN),
    ],
)
def test_bootstrap_chooses_a_torch_without_cuda(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, offers: dict, brings: dict, choice: str
) -> None:
    monkeypatch.setattr(bootstrap, "would_install", pip_that_finds(offers, brings, bootstrap.StepFailed))
    assert bootstrap.choose_cpu_torch(None, [], []) == choice


@pytest.mark.parametrize(
    ("offers", "brings", "reason"),
    [
        ({PLAIN: LINUX_ONLY}, {PLAIN: ["nvidia-nccl-cu13"]}, "it asks for CUDA packages (nvidia-nccl-cu13"),
        (
            {PLAIN: ["helper"]},
            {PLAIN: ["helper", "cuda-toolkit"]},
            "CUDA packages come with it (cuda-toolkit",
        ),
        ({}, {}, f"No matching distribution found for {PLAIN}"),
    ],
)
def test_bootstrap_stops_rather_than_pull_cuda(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, offers: dict, brings: dict, reason: str
) -> None:
    monkeypatch.setattr(bootstrap, "would_install", pip_that_finds(offers, brings, bootstrap.StepFailed))
    with pytest.raises(bootstrap.StepFailed) as stopped:
        bootstrap.choose_cpu_torch(None, [], [])
    for part in (CPU, PLAIN, reason, "PIP_EXTRA_INDEX_URL", "--allow-cuda", "retry with"):
        assert part in str(stopped.value)


def test_bootstrap_leaves_a_foreign_environment_alone(bootstrap: ModuleType, tmp_path: Path) -> None:
    keepsake = tmp_path / "keepsake"
    keepsake.write_text("mine")
    with pytest.raises(bootstrap.StepFailed, match=r"bootstrap\.py did not make it"):
        bootstrap.Environment(tmp_path).create({})
    assert keepsake.read_text() == "mine"


@pytest.mark.parametrize("command", ["demo", "test", "bench"])
def test_bootstrap_installs_extras_that_there_are(bootstrap: ModuleType, wheel: Path, command: str) -> None:
    extras, _, _ = bootstrap.COMMANDS[command]
    assert set(extras.split(",")) <= set(metadata_of(wheel).get_all("Provides-Extra"))


def test_bootstrap_bench_runs_where_the_user_is(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`bench` is no part of what is installed: it is found in the tree, and writes where the user is."""
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "theirs")
    environment = bootstrap.Environment(tmp_path)
    monkeypatch.setattr(bootstrap, "set_up_alone", lambda command, options: environment)
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "bench", "evidence", "--out", "results"])
    bootstrap.main()
    ((program, arguments, environ),) = started
    assert arguments == [program, "-m", "bench", "evidence", "--out", "results"]
    assert environ["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "theirs"]
    assert Path.cwd() == tmp_path
