"""`examples/generate.py`: three ways to the same text, and that a difference is found; mistakes."""

import ast
import importlib
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tilewise.nn.kv_cache
import tilewise.nn.paged_kv_cache
from harness.examples import EXAMPLES, run_python

SETTINGS = dict(
    implementation="tilewise", device="cpu", dtype="fp32", steps=8, batch=4, context=24, width=32, layers=2,
    heads=2, lr=3e-2, dropout=0.1, seed=0,
)  # fmt: skip
SHORT = ["--length", 2, "--prompt", "It is", "--prompt", "a", "--prompt", "Mr. Darcy", "--page-size", 3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with the checkpoint of a tiny model after a few steps."""
    folder = tmp_path_factory.mktemp("train-gpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        checkpoint, settings, text, training = (
            importlib.import_module(f"train_gpt.{name}")
            for name in ("checkpoint", "settings", "text", "training")
        )
    made = settings.Settings(**SETTINGS)
    corpus = text.load_corpus(text.TEXT, made.context)
    run = training.Run("tilewise", made, len(corpus.vocabulary), "torch")
    for _ in range(made.steps):
        run.step(corpus)
    checkpoint.save_checkpoint(folder, made, corpus.digest, {"tilewise": run})
    return folder


@pytest.fixture
def generate(checkpoint, tmp_path, monkeypatch):
    """Run the command in this process, through the kernels: generate("--pages", 1) -> the result."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    command = importlib.import_module("generate.command")

    def invoke(*arguments):
        given = ["--folder", checkpoint, *SHORT, *arguments]
        return CliRunner().invoke(command.app, [str(argument) for argument in given])

    return invoke


def words_of(result):
    """What was printed, without line breaks."""
    return " ".join(result.output.split())


def test_on_plain_pytorch(checkpoint, tmp_path):
    """Up to the last position that the model has."""
    done = run_python(
        EXAMPLES / "generate.py", "--folder", checkpoint, "--device", "cpu", "--length", 11, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    texts = [ast.literal_eval(line) for line in done.stdout.splitlines()[:3]]
    begins = ["It is a truth", "Mr. Darcy", "She"]
    assert [len(text) - len(begin) for text, begin in zip(texts, begins, strict=True)] == [11, 11, 11]
    assert all(text.startswith(begin) for text, begin in zip(texts, begins, strict=True))
    printed = " ".join(done.stdout.split())
    assert "3 prompts, 11 characters each, on the CPU, where tilewise computes in plain PyTorch:" in printed
    assert all(f"\n{name}" in done.stdout for name in ("dense", "cached", "paged"))
    assert printed.count("tokens per second") == 3 and printed.endswith("all three wrote the same")
    assert os.listdir(tmp_path) == []


def test_through_the_kernels(checkpoint, generate):
    """With as few pages as it takes, what the model writes that goes on with one prompt alone."""
    result = generate("--pages", 2 + 1 + 4)
    assert result.exit_code == 0, result.output
    assert "all three wrote the same" in result.output
    text, training = (importlib.import_module(f"train_gpt.{name}") for name in ("text", "training"))
    corpus = text.load_corpus(text.TEXT, SETTINGS["context"])
    content = importlib.import_module("train_gpt.checkpoint").load_checkpoint(checkpoint)
    run = training.Run("sdpa", content["settings"], len(corpus.vocabulary))
    run.load(content["runs"]["tilewise"])
    lines = result.output.splitlines()
    for line, begin in zip(lines[:3], ("It is", "a", "Mr. Darcy"), strict=True):
        ids = corpus.encode(begin).tolist()
        for _ in range(2):
            ids.append(run.model.eval()(torch.tensor([ids]))[0, -1].argmax().item())
        assert ast.literal_eval(line) == corpus.decode(ids)


@pytest.mark.parametrize("name", ["kv_cache", "paged_kv_cache"])
def test_another_text_is_found(generate, monkeypatch, name):
    module = getattr(tilewise.nn, name)
    right = module.cached_attention
    monkeypatch.setattr(module, "cached_attention", lambda *a, **o: -3 * right(*a, **o))
    result = generate()
    assert result.exit_code == 1, result.output
    way = {"kv_cache": "cached", "paged_kv_cache": "paged"}[name]
    assert f"generate: {way} and dense DO NOT AGREE: after prompt" in words_of(result)
    assert "all three wrote the same" not in result.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--pages", 6],
            "--pages 6: pages needed: 1, free: 0 of 6; free() a sequence, or make the cache with more pages; "
            "these prompts take 7 of 3 rows",
        ),
        (["--pages", 0], "--pages"),
        (["--length", 16], "--length 16 after a prompt of 9 characters is more than the 24"),
        (["--prompt", ""], "--prompt must have at least one character"),
        (["--prompt", "né"], "the text has no character 'é'"),
        (["--folder", "."], "there is no checkpoint.pt in .: python examples/train_gpt.py --out . makes one"),
        (["--folder", "other"], "is not a checkpoint of this program"),
        (["--text", "other.txt"], "is of another text than other.txt"),
        (["--device", "tpu"], "--device tpu must be auto, cpu or cuda"),
    ],
)
def test_requests_that_cannot_be_met(generate, arguments, words):
    Path("other.txt").write_text("It is a truth. " * 100)
    Path("other").mkdir()
    torch.save({"step": 3}, "other/checkpoint.pt")
    result = generate(*arguments)
    assert result.exit_code == 2, result.output
    assert words in words_of(result)
    assert "Traceback" not in result.output


def test_a_missing_extra(tmp_path):
    code = f"import runpy, sys; sys.path.insert(0, {str(EXAMPLES)!r}); sys.modules['typer'] = None\n"
    code += "runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run_python("-c", code, EXAMPLES / "generate.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("generate: typer is not installed: pip install '.[demo]'")
    assert done.stderr.count("\n") == 1
