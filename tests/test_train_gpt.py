"""`examples/train_gpt.py`: agreement, and that it is checked; checkpoints and interruption; mistakes."""

import csv
import importlib
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from typer.testing import CliRunner

import tilewise.nn.core
from harness.examples import EXAMPLES, SOURCES, run_python

TINY = ["--device", "cpu", "--dtype", "fp32", "--steps", 25, "--batch", 4, "--length", 24, "--width", 32]
TINY += ["--layers", 1, "--heads", 2, "--interpreter-steps", 0, "--sample-length", 20]
OUTPUTS = ["checkpoint.pt", "losses.csv", "losses.png", "losses.svg", "sample.txt"]

# Runs the script as it is, but for a Ctrl-C in the middle of step 7.
INTERRUPTED = """
import os, runpy, signal, sys
from train_gpt.training import Run

step = Run.step
def interrupted(run, corpus):
    step(run, corpus)
    if len(run.losses) == 7 and signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        os.kill(os.getpid(), signal.SIGINT)
Run.step = interrupted
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with the results of a whole tiny run, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_python(EXAMPLES / "train_gpt.py", *TINY, "--out", "out", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done.stdout


@pytest.fixture
def train_gpt(tmp_path, monkeypatch):
    """Run the command in this process, in an empty folder: train_gpt("--seed", 1) -> the result."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    command = importlib.import_module("train_gpt.command")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def invoke(*arguments):
        return CliRunner().invoke(command.app, [str(argument) for argument in [*TINY, *arguments]])

    yield invoke
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read_losses(folder):
    with (folder / "losses.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def words_of(result):
    """What was printed, without line breaks."""
    return " ".join(result.output.split())


# ---- A whole run


def test_outputs(uninterrupted):
    out, printed = uninterrupted
    printed = " ".join(printed.split())
    assert sorted(os.listdir(out)) == OUTPUTS
    assert "tilewise and sdpa agree: over the first 20 steps" in printed
    assert "on the held-out tail: 2.4" in printed and "by bigram counts, which see one character" in printed
    rows = read_losses(out)
    control = max(abs(float(row["control"]) - float(row["sdpa"])) for row in rows[:20])
    assert "sdpa is PyTorch's scaled_dot_product_attention" in printed
    assert "a third model, the control, trained with PyTorch's own attention too" in printed
    assert (
        f"its losses came to be {control:.1e} from sdpa's" in printed
        and "Allowed is 10 times that" in printed
    )
    assert [int(row["step"]) for row in rows] == list(range(25))
    for row in rows[:20]:
        assert float(row["tilewise"]) == pytest.approx(float(row["sdpa"]), rel=1e-5)
    assert rows[19]["control"] and not rows[20]["control"]
    assert float(rows[0]["tilewise"]) > 4.2 > 3.5 > float(rows[-1]["tilewise"])
    assert (out / "sample.txt").read_text().startswith("It is a truth")
    assert len((out / "sample.txt").read_text()) == len("It is a truth") + 20 + 1
    picture = imread(out / "losses.png")
    assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.1
    assert "<svg" in (out / "losses.svg").read_text()[:1000]


def test_the_picture_shows_losses_that_are_equal(train_gpt):
    """A logarithmic axis alone has no place for a distance of 0, which most steps have."""
    compare = importlib.import_module("train_gpt.compare")
    figures = importlib.import_module("train_gpt.figures")
    sdpa = [4.0, 3.0, 2.0, 1.5]
    losses = {"sdpa": sdpa, "tilewise": [4.0, 3.0, 2.0 + 2e-6, 1.5], "control": [4.0, 3.0 + 1e-6]}
    runs = {name: SimpleNamespace(losses=found) for name, found in losses.items()}
    comparison = compare.compare(runs["tilewise"].losses, sdpa, runs["control"].losses, "fp32")
    axes = Figure().add_subplot()
    figures.draw_gap(axes, runs, comparison)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[0] == "tilewise and sdpa" and legend[2] == "allowed over the first 2 steps"
    assert "sdpa with every result moved by up to one rounding" in legend[1]
    (tilewise, control, allowed) = axes.lines
    assert list(tilewise.get_ydata()) == pytest.approx([0, 0, 2e-6, 0]) and len(control.get_ydata()) == 2
    assert allowed.get_ydata()[0] == pytest.approx(1e-5)
    heights = axes.transAxes.inverted().transform(axes.transData.transform(tilewise.get_xydata()))[:, 1]
    assert (heights[[0, 1, 3]] == pytest.approx(heights[0])) and 0.02 < heights[0] < heights[2] - 0.2
    assert 0 in axes.get_yticks() and axes.get_ylim()[1] < 1e-4


def test_help_says_what_the_control_is(train_gpt):
    said = words_of(train_gpt("--help"))
    assert (
        "the control: it trains with PyTorch's own attention too, but with every result moved at random"
        in said
    )
    assert "how far two right runs can drift apart" in said and '"sdpa" for short' in said
    assert "[default: 24; on a GPU 64]" in said


def test_the_allowed_distance_is_the_controls_or_a_roundings(train_gpt):
    compare = importlib.import_module("train_gpt.compare").compare
    rounding = 2 * torch.finfo(torch.float32).eps
    for moved, measure in ((1e-5, 1e-5), (0.0, rounding)):
        for dtype, factor in (("fp32", 10), ("bf16", 4)):
            found = compare([2.0, 2.0], [2.0, 2.0], [2.0, 2.0 + moved], dtype)
            assert found.allowed == pytest.approx(factor * measure) and found.agrees


@pytest.mark.parametrize("options", [["--dtype", "bf16"], ["--dropout", 0.2]])
def test_agreement_in_bf16_and_with_dropout(train_gpt, options):
    result = train_gpt(*options)
    assert result.exit_code == 0, result.output
    assert "tilewise and sdpa agree" in words_of(result)


def test_one_implementation_alone(train_gpt):
    result = train_gpt("--implementation", "sdpa", "--temperature", 0.5, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "agree" not in result.output and "the model trained with sdpa" in words_of(result)
    assert sorted(os.listdir("train-gpt")) == OUTPUTS


def test_a_tiny_model_through_the_kernels(train_gpt):
    result = train_gpt("--steps", 2, "--interpreter-steps", 2)
    assert result.exit_code == 0, result.output
    assert "a tiny model's kernels in Triton's interpreter and plain PyTorch agree" in words_of(result)


# ---- An attention that is wrong is found

# Run by Python as it starts, in the process with the interpreter.
WRONG_KERNEL = """
from tilewise.nn import core

attention = core.attention
core.attention = lambda q, k, v, **options: attention(q, k.detach(), v, **options)
"""


def scaled(attention, q, k, v, **options):
    return 1.001 * attention(q, k, v, **options)


def without_key_gradient(attention, q, k, v, **options):
    return attention(q, k.detach(), v, **options)


def with_a_weak_value_gradient(attention, q, k, v, **options):
    return attention(q, k, 0.99 * v + 0.01 * v.detach(), **options)


def looks_ahead(attention, q, k, v, **options):
    return attention(q, k, v, **options | {"mask": None})


@pytest.mark.parametrize("wrong", [scaled, without_key_gradient, with_a_weak_value_gradient, looks_ahead])
def test_planted_errors_are_found(train_gpt, monkeypatch, wrong):
    attention = tilewise.nn.core.attention
    monkeypatch.setattr(tilewise.nn.core, "attention", lambda *a, **o: wrong(attention, *a, **o))
    result = train_gpt("--steps", 20)
    assert result.exit_code == 1, result.output
    assert "train_gpt: tilewise and sdpa DO NOT AGREE: over the first 20 steps" in words_of(result)


def test_planted_errors_in_the_interpreter_are_found(train_gpt, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(WRONG_KERNEL)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), SOURCES]))
    result = train_gpt("--steps", 2, "--interpreter-steps", 3)
    assert result.exit_code == 1, result.output
    assert "tilewise and sdpa agree" in words_of(result)
    assert "Triton's interpreter and plain PyTorch DO NOT AGREE: over the first 3 steps" in words_of(result)


