"""The ladder: every rung runs and asserts what it says; every exercise can be solved; wrong answers are told
what is wrong with them; and what is counted is what was done."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import tilewise.ladder
from harness.examples import EXAMPLES, ROOT, SOURCES
from harness.gluon import needs_interpreter
from tilewise.ladder import __main__ as command
from tilewise.ladder.counting import counted
from tilewise.ladder.exercises import EXERCISES, check, load

RUNGS = EXAMPLES / "ladder"
SOLUTIONS = Path(__file__).parent / "ladder_solutions"
NAMES = dict(enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), 1))


# ---- The rungs


@pytest.fixture(scope="module")
def ladder():
    """The module that the rungs share."""
    sys.path.insert(0, str(RUNGS))
    import ladder

    yield ladder
    sys.path.remove(str(RUNGS))


@pytest.mark.oldest
@pytest.mark.parametrize("number", EXERCISES)
def test_a_rung_runs(number, ladder, capsys):
    rung = ladder.rung(number)
    title, _, about = rung.__doc__.partition("\n")
    assert Path(rung.__file__).stem == EXERCISES[number].rung and title.startswith(f"{number}. ")
    assert "\nSource  " in about and f"python -m tilewise.ladder check {number}\n" in about
    for path in re.findall(r"(?:kernels|reference|docs)/[\w/.]*\w/?", about):
        assert (ROOT / path).exists(), path
    if triton.knobs.runtime.interpret:
        rung.main()
        assert title in capsys.readouterr().out
    else:  # with its times, and in a child of its own what it counts
        done = subprocess.run([sys.executable, rung.__file__], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and title in done.stdout, done.stderr
        assert number == 3 or " ms" in done.stdout or "for Hopper GPUs" in done.stdout


@needs_interpreter
def test_on_a_gpu_times_are_printed_and_results_judged(ladder, monkeypatch, capsys):
    """On this CPU all but the clock is real."""
    started = []
    monkeypatch.setattr(ladder, "INTERPRETED", False)
    monkeypatch.setattr(ladder, "TIMED", (64, 96))
    monkeypatch.setattr(ladder.subprocess, "run", lambda words, env, check: started.append((words, env)))
    monkeypatch.setattr(ladder.triton.testing, "do_bench", lambda run: (run(), 0.25)[1])
    attention = ladder.rung(5).attention
    ways = {"5 window": attention, "9 by hand": ladder.rung(4).attention}
    masks_of = {"5 window": lambda n: ladder.masks.window(ladder.rung(5).WINDOW, 0, n, n)}
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit, match="there is no GPU, and TRITON_INTERPRET=0: unset it"):
        ladder.climb("file.py", None, ways, masks_of=masks_of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ladder.climb("file.py", None, ways, masks_of=masks_of)
    assert capsys.readouterr().out.splitlines() == [
        "N =     64: 5 window 0.250 ms   9 by hand 0.250 ms",
        "N =     96: 5 window 0.250 ms   9 by hand 0.250 ms",
        "",
    ]
    ((words, environment),) = started
    assert words[1:] == ["file.py"] and environment["TRITON_INTERPRET"] == "1"
    monkeypatch.setattr(ladder, "TIMED", (128,))
    with pytest.raises(AssertionError, match="O is off by up to"):
        ladder.climb("file.py", None, {"no mask": attention})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    ladder.climb("file.py", None, ways, is_for_hopper=True)
    assert "is for Hopper GPUs" in capsys.readouterr().out


def test_rungs_run_by_themselves(tmp_path):
    """From a clone where nothing is installed, whatever the folder; the one on paper without any package."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    for options, file, said in (
        (["-I", "-S"], "03_online_softmax.py", "3000 by the textbook, 1000 online"),
        ([], "01_naive.py", " ms" if torch.cuda.is_available() else "Times need a GPU: none here."),
    ):
        words = [sys.executable, *options, str(RUNGS / file)]
        done = subprocess.run(
            words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


@needs_interpreter
def test_a_wrong_result_is_judged_wrong(ladder):
    given = ladder.problem(40, 40, 40)
    right = ladder.rung(4).attention(*given)
    ladder.judge([right], given)
    wrong = right.clone()
    wrong[39, 63] += 0.01
    with pytest.raises(AssertionError, match=r"O is off by up to 1.*e-02"):
        ladder.judge([wrong], given)


# ---- What is counted


@triton.jit
def some_kernel(x_ptr, y_ptr, IS_TWICE: tl.constexpr):
    at = tl.arange(0, 8)
    x = tl.load(x_ptr + at, at < 5, 0.0)
    if IS_TWICE:
        x = x * tl.load(x_ptr + at, at < 2, 0.0)
    tl.store(y_ptr + at, tl.exp(x), at < 3)
    tl.store(y_ptr + at, tl.exp2(x), at < 4)


@needs_interpreter
@pytest.mark.oldest
def test_bytes_and_operations_of_kernels():
    x, y = torch.ones(8), torch.zeros(8, dtype=torch.float16)
    with counted() as counts:
        some_kernel[2, 1](x, y, IS_TWICE=True)  # two programs, one launch
    assert (counts.asked, counts.read, counts.written) == (2 * 4 * 7, 4 * 5, 2 * 4)
    assert (counts.multiplications, counts.exponentials) == (2 * (8 + 8), 2 * (8 + 8))
    assert counts.programs == 2
    with counted() as counts:
        some_kernel[1, 1](x, y, IS_TWICE=False)
        some_kernel[1, 1](x, y, IS_TWICE=False)  # what a launch has read, the next one reads again
    assert (counts.asked, counts.read, counts.written) == (2 * 4 * 5, 2 * 4 * 5, 2 * 2 * 4)
    assert (counts.multiplications, counts.programs) == (2 * 8, 2)


@needs_interpreter
@pytest.mark.oldest
def test_bytes_and_operations_of_pytorch():
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    with counted() as counts:
        c = a @ b.T  # a view moves nothing
        c *= 2.0
        torch.softmax(c, dim=1)
    assert (counts.read, counts.written) == (4 * (12 + 20 + 15 + 15), 4 * (15 + 15 + 15))
    assert (counts.matmul, counts.multiplications, counts.exponentials) == (2 * 3 * 4 * 5, 15 + 30, 15)
    before = counts.memory
    a @ b.T
    assert counts.memory == before  # it has ended


def test_nothing_is_counted_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), counted():
        pass


