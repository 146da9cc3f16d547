"""`tilewise explain`: how an explanation reads, as text, as JSON and in the command."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

import tilewise
from harness.explained import ALL_CASES, attend
from tilewise.tools.explain import command as explain_command
from tilewise.tools.explain.command import explain_case
from tilewise_reference import Case


def test_everything_is_json_and_plain_text():
    found = tilewise.explain(*attend(), mask=tilewise.Causal(), work="training", gpu="H200")
    read = json.loads(json.dumps(found.to_dict()))
    assert read["kernels"][0]["tile"] == {"tile_q": 128, "tile_kv": 128, "num_warps": 8, "num_stages": 2}
    assert read["limit"] == found.limit and read["seconds"] == found.seconds
    assert read["kernels"][0]["tiles"] == {"total": 16384, "skipped": 7936, "masked": 512, "full": 7936}
    text = str(found)
    for words in ("Implementation", "Launches", "Tiles", "Work", "Limits on an H200", "Memory", "faster"):
        assert words in text
    assert "128 × 128" in text and "48.4 %" in text and "dkv" in text
    assert max(map(len, text.splitlines())) <= 102


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    app = typer.Typer()
    app.command()(explain_command.explain)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_explains_a_named_case(command, nothing_runs):
    ran = command("--case", "gemma2-2b-local", "--gpu", "A100", "--training")
    assert ran.exit_code == 0, ran.output
    for words in ("gemma2-2b-local", "window 4096", "Limits on an A100", "dkv", "skipped"):
        assert words in ran.output


def test_the_command_explains_sizes(command, nothing_runs):
    sizes = ("--q", "2,16,4096,80", "--kv", "2,4,1024,80", "--value-dim", 64, "--dtype", "fp16", "--causal")
    features = (
        "--window",
        "511,-",
        "--softcap",
        50,
        "--sink",
        "--alibi",
        "--bias",
        "1,16,1,1024",
        "--dropout",
        0.1,
    )
    ran = command(*sizes, *features, "--json", "--gpu", "H200")
    assert ran.exit_code == 0, ran.output
    read = json.loads(ran.output)
    assert read["sizes"] == dict(
        batch=2, q_heads=16, kv_heads=4, q_len=4096, kv_len=1024, head_dim=80, value_dim=64
    )
    assert read["dtype"] == "float16" and read["exact"]
    assert read["kernels"][0]["exponentials"] % 2 == 0


def test_packed_documents_are_counted(command):
    ran = command("--q", "2,16,1024,64", "--documents", 8, "--bool-mask", "--json", "--gpu", "H200")
    read = json.loads(ran.output)
    assert read["pairs_that_count"] == 2 * 16 * 1024 * 128 and read["kernels"][0]["tiles"]["full"] == 0
    assert read["kernels"][0]["tiles"]["masked"] == 2 * 16 * 8


@pytest.mark.parametrize("columns", [80, 160])
def test_every_named_case_is_listed(columns, command, monkeypatch):
    """One a line, also on a narrow screen, below the words that say what it is."""
    monkeypatch.setenv("COLUMNS", str(columns))
    ran = command("--list")
    lines = ran.output.splitlines()
    assert ran.exit_code == 0 and max(map(len, lines)) <= columns
    for case in ALL_CASES.values():
        (line,) = (line for line in lines if line.split()[:1] == [case.name])
        assert line.split()[1:] == [
            f"{case.batch},{case.q_heads},{case.q_len},{case.head_dim}",
            f"{case.batch},{case.kv_heads},{case.kv_len},{case.value_dim}",
            case.dtype,
        ]
        said = " ".join(" ".join(lines[: lines.index(line)]).split())
        assert case.provenance in said


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "--case NAME"),
        (("--case", "llama3-8b"), "near it are llama3-8b-prefill"),
        (("--case", "x"), "--list"),
        (("--case", "llama3-8b-prefill", "--causal"), "leave the others out"),
        (("--case", "llama3-8b-prefill", "--gpu", "Voodoo2"), "gpu='Voodoo2'"),
        (("--q", "1,2,3"), "4 whole numbers"),
        (("--q", "1,2,3,x"), "4 whole numbers"),
        (("--q", "1,2,3,16", "--kv", "1,2,3,32"), "head_dim (16)"),
        (("--q", "1,2,3,16", "--dtype", "int8"), "bf16, fp16, fp32"),
        (("--q", "1,2,3,16", "--window", "5"), "left,right"),
        (("--q", "1,2,3,16", "--kv", "1,2,9,16", "--documents", 2), "as many keys"),
        (("--q", "1,3,8,16", "--kv", "1,2,8,16"), "q_heads=3"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, said, command):
    ran = command(*words)
    assert ran.exit_code == 2 and said in ran.output
    assert "Traceback" not in ran.output


def test_a_case_by_sizes_is_the_named_one():
    named = ALL_CASES["feature-window"]
    sizes = explain_command.case_of_sizes(
        "4,16,4096,128", None, None, "bf16", dict(named.features, window="511,0")
    )
    assert isinstance(sizes, Case)
    assert explain_case(sizes, "H200", False) == explain_case(named, "H200", False)


def test_the_command_asks_for_an_implementation(command):
    ran = command("--q", "1,16,4096,128", "--gpu", "H200", "--impl", "hopper", "--json")
    found = json.loads(ran.output)
    assert ran.exit_code == 0 and found["on_gpu"] == found["implementation"] == "hopper"
    assert found["kernels"][0]["tile"]["has_turns"] is True
    ran = command("--case", "minilm-l6-encoder", "--impl", "fast")
    assert ran.exit_code == 2 and "impl='fast' must be" in ran.output
