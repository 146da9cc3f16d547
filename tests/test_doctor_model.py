"""`tilewise doctor model.py:make_model`: each way that attention is computed in a model is seen, once."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from torch import nn
from typer.testing import CliRunner

import tilewise
from tilewise.drop_in.entry import PYTORCH
from tilewise.tools.doctor import command as doctor_command
from tilewise.tools.doctor.maker import Made
from tilewise.tools.doctor.model import WRITTEN_OUT, examine_model

HEADS, LENGTH, DIM = 2, 6, 8


class Attends(nn.Module):
    """A module that computes attention in the way that it is made with."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, q):
        return self.way(q)


def written_out(q):
    weights = F.dropout((q @ q.mT).softmax(-1), 0.5)
    return weights.to(q.dtype) @ q


def by_einsum(q):
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, q), -1), q)


ONLY_TO_SOME = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
# A way, and what the mask and the options of its entry are.
ANSWERED = {
    "PyTorch's": (lambda q: F.scaled_dot_product_attention(q, q, q), "no mask", ""),
    "PyTorch's with a mask": (
        lambda q: F.scaled_dot_product_attention(q, q, q, ONLY_TO_SOME, scale=0.5),
        "Dense(tensor[6, 6])", "scale=0.5",
    ),
    "tilewise's": (
        lambda q: tilewise.attention(q, q, q, mask=tilewise.Window(2, 0), score=tilewise.Softcap(3.0)),
        "Window(2, 0)", "Softcap(3.0)",
    ),
    "sinks, dropout": (
        lambda q: tilewise.attention(q, q, q, sink=torch.zeros(HEADS), dropout_p=0.5, similarity="dot"),
        "no mask", "sink, dropout_p=0.5, similarity='dot'",
    ),
}  # fmt: skip
NOT_ANSWERED = {
    "too wide": (
        lambda q: F.scaled_dot_product_attention(*[q.repeat(1, 1, 1, 80)] * 3),
        PYTORCH, "must be from 1 to 576",
    ),
    "written out": (written_out, WRITTEN_OUT, "scaled_dot_product_attention"),
    "by einsum": (by_einsum, WRITTEN_OUT, "scaled_dot_product_attention"),
}  # fmt: skip


def look(way, **options):
    q = torch.randn(1, HEADS, LENGTH, DIM)
    return examine_model(Made(nn.Sequential(Attends(way), nn.Identity()), (q,), {}), **options)


@pytest.mark.parametrize("name", ANSWERED)
def test_answered(name):
    way, mask, options = ANSWERED[name]
    found = look(way)
    (seen,) = found.seen
    assert (found.calls, found.answered, seen.is_answered) == (1, 1, True)
    entry = seen.entry
    assert (entry.module, entry.mask, entry.options) == ("Sequential: 0", mask, options)
    assert entry.q == entry.k == entry.v == (1, HEADS, LENGTH, DIM)
    assert entry.answered_by.startswith("tilewise ")
    assert " on an " in seen.on_gpu


@pytest.mark.parametrize("name", NOT_ANSWERED)
def test_not_answered(name):
    way, who, advice = NOT_ANSWERED[name]
    found = look(way)
    (seen,) = found.seen
    assert (found.calls, found.answered, seen.is_answered) == (1, 0, False)
    assert seen.entry.answered_by == who and seen.entry.module == "Sequential: 0"
    assert advice in " ".join(seen.advice)


def test_no_attention():
    """A product, and a softmax that no product follows, are none."""
    assert look(lambda q: (q @ q.mT) @ q).seen == ()
    assert look(lambda q: q.softmax(-1) + 1).seen == ()


def test_other_calls_and_modules_of_tilewise():
    def packed_then_cached(x):
        offsets, lens = torch.tensor([0, 2, LENGTH]), torch.tensor([LENGTH])
        rows = x[0].unflatten(1, (HEADS, DIM))  # [tokens, heads, dim]
        tilewise.packed_attention(rows, rows, rows, q_offsets=offsets)
        cache = rows.transpose(0, 1)[None]
        tilewise.cached_attention(cache, cache, cache, kv_lens=lens)
        return x

    model = nn.Sequential(Attends(packed_then_cached), tilewise.nn.SelfAttention(HEADS * DIM, heads=HEADS))
    found = examine_model(Made(model, (torch.randn(1, LENGTH, HEADS * DIM),), {}))
    modules = [seen.entry.module for seen in found.seen]
    assert modules == ["Sequential: 0", "Sequential: 1.core"] and found.answered == found.calls == 3