# ---- The exercises


@needs_interpreter
@pytest.mark.oldest
@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_can_be_solved(number):
    is_right, said = check(number, load(SOLUTIONS / f"{NAMES[number]}.py"))
    assert is_right and ": right " in said, said


@needs_interpreter
def test_what_is_still_to_do_is_told_kindly():
    for number, each in EXERCISES.items():
        is_right, said = check(number, load(RUNGS / f"{each.rung}.py"))
        assert not is_right and "still to do: exercise() raises NotImplementedError" in said


# Wrong answers: how they differ from the right one, and what is said. Lines of a file are (old, new).
MINUS_INF = 'float("-inf")'
RINGS = "        load_async(x_tiles, [step * 16, 0], full.index(stage), ring.index(stage))\n"
ARRIVES = "        mbarrier.arrive(free.index(stage), count=1)\n"
UNMASKED = (".masked_fill(~mask, 0.0)", "")
AVERAGES = [
    ("return (out_a *", "return (out_a + out_b) / 2, lse_max + torch.log(total)\n    return (out_a *")
]
WRONG = {
    "1 NaN": ([UNMASKED], r"a row without a key: O, row 3.* expected 0, got nan; .* -inf - -inf"),
    "1 mean": ([(MINUS_INF, "-1e9"), UNMASKED], r"row 3.*a finite number stands for -inf"),
    "1 no mask": ([(f".masked_fill(~mask, {MINUS_INF})", ""), UNMASKED], "the mask is ignored"),
    "1 changes": ([("    s = (", "    q *= 1.5\n    s = (")], "argument 0 was changed"),
    "2 NaN": ([(f"tl.where(row_max == {MINUS_INF}, 0.0, row_max)", "row_max")], r"row 1.*nan.*-inf - -inf"),
    "2 stride": (
        [("s.stride(0), W", "n, W")],
        r"rows of 100, 128 apart: what lies 1 beyond the end of row 0",
    ),
    "2 twice": (
        [("    row_sum =", "    s = tl.load(s_ptr + at, inside)\n    row_sum =")],
        r"reads 1536 bytes, 768 expected",
    ),
    "2 no kernel": ([("    softmax_kernel[(m,)]", "    return\n    softmax_kernel[(m,)]")], "no kernel ran"),
    "2 a copy": (
        [("    softmax_kernel[(m,)](s,", "    softmax_kernel[(m,)](s.clone(),")],
        "is left as it is",
    ),
    "3 NaN": ([("if s == -math.inf", "if False")], r"-inf first.*got nan.*-inf is subtracted from -inf"),
    "3 overflow": ([("max(row_max, s)", "0.0")], r"OverflowError.*before the maximum is subtracted"),
    "3 log 0": (
        [(" if row_sum else -math.inf", "")],
        r"-inf and nothing else: raised ValueError.*row_sum = 0",
    ),
    "3 keeps": ([("in scores", "in list(scores)")], r"20000 scores: keeps .* two numbers are enough"),
    "4 pads": ([("keys[None, :] < n, s", "keys[None, :] < n + 64, s")], r"130 keys: O.*keys beyond the end"),
    "4 shapes": (
        [("tl.trans(k)", "k")],
        r"raised InterpreterError in mine.py, line 20: .*equal reduction dim",
    ),
    "4 scale": ([("d**-0.5, D=d", "1.0, D=d")], "the scale 1 / √D is left out"),
    "4 base": ([("tl.log(", "1.5 * tl.log(")], r"lse, row \d+: expected"),
    "4 stores": (
        [("    kernel[", "    (q @ k.T).exp()\n    kernel[")],
        r"memory gives and takes .* are stored",
    ),
    "5 all": ([("min(max(prefix, first_row + rows), n)", "n")], r"\d tiles visited, 1 expected: no row"),
    "5 full": ([("row + 1)", "row + rows)")], r"is called full, but of its key 1: row 0 may not see it"),
    "5 cut": (
        [("range(full_end, end, tile)", "range(0, end, tile)"), ("range(0, full_end, tile)", "range(0)")],
        "is called cut, but every row sees every key",
    ),
    "5 skips": ([("first_row + rows), n)", "first_row), n)")], r"the tile at 0 is skipped, but row 0 may"),
    "6 sign": (
        [("abs(scale) *", "scale *"), ("1.0 if scale >= 0 else -1.0", "1.0")],
        r"scale -6: O, .*; this happens when row_max is the largest product",
    ),
    "6 exp": (
        [
            (
                "tl.exp2(s * factor - new_max[:, None])",
                "tl.exp((s * factor - new_max[:, None]) * 0.69314718056)",
            )
        ],
        r"3 multiplications for each pair, 1 expected",
    ),
    "7 sign": ([("- dlse", "+ dlse")], "dlse has the other sign"),
    "7 ignored": ([("- dlse", "")], "dlse is left out"),
    "7 fp16": ([("do.float() * out.float()", "do * out"), ("(1)", "(1).float()")], "are taken in fp16"),
    "8 NaN": ([(f"torch.where(lse_max == {MINUS_INF}, 0.0, lse_max)", "lse_max")], r"neither side.*got nan"),
    "8 added": ([("lse_max + torch.log(total)", "lse_a + lse_b")], "the two lse are added"),
    "8 average": (AVERAGES, "both weigh the same"),
    "9 one reader": ([("count=2)", "count=1)")], r"STAGES=1.*rules are broken"),
    "9 early": (
        [(ARRIVES, ""), ("        x = ring", f"{ARRIVES}        x = ring")],
        r"broken.*unordered with",
    ),
    "9 in turn": (
        [(RINGS, f"{RINGS}        mbarrier.wait(full.index(stage), phase)\n")],
        r"at most 1 copies were under way at once, 2 expected",
    ),
    "9 twice": (
        [("(steps)", "(2 * steps)"), ("[step * 16", "[step // 2 * 16"), ("result + x", "result + 0.5 * x")],
        r"12288 bytes were asked for, 6144 expected: each tile once",
    ),
    "9 no kernel": ([("@gluon.jit\ndef exercise", "def exercise")], "put @gluon.jit before it"),
}


