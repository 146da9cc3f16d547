"""`tilewise watch`, the command: which call it records, the file it writes, and every mistake a caller can
make."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from harness.gluon import needs_interpreter
from tilewise.demo import model
from tilewise.demo.encoder import build_encoder
from tilewise.demo.text import read_text
from tilewise.parts.masks.padding import Padding
from tilewise.tools.watch import calls, command
from tilewise.tools.watch.calls import LINES

pytestmark = needs_interpreter
SENTENCE = "A cat </script><b>sat</b> here."
SCRIPT = """
import sys
import torch
import tilewise as tw

q = torch.randn(2, 2, 20, 16, requires_grad=True)
tw.attention(q, q, q)
try:
    k = q[:, :, : int(sys.argv[1])]
    tw.attention(q, k, k, mask=tw.Padding(torch.tensor([9, 20])))
except Exception:
    pass
open("later", "w").close()
"""


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(command.watch)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def read(folder):
    """The recording in a page."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="recording"[^>]*>(.*?)</script>', text, re.DOTALL)[1])


def test_a_sentence_becomes_a_page_that_its_words_cannot_break(watch, tmp_path):
    ran = watch(SENTENCE, "--out", "there", "--mask", "none", "--head", 3, "--layer", 2)
    assert ran.exit_code == 0, ran.output
    assert "there/index.html" in ran.output.replace("\n", "")
    found = read(tmp_path / "there")
    assert "</script>" in found["title"] and "layer 2, head 3" in found["title"]
    text = (tmp_path / "there" / "index.html").read_text(encoding="utf-8")
    assert "</script><b>" not in text and "<title>A cat &lt;/script&gt;" in text
    assert found["words"]["keys"][:3] == ["[CLS]", "a", "cat"] and found["call"]["mask"] == ""
    assert found["call"]["text"] == "tw.attention(q, k, v)"


def test_the_default_is_the_beginning_of_the_demos_text():
    assert calls.own_text().sentences == read_text([], None, "utf-8").sentences[:LINES]


def test_the_layer_is_the_one_that_is_asked_for(watch, tmp_path):
    """Beside the encoder's own attention in plain PyTorch."""
    assert watch("A cat sat here.", "--layer", 3, "--head", 5).exit_code == 0
    found = read(tmp_path / "tilewise-watch")
    folder = model.model_folder()
    config = model.load_config(folder)
    (pieces,) = model.split_into_pieces(folder, ["A cat sat here."], 256)
    encoder = build_encoder(config, model.load_weights(folder), impl="torch")
    with torch.inference_mode():
        ids, mask = torch.tensor([pieces.ids]), Padding(torch.tensor([len(pieces.ids)]))
        x = encoder.norm(encoder.words(ids) + encoder.positions(torch.arange(len(pieces.ids))))
        for layer in encoder.layers[:2]:
            x = layer(x, mask)
        q, _, _ = encoder.layers[2].attention.project(x)
    array = found["arrays"][found["tensors"]["q"]]
    got = np.frombuffer(base64.b64decode(array["data"]), np.float32).reshape(array["shape"])
    assert np.allclose(got, q[0, 4].numpy(), atol=1e-5)


def test_the_articles_model_is_ten_vectors_and_three_projections(watch, tmp_path):
    ran = watch("--article", "--dtype", "bf16")
    assert ran.exit_code == 0, ran.output
    found = read(tmp_path / "tilewise-watch")
    assert found["call"]["q"] == [1, 1, 10, 256] and found["call"]["dtype"] == "bfloat16"
    assert found["words"]["queries"] == [f"x{n}" for n in range(1, 11)]


def test_a_scripts_call_is_watched_and_the_script_ends_there(watch, tmp_path):
    (tmp_path / "model.py").write_text(SCRIPT)
    ran = watch("model.py", "17", "--call", 2, "--batch", 1, "--head", 2)
    assert ran.exit_code == 0, ran.output
    found = read(tmp_path / "tilewise-watch")
    assert (found["call"]["k"], found["call"]["batch"], found["call"]["head"]) == ([2, 2, 17, 16], 0, 1)
    assert found["call"]["mask"].startswith("Padding") and "model.py, call 2" in found["title"]
    assert not (tmp_path / "later").exists()


