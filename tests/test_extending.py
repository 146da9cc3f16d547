"""What is missing of a mask, a score, a tile or a rival that somebody adds?

docs/extending.md lists the steps; each message here names the one that was left out.
"""

from __future__ import annotations

import ast
import functools
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from test_data import masks_with_unseen_keys

import tilewise
from bench.implementations import IMPLEMENTATIONS
from bench.report.style import LOOKS
from harness.features import build, of_kind
from harness.oracle import kept_pairs
from harness.problem import Problem, request_of
from harness.variants import COMBINATIONS
from tests.bench.stand_ins import MODULES

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
# Not for callers: what `&` builds, and what the scale, the similarity and the scales of fp8 become.
INTERNAL = {"All", "Scale", "Normalised", "Descaled", "OwnBias"}


@functools.cache
def classes(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Every class in a folder by name, imported or not: its file, and the names of its bases."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                found[node.name] = (file.relative_to(ROOT), bases)
    return found


def descendants(folder: str, base: str) -> dict[str, Path]:
    """The classes that derive from `base` and that nothing derives from, with their files."""
    known = classes(ROOT / folder)

    def derives(name: str) -> bool:
        return any(each == base or derives(each) for each in known.get(name, (None, []))[1])

    parents = {each for _, bases in known.values() for each in bases}
    return {name: known[name][0] for name in known if derives(name) and name not in parents}


MASKS = descendants("kernels/tilewise", "Mask").keys() - INTERNAL
SCORES = descendants("kernels/tilewise", "Score").keys() - INTERNAL
PARTS = sorted(MASKS | SCORES)
RIVALS = descendants("bench/implementations", "Implementation")


def problems(kind: str) -> Iterator[Problem]:
    """A few small problems for each feature of a kind, with one query tile's worth of rows."""
    for feature in of_kind(kind):
        for seed in range(6):
            sizes = dict(q_len=12, kv_len=17, batch=2, q_heads=2, kv_heads=2)
            yield build(CPU, random.Random(f"{feature} {seed}"), [feature], **sizes)


def made(kind: str) -> dict[str, list[tuple[object, Problem]]]:
    """The masks or scores that the features make, by class, each with its problem."""
    found: dict[str, list[tuple[object, Problem]]] = {}
    for problem in problems(kind):
        request = request_of(*problem.tensors(), **problem.keywords())
        for part in request.masks if kind == "mask" else request.scores:
            found.setdefault(type(part).__name__, []).append((part, problem))
    return found


MADE = {**made("score"), **made("mask")}


def objects(name: str) -> list[tuple[object, Problem]]:
    """Those that the features make of a class, each with its problem."""
    kind = "mask" if name in MASKS else "score"
    assert name in MADE, (
        f'no feature makes a {name}: add a function with @feature("{kind}", "`{name}`") to '
        "tests/harness/features.py, which adds one to the problem"
    )
    return MADE[name]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


# ---- A mask, a score


@pytest.mark.parametrize("name", PARTS)
def test_it_can_be_reached(name):
    assert name in tilewise.__all__, f"import {name} in kernels/tilewise/__init__.py and name it in __all__"


@pytest.mark.parametrize("name", PARTS)
def test_the_tests_draw_it(name):
    assert len(objects(name)) >= 6


@pytest.mark.parametrize("kind", ["mask", "score"])
def test_it_is_compiled_ahead_of_time(kind):
    compiled = {name for features in COMBINATIONS for name in features}
    missing = [feature.name for feature in of_kind(kind) if feature.name not in compiled]
    assert not missing, f"put {missing} into a row of COMBINATIONS in tests/harness/variants.py"


@pytest.mark.parametrize("name", PARTS)
def test_it_is_on_the_pages(name):
    is_listed = f"| `{name}" in page("masks_and_scores.md")
    assert is_listed, f"docs/masks_and_scores.md needs a row for `{name}` in the table of what there is"
    has_reference = re.search(rf"^::: tilewise\.{name}$", page("api.md"), re.M) is not None
    assert has_reference, f"docs/api.md needs the line `::: tilewise.{name}`"


@pytest.mark.parametrize("name", PARTS)
def test_it_has_its_specification(name):
    """Everything that tools and plain PyTorch ask of it, on every object that the features make."""
    base = tilewise.Mask if name in MASKS else tilewise.Score
    cls = type(objects(name)[0][0])
    for method in ("bind", "twin"):
        assert getattr(cls, method) is not getattr(base, method), f"{name} defines no {method}()"
    for part, _ in objects(name):
        listed, held = set(part.FIELDS), {key for key in vars(part) if key != "_twin"}
        assert listed == held, f"{name}.FIELDS lists {sorted(listed)}, and the object holds {sorted(held)}"
        own = {key: value for key, value in vars(part).items() if isinstance(value, torch.Tensor)}
        read = {id(tensor) for tensor in part.tensors().values()}
        forgotten = [key for key, tensor in own.items() if id(tensor) not in read]
        assert not forgotten, f"{name}.tensors() leaves out {forgotten}"


@pytest.mark.parametrize("name", sorted(MASKS))
def test_a_mask_says_on_the_host_what_its_interval_says(name):
    for mask, problem in objects(name):
        request = request_of(*problem.tensors(), mask=mask)
        bounds = mask.bounds(request.shape)
        if bounds is None:
            is_users = any(type(leaf) is tilewise.UserMask for leaf in mask.leaves())
            no_interval = mask.bind(request.shape).interval is None or is_users
            assert no_interval, f"{name} has an interval and no bounds(): tools would count every tile"
            continue
        lo, hi, whole = (each.expand(request.shape.scores[:3])[..., None] for each in bounds)
        keys = torch.arange(request.shape.kv_len)
        inside = (lo <= keys) & (keys < hi)
        keep = kept_pairs(request)
        assert not (keep & ~inside).any(), f"{name}.bounds() leaves out keys that its twin keeps"
        assert (keep | ~(inside & whole)).all(), f"{name}.bounds() calls rows whole that its twin does not"


@pytest.mark.parametrize("name", sorted(MASKS))
def test_a_mask_without_gaps_leaves_none(name):
    """Of any rows that stand together, the keys that some of them see stand together."""
    for mask, problem in objects(name):
        if mask.has_gaps:
            continue
        keep = kept_pairs(request_of(*problem.tensors(), mask=mask))
        for first in range(problem.q_len):
            for last in range(first + 1, problem.q_len + 1):
                seen = keep[:, :, first:last].any(2).int()
                starts = (seen.diff(dim=-1) == 1).sum(-1) + seen[..., 0]
                assert (starts <= 1).all(), f"{name}: rows {first}..{last} leave a gap: set has_gaps = True"


@triton.jit
def coverage_kernel(found_ptr, runs_ptr, given_ptr, q_len, args, COVERAGE: tl.constexpr, RUNS: tl.constexpr):
    """What rows 0..15 of the given batch and head see of each run of keys, [16, RUNS]."""
    batch, head, run = tl.load(given_ptr), tl.load(given_ptr + 1), tl.arange(0, RUNS)
    row = tl.minimum(tl.arange(0, 16), q_len - 1)[:, None]
    first, last = tl.load(runs_ptr + run)[None, :], tl.load(runs_ptr + RUNS + run)[None, :]
    found = row * 0 + first * 0 + COVERAGE(row, first, last, batch, head, args)
    tl.store(found_ptr + tl.arange(0, 16)[:, None] * RUNS + run[None, :], found)


@pytest.mark.parametrize("name", sorted(MASKS))
def test_coverage_says_what_the_twin_does(name):
    """Of runs of keys: none and all for sure. Lists of tiles leave out what it says that nobody sees."""
    for mask, problem in objects(name):
        request = request_of(*problem.tensors(), mask=mask)
        bound, keep = mask.bind(request.shape), kept_pairs(request)
        if mask.has_holes:
            assert bound.coverage is not None, (
                f"{name}.has_holes, and bind() gives no coverage to skip them by"
            )
            assert mask.has_gaps, (
                f"{name}.has_holes, so has_gaps must be True: keys in a hole are seen by none"
            )
        if bound.coverage is None:
            continue
        runs = torch.tensor([(a, b) for a in (0, 2, 5, 11) for b in (11, 12, 15, 16)], dtype=torch.int32).T
        for batch in range(problem.batch):
            for head in range(problem.q_heads):
                given = torch.tensor([batch, head], dtype=torch.int32)
                found = torch.full((16, 16), -1, dtype=torch.int32)
                coverage_kernel[(1,)](
                    found,
                    runs.contiguous(),
                    given,
                    problem.q_len,
                    bound.args,
                    COVERAGE=bound.coverage,
                    RUNS=16,
                )
                for i, (first, last) in enumerate(runs.T.tolist()):
                    said, seen = found[: problem.q_len, i], keep[batch, head, :, first : last + 1]
                    assert ((said == 0) <= ~seen.any(1)).all(), (
                        f"{name}'s coverage leaves out keys that are seen"
                    )
                    assert ((said == 2) <= seen.all(1)).all(), (
                        f"{name}'s coverage calls runs seen that are not"
                    )
                    assert said.min() >= 0 and said.max() <= 2


@pytest.mark.parametrize("name", sorted(MASKS))
def test_junk_in_keys_that_a_mask_hides_is_tried(name):
    tried = {type(part).__name__ for mask, _ in masks_with_unseen_keys(CPU).values() for part in mask.parts()}
    assert name in tried, f"add a {name} that hides keys to masks_with_unseen_keys in tests/test_data.py"


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_score_has_its_derivatives(name):
    for score, problem in objects(name):
        shape = request_of(*problem.tensors(), score=score).shape
        indices = torch.meshgrid(*(torch.arange(size) for size in shape.scores), indexing="ij")
        s = torch.randn(shape.scores, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        s.requires_grad_()
        (slope,) = torch.autograd.grad(score.twin(shape)(s, *indices).sum(), s)
        if not torch.equal(slope, torch.ones_like(slope)):
            assert score.bind(shape).derivative is not None, f"{name}.bind() gives no derivative by s"
        floats = {key for key, tensor in score.tensors().items() if tensor.is_floating_point()}
        missing = floats - score.parameters(shape).keys()
        assert not missing, f"{name}.parameters() names no derivative by {sorted(missing)}"


def test_the_oldest_triton_can_read_device_functions():
    """It unpacks no tuple within a tuple. The interpreter, being Python, does, and so does a newer Triton."""
    read = 0
    for file in sorted((ROOT / "kernels" / "tilewise").rglob("*.py")):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or not any(
                ast.unparse(each) == "triton.jit" for each in function.decorator_list
            ):
                continue
            read += 1
            for node in ast.walk(function):
                for target in node.targets if isinstance(node, ast.Assign) else []:
                    nested = [each for each in getattr(target, "elts", []) if isinstance(each, ast.Tuple)]
                    assert not nested, (
                        f"{file.name}, line {node.lineno}: {ast.unparse(target)}: unpack it in two steps"
                    )
    assert read > 100


# ---- A tile


@pytest.mark.parametrize("key", tilewise.tiles.TABLE, ids=lambda key: " ".join(map(str, key)))
def test_a_row_of_the_table_fits_its_chip(key):
    work, arch, element_bytes, dim = key
    if work == "hopper":
        assert arch == "sm_90", f"{key}: Hopper's forward runs on sm_90 alone"
        return
    fits = tilewise.tiles.fits(tilewise.tiles.TABLE[key], arch, element_bytes, dim, work)
    assert fits, f"{key}: the tile needs more shared memory or registers than {arch} has: make it smaller"


def test_every_row_of_the_table_says_what_it_takes():
    rows = tilewise.tiles.load(tilewise.tiles.SHIPPED)
    for key, row in rows.items():
        missing = [
            name for name in ("triton", "registers", "shared_bytes") if not getattr(row.evidence, name)
        ]
        assert not missing, f"{key}: its evidence lacks {missing}: `tilewise inspect` prints them"
        assert row.evidence.gpu or not row.evidence.milliseconds, f"{key}: timed, but on which GPU?"


# ---- A rival


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_is_compared(name):
    known = {type(each).__name__ for each in IMPLEMENTATIONS.values()}
    assert name in known, f"put {name} of {RIVALS[name]} into the list in bench/implementations/__init__.py"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_rival_has_its_look_and_its_stand_in(name):
    assert any(name.startswith(each) for each in LOOKS), f"give {name} a colour in bench/report/style.py"
    module = IMPLEMENTATIONS[name].module
    assert not module or module in MODULES or module.startswith("torch"), (
        f"{name} calls {module}, which is not installed here: write a stand-in for it and put it into "
        "MODULES of tests/bench/stand_ins.py"
    )


# Where a rival is held to float64 through its stand-in: in dense calls, or in packed ones or fp8 alone.
JUDGED = {
    "test_implementations.py": r"^WITH_LIBRARY = (\(.*?\))$",
    "test_packed.py": r"^TAKEN = (\{.*?\})",
    "test_fp8.py": r"^JUDGED = (\(.*?\))",
}


@pytest.mark.parametrize("name", [name for name, each in IMPLEMENTATIONS.items() if each.module])
def test_a_rival_with_a_library_is_judged(name):
    listed: list[str] = []
    for file, names in JUDGED.items():
        (found,) = re.findall(names, (ROOT / "tests" / "bench" / file).read_text("utf-8"), re.M | re.S)
        listed += ast.literal_eval(found)
    assert name in listed, f"add {name!r} to WITH_LIBRARY in tests/bench/test_implementations.py"


@pytest.mark.parametrize("name", [each for each in IMPLEMENTATIONS if not each.startswith("tilewise")])
def test_a_rival_is_on_the_pages(name):
    library = name.split()[0].rstrip(",")
    is_listed = f"| `{library}" in page("benchmarks.md")
    assert is_listed, f"docs/benchmarks.md needs a row for `{library}` in the table of who is compared"