def edited(number, edits, folder):
    """The exercise of a solution in which (old, new) are replaced."""
    text = (SOLUTIONS / f"{NAMES[number]}.py").read_text()
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    (folder / "mine.py").write_text(text)
    return load(folder / "mine.py")


@needs_interpreter
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(wrong, tmp_path):
    number, (edits, message) = int(wrong[0]), WRONG[wrong]
    is_right, said = check(number, edited(number, edits, tmp_path))
    assert not is_right and re.search(message, said, re.S), said


# Other ways to be right, as edits too.
RIGHT = {
    "3 keeps lse alone": [
        ("    row_max, row_sum = -math.inf, 0.0\n", "    lse = -math.inf\n"),
        ("        new_max = max(row_max, s)\n", "        high, low = max(lse, s), min(lse, s)\n"),
        ("        row_sum = row_sum * math.exp(row_max - new_max) + math.exp(s - new_max)\n", ""),
        ("        row_max = new_max\n", "        lse = high + math.log1p(math.exp(low - high))\n"),
        ("return row_max + math.log(row_sum) if row_sum else -math.inf", "return lse"),
    ],
    "6 scales first": [
        ("s = tl.dot(q, tl.trans(k))", "s = tl.dot(q, tl.trans(k)) * factor"),
        ("1) * factor)", "1))"), ("s * factor - new_max", "s - new_max"), ("abs(scale) *", "scale *"),
        ("1.0 if scale >= 0 else -1.0", "1.0"),
    ],
    "8 a sigmoid": [
        ("torch.exp(lse_a - base), torch.exp(lse_b - base)",
         "(torch.sigmoid(x).nan_to_num(0.0) for x in (lse_a - lse_b, lse_b - lse_a))"),
        ("lse_max + torch.log(total)", "torch.logaddexp(lse_a, lse_b)"),
    ],
}  # fmt: skip


