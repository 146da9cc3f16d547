"""`examples/train_gpt.py` on several ranks: the losses of one process, checkpoints that any number of ranks
reads, and what is said when something is wrong."""

import importlib
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from typer.testing import CliRunner

from harness.examples import EXAMPLES, SOURCES
from harness.ranks import Pool, errors, run

TINY = dict(
    implementation="both", device="cpu", dtype="fp32", steps=12, batch=4, context=24, width=32, layers=1,
    heads=2, lr=3e-3, dropout=0.0, seed=0,
)  # fmt: skip
OPTIONS = ["--device", "cpu", "--steps", 12, "--batch", 4, "--length", 24, "--width", 32, "--layers", 1]
OPTIONS += ["--heads", 2, "--interpreter-steps", 0, "--sample-length", 20, "--out", "out"]

# The script as it is, but for a SIGTERM to one rank in the middle of step 7.
TERMINATED = """
import os, runpy, signal, sys
from train_gpt.training import Run

step = Run.step
def terminated(run, corpus):
    step(run, corpus)
    if len(run.losses) == 7 and os.environ["RANK"] == "2":
        os.kill(os.getpid(), signal.SIGTERM)
Run.step = terminated
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def example(name):
    """A module of the example, here or in another process."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(f"train_gpt.{name}")


def short_text(path):
    """The first of the example's text, so that validation is short."""
    text = example("text").TEXT.read_text(encoding="utf-8")[:16_000]
    path.write_text(text, encoding="utf-8")


def one_process(variant="tilewise", text=None, **changed):
    """A run in this process, and the text."""
    settings = example("settings").Settings(**TINY | changed)
    corpus = example("text").load_corpus(text or example("text").TEXT, settings.context)
    return example("training").Run(variant, settings, len(corpus.vocabulary), "torch"), corpus


def assert_like_one_process(losses, steps, **changed):
    """Assert that these losses differ from those of one process by no more than the example allows, which the
    control says."""
    found = {}
    for variant in ("sdpa", "control"):
        run, corpus = one_process(variant, **changed)
        for _ in range(steps):
            run.step(corpus)
        found[variant] = run.losses
    comparison = example("compare").compare(losses, found["sdpa"], found["control"], "fp32")
    assert len(losses) == comparison.count == steps
    assert comparison.agrees, comparison


def assert_same_model(a, b, corpus):
    """Assert that both say the same of a text. Their weights may differ: biases of keys have no effect, so
    rounding alone moves them."""
    ids = corpus.tail[None, :24]
    with torch.no_grad():
        torch.testing.assert_close(a.model.eval()(ids), b.model.eval()(ids), rtol=0, atol=1e-5)


# ---- Started by torchrun