def test_a_loss_that_is_not_a_number(train_gpt):
    result = train_gpt("--lr", 1e30)
    assert result.exit_code == 1, result.output
    assert "train_gpt: tilewise: the loss of step 1 is nan" in words_of(result)


# ---- Checkpoints


def test_resumed_is_as_uninterrupted_bit_for_bit(uninterrupted, tmp_path):
    arguments = [EXAMPLES / "train_gpt.py", *TINY, "--out", "out"]
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); sys.argv = sys.argv[1:]\n{INTERRUPTED}"
    first = run_python("-c", code, *arguments, cwd=tmp_path)
    assert first.returncode == 130, first.stdout + first.stderr
    assert "interrupted: step 7 of 25 is saved" in first.stderr
    assert "--resume --out out" in first.stderr and "Traceback" not in first.stderr
    assert os.listdir(tmp_path / "out") == ["checkpoint.pt"]

    second = run_python(
        EXAMPLES / "train_gpt.py", "--resume", "--interpreter-steps", 0, "--out", "out", cwd=tmp_path
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert "going on after step 7 of 25" in second.stdout
    assert read_losses(tmp_path / "out") == read_losses(uninterrupted[0])
    resumed, whole = (torch.load(f / "checkpoint.pt")["runs"] for f in (tmp_path / "out", uninterrupted[0]))
    for variant in ("tilewise", "sdpa", "control"):
        assert resumed[variant]["validation"] == whole[variant]["validation"]
        for name, weight in whole[variant]["model"].items():
            assert torch.equal(resumed[variant]["model"][name], weight), (variant, name)


def test_sigterm_and_what_an_unfinished_run_demands(train_gpt, monkeypatch):
    loop = importlib.import_module("train_gpt.loop")
    validate = loop.Run.validate

    def terminated(run, batches):
        validate(run, batches)
        if len(run.losses) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "validate", terminated)
        assert train_gpt("--implementation", "tilewise").exit_code == 130

    result = train_gpt()
    assert result.exit_code == 2
    assert "train-gpt holds a run that is at step 6 of 25: --resume goes on" in words_of(result)
    result = train_gpt("--resume", "--width", 64)
    assert result.exit_code == 2
    assert "--width 64 does not fit the checkpoint, which has width 32" in words_of(result)
    Path("other.txt").write_text("It is a truth. " * 100)
    result = train_gpt("--resume", "--text", "other.txt")
    assert result.exit_code == 2 and "is of another text than other.txt" in words_of(result)
    assert train_gpt("--fresh", "--steps", 2).exit_code == 0