@needs_interpreter
@pytest.mark.parametrize("right", RIGHT)
def test_another_right_answer_passes(right, tmp_path):
    number = int(right[0])
    is_right, said = check(number, edited(number, RIGHT[right], tmp_path))
    assert is_right, said


# ---- The command


@needs_interpreter
def test_the_command_finds_the_file(capsys, monkeypatch, tmp_path):
    solution = SOLUTIONS / "three.py"
    assert command.main(["list"]) == 0 and command.main(["check", "3", str(solution)]) == 0
    assert "5  05_masks_as_ranges.py" in capsys.readouterr().out
    for folder in (ROOT, RUNGS):
        monkeypatch.chdir(folder)
        assert command.main(["check", "3"]) == 1
        assert "exercise 3, lse in one pass: still to do" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("import math")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    for words, said in (
        ([], "03_online_softmax.py is neither in ./examples/ladder nor here: name the file"),
        (["nowhere.py"], "there is no file nowhere.py"),
        (["empty.py"], "empty.py has no function `exercise`"),
        (["broken.py"], "broken.py cannot be imported: ModuleNotFoundError: No module named 'nothing_of"),
    ):
        assert command.main(["check", "3", *words]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        command.main(["check", "10"])
    assert end.value.code == 2


def test_the_command_starts_the_interpreter(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "tilewise.ladder", "check", "2", str(SOLUTIONS / "two.py")]
    environment |= {"PYTHONPATH": SOURCES}
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "exercise 2, a softmax in place: right" in done.stdout, done.stderr


# ---- What is made from the rungs


@needs_interpreter
def test_the_notebook_and_the_table_are_those_of_the_rungs(ladder):
    made = runpy.run_path(str(RUNGS / "build.py"), run_name="build")
    book = json.loads((RUNGS / "ladder.ipynb").read_text(encoding="utf-8"))
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]]
    assert found == made["all_cells"](), "run: python examples/ladder/build.py"
    assert not any(cell.get("outputs") for cell in book["cells"])
    page = (ROOT / "docs" / "ladder.md").read_text(encoding="utf-8")
    assert page == made["page"](), "run: python examples/ladder/build.py"


def test_what_is_not_installed_is_named(ladder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["build.py", "--run"])
    monkeypatch.setitem(sys.modules, "nbclient", None)
    with pytest.raises(SystemExit, match=r"nbclient is not installed: pip install 'tilewise\[notebook\]'"):
        runpy.run_path(str(RUNGS / "build.py"), run_name="__main__")
    for module in [name for name in sys.modules if name.startswith("tilewise.ladder.")]:
        monkeypatch.delitem(sys.modules, module)
        monkeypatch.delattr(tilewise.ladder, module.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(SystemExit, match="numpy is not installed, and Triton's interpreter needs it"):
        command.main(["list"])