def test_layers_share_a_line_and_advice_is_that_of_explain():
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    layers = [Attends(lambda q: F.scaled_dot_product_attention(q, q, q, mask)) for _ in range(3)]
    q = torch.randn(1, HEADS, LENGTH, DIM)
    (seen,) = examine_model(Made(nn.Sequential(*layers), (q,), {})).seen
    assert (seen.modules, seen.entry.calls, seen.entry.module) == (3, 3, "Sequential: *")
    found = tilewise.explain(q, q, q, mask=mask)
    assert seen.advice == tuple(suggestion.text for suggestion in found.suggestions) != ()


def test_multi_head_attention_beside_other_modes():
    """Under torch.device, which is a mode too, PyTorch's module still comes to tilewise."""
    x = torch.randn(2, LENGTH, 16)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    for training in (False, True):
        with torch.device("cpu"):
            found = examine_model(Made(attention, (x, x, x), dict(need_weights=False)), training)
        assert (found.calls, found.answered) == (1, 1)
    found = examine_model(Made(attention, (x, x, x), {}))
    assert (found.calls, found.answered) == (1, 0)
    assert found.seen[0].advice == (
        "need_weights=True: a fused kernel never has the weights; give need_weights=False",
    )


def test_nothing_is_left_behind():
    def fails(q):
        raise RuntimeError("in the model")

    with pytest.raises(RuntimeError, match="in the model"):
        look(fails)
    assert tilewise.api.watchers == [] and torch.overrides._get_current_function_mode_stack() == []


# ---- The command

FILE = """
import torch
from torch import nn
import torch.nn.functional as F
from beside import WIDTH

class Model(nn.Module):
    def forward(self, x, scale=1.0):
        assert torch.is_grad_enabled() == self.training
        return F.scaled_dot_product_attention(x, x, x, scale=scale)

def as_tuple(): return Model(), (torch.randn(1, 2, 5, WIDTH),)
def as_tensor(): return Model(), torch.randn(1, 2, 5, WIDTH)
def as_dict(): return Model(), dict(x=torch.randn(1, 2, 5, WIDTH), scale=0.5)
def with_inputs_of_its_own():
    model = Model()
    model.dummy_inputs = dict(x=torch.randn(1, 2, 5, WIDTH))
    return model
def wide(): return Model(), torch.randn(1, 2, 5, 600)
def alone(): return Model()
def nothing(): return None
def raises(): raise KeyError("the user's own")
number = 3
"""


@pytest.fixture
def doctor(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    Path("model.py").write_text(FILE)
    Path("beside.py").write_text("WIDTH = 8")
    app = typer.Typer()
    app.command()(doctor_command.doctor)
    yield lambda *words: CliRunner().invoke(app, list(words))
    for name in ("model", "beside"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["as_tuple", "as_tensor", "as_dict", "with_inputs_of_its_own"])
@pytest.mark.parametrize("options", [(), ("--meta",), ("--training",)])
def test_command(doctor, name, options):
    result = doctor(f"model.py:{name}", *options)
    assert result.exit_code == 0, result.output
    assert (
        "Model  (1 call)" in result.output
        and "q 1×2×5×8, k 1×2×5×8, v 1×2×5×8, float32, no mask" in result.output
    )
    assert ("scale=0.5" in result.output) == (name == "as_dict")
    assert "tilewise doctor: Model: tilewise answers 1 of 1 call of attention" in result.output


def test_command_for_another_gpu_as_json(doctor):
    result = doctor("model:as_tensor", "--gpu", "A100", "--json")
    found = json.loads(result.stdout)
    assert (found["model"], found["calls"], found["answered"]) == ("Model", 1, 1)
    assert "A100" in found["seen"][0]["on_gpu"] and found["seen"][0]["entry"]["dtype"] == "float32"


def test_command_of_a_call_that_it_does_not_answer(doctor):
    result = doctor("model.py:wide")
    assert result.exit_code == 1
    assert "→ head_dim=600 must be from 1 to 576; value_dim=600 must be from 1 to 512" in result.output
    assert "tilewise answers 0 of 1 call of attention" in result.output


@pytest.mark.parametrize(
    "where, words",
    [
        ("model.py", "model.py: give FILE.py:FUNCTION, for example model.py:make_model"),
        ("nowhere.py:make", "there is no file nowhere.py"),
        ("nowhere:make", "there is no module nowhere"),
        ("model.py:make", "model.py has no function make; it has Model, as_tuple"),
        ("model.py:number", "model.py has no function number"),
        ("model.py:alone", "alone() returned a Model alone: it must return (model, inputs)"),
        ("model.py:nothing", "nothing() returned NoneType: it must return (model, inputs)"),
    ],
)
def test_what_is_no_model(doctor, where, words):
    result = doctor(where)
    assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output


def test_a_users_own_error_is_shown_as_it_is(doctor):
    assert isinstance(doctor("model.py:raises").exception, KeyError)


def test_options_of_a_model_without_one(doctor):
    result = doctor("--meta")
    assert result.exit_code == 2 and "go with a model" in result.output