def test_a_finished_run_is_reported_again_or_replaced(train_gpt, uninterrupted):
    shutil.copytree(uninterrupted[0], "train-gpt")
    result = train_gpt("--resume", "--temperature", 2)
    assert result.exit_code == 0, result.output
    assert "going on after step 25 of 25" in result.output
    assert Path("train-gpt/losses.csv").read_text() == (uninterrupted[0] / "losses.csv").read_text()
    assert Path("train-gpt/losses.svg").read_bytes() == (uninterrupted[0] / "losses.svg").read_bytes()
    assert Path("train-gpt/sample.txt").read_text() != (uninterrupted[0] / "sample.txt").read_text()
    assert train_gpt("--steps", 2).exit_code == 0


def test_a_full_disk_leaves_the_last_checkpoint(train_gpt, monkeypatch):
    assert train_gpt("--steps", 2).exit_code == 0
    before = Path("train-gpt/checkpoint.pt").read_bytes()

    def full(content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    result = train_gpt("--steps", 3)
    assert result.exit_code == 1
    assert "cannot write train-gpt/checkpoint.pt: No space left on device" in words_of(result)
    assert Path("train-gpt/checkpoint.pt").read_bytes() == before
    assert sorted(os.listdir("train-gpt")) == OUTPUTS


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "other"])
def test_a_checkpoint_that_is_none(train_gpt, content):
    Path("train-gpt").mkdir()
    path = Path("train-gpt/checkpoint.pt")
    torch.save({"step": 3}, path) if content == "other" else path.write_bytes(content)
    result = train_gpt("--resume")
    assert result.exit_code == 2
    assert "is not a checkpoint of this program: start over with --fresh" in words_of(result)


# ---- Requests that cannot be met: a message, and exit code 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--implementation", "flash"], "'flash' is not one of 'tilewise', 'sdpa', 'both'"),
        (["--steps", 0], "--steps"),
        (["--text", "missing.txt"], "cannot read the text missing.txt: No such file"),
        (["--text", "."], "cannot read the text .: Is a directory"),
        (["--text", "short.txt"], "too few for texts of 24"),
        (["--text", "latin1.txt"], "the text latin1.txt is not UTF-8"),
        (["--resume"], "--resume: there is no checkpoint.pt in train-gpt"),
        (["--heads", 3], "--width 32 must be a multiple of --heads 3"),
        (["--prompt", "né"], "the text has no character 'é'"),
        (["--prompt", ""], "--prompt must have at least one character"),
        (["--out", "short.txt"], "cannot"),
    ],
)
def test_requests_that_cannot_be_met(train_gpt, arguments, words):
    Path("short.txt").write_text("Too short.")
    Path("latin1.txt").write_bytes("Un café. ".encode("latin-1") * 100)
    result = train_gpt(*arguments)
    assert result.exit_code == 2, result.output
    assert words in words_of(result)
    assert "Traceback" not in result.output
    assert not Path("train-gpt").exists()


def test_a_missing_extra(tmp_path):
    code = f"import runpy, sys; sys.path.insert(0, {str(EXAMPLES)!r}); sys.modules['matplotlib'] = None\n"
    code += "runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run_python("-c", code, EXAMPLES / "train_gpt.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("train_gpt: matplotlib is not installed: pip install '.[demo]'")
    assert done.stderr.count("\n") == 1
