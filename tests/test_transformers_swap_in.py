"""`examples/swap_in.py`: the same similarities as the demo and the same losses as "eager"; that a difference
is found; mistakes."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from harness.examples import EXAMPLES, run_python
from tilewise.demo.measure import similarities
from tilewise.demo.model import load_config, load_weights, model_folder, pad, split_into_pieces
from tilewise.demo.text import read_text
from tilewise.demo.torch_encoder import torch_embeddings

ATTENTION = importlib.import_module("tilewise.integrations.transformers.attention")
TWO = ["The cat curled up on the sofa.", "A kitten was napping."]


@pytest.fixture
def swap_in(tmp_path, monkeypatch):
    """Run the command in this process, on plain PyTorch: swap_in("--steps", 3) -> the result."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("tilewise.plan.implementation.INTERPRETED", False)
    command = importlib.import_module("swap_in.command")
    monkeypatch.setattr(command, "INTERPRETED", False)
    return lambda *given: CliRunner().invoke(command.app, [str(argument) for argument in given])


def test_as_it_stands(tmp_path):
    """The demo's sentences are as alike as the demo says, and fifty losses stand beside those of "eager"."""
    done = run_python(EXAMPLES / "swap_in.py", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tilewise and Transformers' own attention agree" in done.stdout
    assert "the CPU, where plain PyTorch computes" in done.stdout
    assert (tmp_path / "swap-in" / "losses.png").read_bytes().startswith(b"\x89PNG")

    sentences = read_text([], None, "utf-8").sentences
    folder = model_folder()
    config = load_config(folder)
    ids, lengths = pad(split_into_pieces(folder, sentences, config.max_pieces), "cpu")
    cosine = similarities(torch_embeddings(config, load_weights(folder), ids, lengths))["cosine"]
    printed = done.stdout.split("cosine: e")[1].split("most alike")[0]
    rows = re.findall(r"^ *(\d+)((?: +-?\d\.\d\d)+) *$", printed, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, len(sentences) + 1))
    shown = torch.tensor([[float(cell) for cell in row.split()] for _, row in rows], dtype=torch.float64)
    assert ((shown - cosine).abs() <= 0.005 + 1e-5).all()  # two digits

    lines = re.findall(r"(\d+)\W+(\d\.\d{6})\W+(\d\.\d{6})", done.stdout)
    assert [int(step) for step, *_ in lines] == [1, *range(5, 51, 5)]
    assert float(lines[-1][1]) < float(lines[0][1]) - 1  # it learns


def test_a_difference_is_found_in_the_sentences(swap_in, monkeypatch):
    right = ATTENTION.attention
    monkeypatch.setattr(ATTENTION, "attention", lambda *q, **given: 3 * right(*q, **given))
    result = swap_in(*TWO, "--steps", 2)
    assert result.exit_code == 1 and "the embeddings DO NOT AGREE" in result.output
    assert "A kitten was napping." in result.output


def test_a_difference_is_found_in_the_losses(swap_in, monkeypatch):
    """A wrong gradient, which no forward shows."""
    right = ATTENTION.attention

    def half_a_gradient(q, k, v, **given):
        return right(q, k, (v + v.detach()) / 2, **given)

    monkeypatch.setattr(importlib.import_module("swap_in.command"), "embeddings", lambda *_: torch.eye(2))
    assert swap_in(*TWO, "--steps", 4, "--out", "elsewhere").exit_code == 0
    assert Path("elsewhere/losses.png").exists()
    monkeypatch.setattr(ATTENTION, "attention", half_a_gradient)
    result = swap_in(*TWO, "--steps", 4)
    assert result.exit_code == 1 and "the losses DO NOT AGREE" in result.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--device", "tpu"], "swap_in: --device tpu must be auto, cpu or cuda"),
        (["--text", "nowhere.txt"], "cannot read the text nowhere.txt"),
        (["--steps", 0], "--steps"),
    ],
)
def test_requests_that_cannot_be_met(swap_in, arguments, words):
    result = swap_in(*TWO, *arguments)
    assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output


def test_a_missing_extra(tmp_path):
    code = f"import runpy, sys; sys.path.insert(0, {str(EXAMPLES)!r}); sys.modules['transformers'] = None\n"
    code += "runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run_python("-c", code, EXAMPLES / "swap_in.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "swap_in: transformers is not installed: pip install '.[transformers,demo]'"
    )
    assert done.stderr.count("\n") == 1
