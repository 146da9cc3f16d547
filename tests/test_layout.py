"""Which folder may import which? The path of a call reads downwards, and no two files import each other."""

from __future__ import annotations

import ast
import graphlib
import shutil
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import tilewise
import tilewise_reference

ROOT = Path(__file__).parents[1]
PACKAGE = Path(tilewise.__file__).parent
REFERENCE = Path(tilewise_reference.__file__).parent
SHARED = "tools"  # what the commands share: chips, inputs, poison, words

# Each folder (or lone file), from the bottom up, and what it may import besides its own files.
MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "gluon_emulator": set(),
    "parts": set(),
    "kernels": {"parts", "gluon_emulator"},
    "plan": {"kernels", "parts"},
    "pytorch": {"plan", "kernels", "parts"},
    "api": {"pytorch", "plan", "kernels", "parts"},
    "scaled_dot_product": {"api", "pytorch", "plan", "parts"},
    "packed": {"api", "pytorch", "plan", "parts"},
    "quantized": {"pytorch", "plan", "parts"},
    "joining": set(),
    "cached": {"api", "pytorch", "plan", "parts"},
    "compat": {"cached", "packed", "api", "pytorch", "plan", "parts"},
    "drop_in": {"compat", "scaled_dot_product", "api", "pytorch", "plan", "parts"},
    "nn": {"cached", "api", "parts"},
    "integrations": {"packed", "api", "parts"},
    "distributed": {"joining", "nn", "api", "pytorch", "plan", "kernels", "parts"},
    "demo": {"nn", "api", "parts"},
    "ladder": {"gluon_emulator"},
    SHARED: {"parts"},
    "tools.overlap": {SHARED},
    "tools.compiled": {SHARED, "plan", "kernels", "parts"},
    "tools.explain": {SHARED, "distributed", "pytorch", "plan", "kernels", "parts"},
    "tools.inspect": {SHARED, "tools.compiled", "plan", "version"},
    "tools.tune": {SHARED, "pytorch", "plan", "kernels", "parts"},
    "tools.rank": {SHARED, "tools.compiled", "tools.overlap", "tools.tune", "plan", "kernels", "parts"},
    "tools.doctor": {SHARED, "tools.explain", "drop_in", "api", "plan", "kernels", "parts", "version"},
    "tools.show": {SHARED, "tools.explain", "tools.doctor", "plan", "kernels", "parts"},
    "tools.watch": {
        SHARED,
        "tools.explain",
        "tools.show",
        "tools.overlap",
        "demo",
        "nn",
        "api",
        "pytorch",
        "plan",
        "kernels",
        "parts",
        "version",
    },
    # `import tilewise`
    "": {
        "api",
        "scaled_dot_product",
        "packed",
        "cached",
        "quantized",
        "joining",
        "compat",
        "integrations",
        "drop_in",
        "nn",
        "plan",
        "parts",
        "tools.explain",
        "version",
    },
    "cli": {"demo", "tools.explain", "tools.inspect", "tools.tune", "tools.doctor", "tools.show"},
    "__main__": {"cli"},
}


def module_of(file: Path, package: Path) -> str:
    """The dotted name within the package; "" for the package itself."""
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module: str) -> str:
    """The row of the table that a module belongs to."""
    for length in (2, 1):
        if (name := ".".join(module.split(".")[:length])) in MAY_IMPORT:
            return name
    return module


def imports_of(file: Path, package: Path, modules: set[str]) -> Iterator[str]:
    """Every module of the package that a file imports, also inside functions or for types alone."""
    name = f"{package.name}.{module_of(file, package)}".rstrip(".")
    parent = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), parent)
            found = [f"{source}.{a.name}" if f"{source}.{a.name}" in modules else source for a in node.names]
        yield from (each.partition(".")[2] for each in found if each in modules)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Which modules does each module import?"""
    files = {module_of(file, package): file for file in package.rglob("*.py")}
    modules = {f"{package.name}.{module}".rstrip(".") for module in files}
    return {module: set(imports_of(file, package, modules)) - {module} for module, file in files.items()}


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports that the table does not allow."""
    return [
        f"{module} may not import {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if folder_of(other) not in {folder_of(module), *MAY_IMPORT.get(folder_of(module), ())}
    ]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_imports_go_down_as_the_table_says():
    graph = import_graph(PACKAGE)
    assert len(graph) > 100 and {"parts.masks.causal", "kernels.forward", "plan.checks"} <= graph.keys()
    assert not upward(graph)
    assert {folder_of(module) for module in graph} == MAY_IMPORT.keys(), "a folder without a row"


def test_the_table_itself_has_no_way_up():
    assert not cycle(MAY_IMPORT)


@pytest.mark.parametrize(
    "package",
    [
        PACKAGE,
        REFERENCE,
        ROOT / "bench",
        ROOT / "tests/harness",
        ROOT / "examples/train_gpt",
        ROOT / "examples/generate",
    ],
    ids=lambda package: package.name,
)
def test_no_two_files_import_each_other(package):
    graph = import_graph(package)
    assert any(graph.values()) and not cycle(graph)


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("parts/softmax.py", "from ..plan import tiles", "parts.softmax may not import plan.tiles"),
        ("kernels/forward.py", "from ..api import attention", "kernels.forward may not import api"),
        ("kernels/call.py", "import tilewise.nn", "kernels.call may not import nn"),
        ("tools/chips.py", "from .tune import search", "tools.chips may not import tools.tune.search"),
        (
            "plan/bind.py",
            "def late():\n    from ..pytorch import ops",
            "plan.bind may not import pytorch.ops",
        ),
        ("nn/core.py", "from .. import explain", "nn.core may not import "),  # the package itself
    ],
)
def test_an_upward_import_is_found(file, line, said, tmp_path):
    package = tmp_path / "tilewise"
    shutil.copytree(PACKAGE, package)
    with (package / file).open("a") as source:
        source.write(f"\n{line}\n")
    assert upward(import_graph(package)) == [said]


def test_a_ring_is_found(tmp_path):
    package = tmp_path / "tilewise"
    shutil.copytree(PACKAGE, package)
    with (package / "parts/shape.py").open("a") as source:
        source.write("\nfrom .numerics import widen\n")
    with (package / "parts/numerics.py").open("a") as source:
        source.write("\nfrom .shape import Shape\n")
    assert {"parts.shape", "parts.numerics"} <= set(cycle(import_graph(package)))


def test_the_package_imports_neither_tests_nor_benchmarks():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not {"bench", "tests", "harness"} & {name.partition(".")[0] for name in names}, file