def test_a_named_case_is_shortened(watch, tmp_path):
    assert watch("--case", "gpt-oss-20b-local", "--tile", 32, 32).exit_code == 0
    found = read(tmp_path / "tilewise-watch")
    assert found["call"]["q"] == [1, 4, 64, 64] and "Window" in found["call"]["mask"]


@pytest.mark.parametrize(
    "words, said",
    [
        (("--case", "no-such-case"), "no-such-case"),
        (("a b", "--article"), "give one of these, not a sentence and --article"),
        (("--layer", 7), "--layer 7 must be from 1 to 6"),
        (("--head", 13), "--head 13 must be from 1 to 12"),
        (("--head", 0), "--head 0 must be from 1 to 12"),
        (("--case", "gpt-oss-20b-local", "--head", 5), "--head 5 must be from 1 to 4"),
        (("--case", "gpt-oss-20b-local", "--batch", 0), "--batch 0 must be from 1 to 1"),
        (("--mask", "Causall()"), "Causal"),
        (("--tile", 16, 24), "tile_kv=24 must be a power of two"),
        (("none.py",), "there is no file none.py"),
        (("--text", "none.txt"), "none.txt"),
        (("word " * 300,), "and the encoder reads 256"),
    ],
)
def test_a_mistake_is_named_in_a_line(watch, words, said, tmp_path):
    ran = watch(*words)
    assert ran.exit_code == 2 and said in ran.output and "Traceback" not in ran.output, ran.output
    assert not (tmp_path / "tilewise-watch").exists()


def test_a_script_that_makes_no_such_call_is_told_how_many_it_makes(watch, tmp_path):
    (tmp_path / "model.py").write_text(SCRIPT)
    ran = watch("model.py", "17", "--call", 3)
    assert ran.exit_code == 2 and "model.py called tilewise 2 times, and --call 3 was asked for" in ran.output


def test_the_interpreter_is_on_whatever_the_machine_has(tmp_path):
    """Nothing is set here: the command starts itself again."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tilewise", "watch", "A cat sat here."]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "open it in a browser" in ran.stdout, ran.stderr
    assert read(tmp_path / "tilewise-watch")["words"]["queries"][1:3] == ["a", "cat"]


@pytest.mark.parametrize("name", ["from_the_article.md", "from_the_article.zh.md"])
def test_the_article_says_what_the_model_computes(name):
    text = (Path(__file__).parents[1] / "docs" / name).read_text(encoding="utf-8")
    folder = model.model_folder()
    config = model.load_config(folder)
    encoder = build_encoder(config, model.load_weights(folder), impl="torch")
    (pieces,) = model.split_into_pieces(folder, ["The cat sat on the mat because it was warm."], 256)
    it, cat, mat, warm = map(pieces.words.index, ("it", "cat", "mat", "warm"))
    weights = {}
    for layer, head in ((6, 12), (3, 9)):
        q, k, _ = calls.inputs_of_layer(encoder, layer, torch.tensor([pieces.ids]))
        weights[layer] = torch.softmax(q[0, head - 1] @ k[0, head - 1].T / 32**0.5, -1)
    column = weights[6][:, cat]
    assert (weights[6].argmax(1) == cat).all() and column.min() > 0.3, "dark from top to bottom"
    for word in (cat, mat):
        assert f" {100 * weights[6][it, word]:.0f} %" in text
    assert weights[3][it].argmax() == warm


def test_the_pages_example_in_code_runs(capsys):
    """Here, for it needs the interpreter, which the examples of other pages do without."""
    page = Path(__file__).parents[1] / "docs" / "watch.md"
    (code,) = re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
    assert "print(forward.grid)  # ['%.', '#%']" in code and "['%.', '#%']" in capsys.readouterr().out
