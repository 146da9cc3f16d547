"""tilewise.sdpa.report: what is counted, under which names, and how it is printed."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewise
from harness.switched import fresh_switch, qkv, wide
from tilewise.drop_in import report as reports
from tilewise.drop_in.entry import PYTORCH
from tilewise.drop_in.modules import calling_module
from tilewise.drop_in.report import note

__all__ = ["fresh_switch"]


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(x)


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Asking(nn.Module):
    def forward(self):
        return calling_module()


class Named(nn.Module):
    def __init__(self, **inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict(inner)

    def forward(self, name):
        return self.inner[name]()


class Holder(nn.Module):
    """Calls a module that it holds in a list, where no name leads to it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = [inner]

    def forward(self, *given):
        return self.inner[0](*given)


def called(answered_by: str = PYTORCH, **said) -> None:
    x = torch.empty(1, 2, 5, 8)
    note(x, x, x, answered_by=answered_by, **said)


# ---- Counting


def test_calls_are_counted_by_who_answered(device):
    x = torch.randn(1, 2, 5, 8, device=device)
    with tilewise.sdpa():
        for _ in range(3):
            F.scaled_dot_product_attention(x, x, x)
        F.scaled_dot_product_attention(*wide(x, x, x))
    report = tilewise.sdpa.report()
    assert (report.answered, report.passed_on) == (3, 1)
    assert [entry.calls for entry in report.entries] == [3, 1]
    tilewise.sdpa.clear()
    assert tilewise.sdpa.report().entries == () and report.answered == 3


@pytest.mark.parametrize(
    ("given", "mask", "options"),
    [
        (dict(), "no mask", ""),
        (dict(is_causal=True), "causal", ""),
        (dict(attn_mask=torch.ones(5, 5, dtype=torch.bool)), "bool (5, 5)", ""),
        (dict(attn_mask=torch.zeros(2, 1, 5)), "added float32 (2, 1, 5)", ""),
        (dict(dropout_p=0.5, scale=0.3), "no mask", "dropout_p=0.5, scale=0.3"),
        (dict(enable_gqa=True), "no mask", "enable_gqa=True"),
    ],
)
def test_arguments_in_words(given, mask, options):
    with tilewise.sdpa():
        F.scaled_dot_product_attention(*qkv(1, 2, 5, 8), **given)
    (entry,) = tilewise.sdpa.report().entries
    assert (entry.mask, entry.options) == (mask, options)
    assert (entry.q, entry.k, entry.v) == ((1, 2, 5, 8),) * 3 and entry.dtype == "float32"


def test_jagged_lengths_are_open():
    rows = [torch.randn(n, 2, 8) for n in (3, 5)]
    with tilewise.sdpa():
        for _ in range(2):
            x = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
            F.scaled_dot_product_attention(x, x, x)
    (entry,) = tilewise.sdpa.report().entries
    assert entry.q == (2, 2, "*", 8) and entry.calls == 2


def test_no_more_sizes_than_can_be_kept(monkeypatch):
    monkeypatch.setattr(reports, "LIMIT", 3)
    for n in range(1, 8):
        x = torch.empty(1, 2, n, 8)
        note(x, x, x, answered_by=PYTORCH, mask=f"bool ({n}, {n})")
    entries = tilewise.sdpa.report().entries
    assert [entry.calls for entry in entries] == [1, 1, 1, 4]
    assert entries[3].q is None and entries[3].mask == "bool" and entries[0].mask == "bool (1, 1)"


def test_threads_count_together():
    def many():
        for _ in range(200):
            called()

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tilewise.sdpa.report().passed_on == 800


# ---- Modules


def test_paths(device):
    x = torch.randn(1, 2, 5, 8, device=device)
    with tilewise.sdpa():
        Model()(x)
        Attention()(x)
        F.scaled_dot_product_attention(x, x, x)
    paths = [entry.module for entry in tilewise.sdpa.report().entries]
    assert paths == ["Model: layers.0.attention", "Model: layers.1.attention", "Attention", None]


def test_a_module_that_came_later():
    model = Named(first=Asking())
    assert model("first") == "Named: inner.first"
    model.inner["second"] = Asking()
    assert model("second") == "Named: inner.second"
    model.inner["second"] = Asking()
    assert model("second") == "Named: inner.second"


def test_a_module_without_a_name():
    assert Holder(Asking())() == "Asking"
    assert Holder(Named(only=Asking()))("only") == "Named: inner.only"
    assert calling_module() is None


def test_models_are_not_kept_alive(device):
    model = Model()
    with tilewise.sdpa():
        model(torch.randn(1, 2, 5, 8, device=device))
    alive = weakref.ref(model.layers[0])
    del model
    gc.collect()
    assert alive() is None


# ---- As text


def test_nothing_yet():
    assert str(tilewise.sdpa.report()) == "no call of attention yet"


def test_the_table():
    for layer in range(12):
        called(
            "tilewise portable", mask="causal", options="scale=0.5", module=f"Model: layers.{layer}.1.attn"
        )
    called(reasons=["it is the first", "and the second"], compiled=True, module="Model: head")
    assert str(tilewise.sdpa.report()).splitlines() == [
        "calls: 13, of which tilewise answered 12 and PyTorch 1; a compiled one is counted when it is "
        "traced, not when it runs",
        "",
        "calls  answered by        q        k        v        dtype    mask               module",
        "12     tilewise portable  1×2×5×8  1×2×5×8  1×2×5×8  float32  causal, scale=0.5  "
        "Model: layers.*.1.attn (12 modules)",
        "1      PyTorch, compiled  1×2×5×8  1×2×5×8  1×2×5×8  float32  no mask            Model: head",
        "       because it is the first",
        "       because and the second",
    ]


def test_the_table_keeps_models_apart():
    for module in ("Model: layers.0", "Model: layers.1", "Other: layers.0", None):
        called(module=module)
    table = str(tilewise.sdpa.report()).splitlines()[3:]
    assert [line[:2] for line in table] == ["2 ", "1 ", "1 "]
    assert [line.rpartition("  ")[2] for line in table] == [
        "Model: layers.* (2 modules)",
        "Other: layers.0",
        "-",
    ]