def torchrun(count, *arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([SOURCES, str(EXAMPLES)])
    environment |= {"PYTHONPATH": path, "COLUMNS": "100", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    return subprocess.run(
        [str(each) for each in [*start, *arguments]],
        env=environment, cwd=cwd, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_saved_by_four_ranks_and_gone_on_with_by_two_and_by_one(tmp_path, examples, monkeypatch):
    (tmp_path / "terminated.py").write_text(TERMINATED)
    text = tmp_path / "text.txt"
    short_text(text)
    script, ranks = EXAMPLES / "train_gpt.py", ["--ranks", 4, "--context", 2, "--shard", 2]
    four = torchrun(4, "terminated.py", script, *OPTIONS, *ranks, "--text", "text.txt", cwd=tmp_path)
    assert four.returncode == 1, four.stdout + four.stderr
    assert four.stderr.count("interrupted: step 7 of 12 is saved") == 1, four.stderr
    assert "torchrun --nproc-per-node 4" in four.stderr and "--ranks 4 --context 2 --shard 2" in four.stderr
    saved = sorted(os.listdir(tmp_path / "out"))
    assert saved[0] == "checkpoint.pt" and saved[1].startswith("parts-") and len(saved) == 2

    resume = ["--resume", "--out", "out", "--text", "text.txt", "--interpreter-steps", "0"]
    two = torchrun(2, script, *resume, cwd=tmp_path)
    assert two.returncode == 0, two.stdout + two.stderr
    assert two.stdout.count("going on after step 7 of 12") == 1, two.stdout
    said = " ".join(two.stdout.split())
    assert "2 ranks train tilewise's model: the batch in one piece, every text in 2 parts" in said
    assert "tilewise on 2 ranks and sdpa agree: over the first 12 steps" in said

    monkeypatch.chdir(tmp_path)
    checkpoint = example("checkpoint")
    content = checkpoint.load_checkpoint(Path("out"))
    assert_like_one_process(content["runs"]["tilewise"]["losses"], 12, text=text)
    whole, corpus = one_process(text=text)
    for _ in range(12):
        whole.step(corpus)
    assert content["runs"]["sdpa"]["losses"] == pytest.approx(whole.losses, rel=1e-6)
    # The weights, in one process without torch.distributed: those of a run that has never been interrupted.
    read, _ = one_process(text=text, seed=1)
    checkpoint.load_weights(Path("out"), content, "tilewise", read.model)
    assert_same_model(read, whole, corpus)

    one = CliRunner().invoke(example("command").app, resume)
    assert one.exit_code == 0, one.output
    assert "going on after step 12 of 12" in one.output
    assert [name for name in os.listdir("out") if name.startswith("parts-")] == []


# ---- In processes that are kept


def go_on(mesh, out, state, steps, context, changed):
    """A rank that goes on from the state of one process: its losses and validation; on the first rank, the
    weights in one piece."""
    settings = example("settings").Settings(**TINY | changed)
    corpus = short_tail(example("text").load_corpus(example("text").TEXT, settings.context))
    ranks = example("ranks").SeveralRanks(context)
    part = example("parallel").PartOfARun(settings, len(corpus.vocabulary), "torch", ranks)
    part.load(state, out)
    for _ in range(steps):
        part.step(corpus)
    part.validate(example("text").validation_batches(corpus, settings))
    again = example("parallel").PartOfARun(settings, len(corpus.vocabulary), "torch", ranks)
    again.load(deepcopy(part.save(out)), out)
    part.step(corpus)
    again.step(corpus)
    assert again.losses == part.losses
    whole = again.whole()
    weights = None if whole is None else whole.state_dict()
    return part.losses, part.validation, weights


def short_tail(corpus):
    """The last batch for validation has two texts, fewer than there are ranks."""
    return corpus._replace(tail=corpus.tail[: 66 * 24 + 1])


@pytest.mark.parametrize("context", [1, 4])
def test_parts_go_on_where_one_process_was(tmp_path, examples, context):
    """With dropout, too: the ranks together drop what one process drops."""
    changed = dict(dropout=0.3, context=24)
    whole, corpus = one_process(**changed)
    corpus = short_tail(corpus)
    for _ in range(3):
        whole.step(corpus)
    found = run((4,), go_on, tmp_path, whole.save(tmp_path), 3, context, changed)
    for _ in range(3):
        whole.step(corpus)
    whole.validate(example("text").validation_batches(corpus, whole.settings))
    whole.step(corpus)
    for losses, validation, _ in found:
        assert_like_one_process(losses, 7, **changed)
        assert validation == {6: pytest.approx(whole.validation[6], rel=1e-5)}
    assert [weights is None for _, _, weights in found] == [False, True, True, True]
    joined, _ = one_process(seed=1)
    joined.model.load_state_dict(found[0][2])
    assert_same_model(joined, whole, corpus)


def fail_on(mesh, where):
    ranks, told = example("ranks").SeveralRanks(4), example("settings").ExampleError

    def act():
        if ranks.rank in where:
            raise told("the disk is full")

    ranks.together(act)


def know(mesh):
    ranks = example("ranks").SeveralRanks(4)
    ranks.agree(step=7, text="a" if ranks.rank != 3 else "b")


def test_what_fails_on_one_rank_is_said_on_all(examples):
    for error in errors((4,), fail_on, [2]):
        assert str(error) == "rank 2: the disk is full"
    for error in errors((4,), fail_on, range(4)):
        assert str(error) == "the disk is full"
    for error in errors((4,), know):
        assert "rank 3 has text b, and rank 0 has a: start all ranks with one command" in str(error)


def save_to_a_full_disk(mesh, out):
    ranks = example("ranks").SeveralRanks(4)
    settings = example("settings").Settings(**TINY)
    part = example("parallel").PartOfARun(settings, 60, "torch", ranks)
    patch = mock.patch.object(
        FileSystemWriter, "write_data", side_effect=OSError(28, "No space left on device")
    )
    with patch if ranks.rank == 1 else nullcontext():
        part.save(out)


def test_a_full_disk(tmp_path, examples):
    for error in errors((4,), save_to_a_full_disk, tmp_path):
        assert re.match(r"cannot write .*/parts-.*: rank 1: \[Errno 28\] No space left on device", str(error))
    assert os.listdir(tmp_path) == []


def test_parts_that_are_missing(tmp_path, examples):
    checkpoint, settings = example("checkpoint"), example("settings").Settings(**TINY)
    saved = mock.Mock(save=lambda out: {"parts": "parts-1", "losses": []})
    checkpoint.save_checkpoint(tmp_path, settings, "", {"tilewise": saved})
    with pytest.raises(example("settings").ExampleError, match="parts-1, which is not there, or not whole"):
        checkpoint.load_checkpoint(tmp_path)


def lose(mesh):
    ranks = example("ranks").SeveralRanks(2)
    if ranks.rank == 1:
        os._exit(1)
    try:
        ranks.total(1.0)
    except RuntimeError as error:
        return example("ranks").lost_rank(error)


def test_a_rank_that_is_gone(examples):
    with Pool(2) as pool:
        (_, said), _ = pool.outcomes((2,), lose)
    assert said is not None and re.match("(Connection closed by|.*Connection reset by) peer", said), said
    lost_rank = example("ranks").lost_rank
    assert lost_rank(RuntimeError("shapes do not fit")) is None
    error = RuntimeError("the ring: no answer from rank 1\nand more")
    error.__cause__ = RuntimeError(f"[/third_party/gloo/gloo/pair.cc:1] {said}. This is typical")
    assert lost_rank(error) == "the ring: no answer from rank 1"


# ---- Requests that cannot be met


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", 4], "--ranks 4: this is one process. torchrun --nproc-per-node 4 examples/train_gpt.py"),
        (
            ["--context", 2, "--shard", 2],
            "torchrun --nproc-per-node 4 examples/train_gpt.py --context 2 --shard 2 starts 4; "
            "--length is that of a text",
        ),
    ],
)
def test_ranks_that_nobody_has_started(examples, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(example("command").app, [str(each) for each in OPTIONS + arguments])
    assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output
    assert not Path("out").exists()


def test_numbers_that_do_not_fit(examples):
    ranks, told = example("ranks"), example("settings").ExampleError
    assert [ranks.columns(4, *given) for given in [(None, None), (2, None), (None, 2), (1, 4)]] == [
        4,
        2,
        2,
        1,
    ]
    with pytest.raises(told, match="--shard 3 times --context 1 is 3, and there are 4 ranks"):
        ranks.columns(4, None, 3)
    group = ranks.Ranks()
    group.count, group.shard, group.context = 6, 3, 2
    settings = example("settings").Settings
    with pytest.raises(told, match="--implementation sdpa trains in one process"):
        ranks.check_parts(settings(**TINY | {"implementation": "sdpa"}), group)
    with pytest.raises(told, match="--batch 4 must be a multiple of --shard 3"):
        ranks.check_parts(settings(**TINY), group)
    with pytest.raises(told, match="--length 26 must be a multiple of 4, two chunks"):
        ranks.check_parts(settings(**TINY | {"batch": 6, "context": 26}), group)
