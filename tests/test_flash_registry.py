"""PyTorch's registry of flash attentions: tilewise comes and goes through it, and leaves nothing behind."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import attention as chooser

import tilewise
from tilewise.drop_in import flash_impl

pytestmark = pytest.mark.oldest
OPS = [f"aten::{name}" for name in flash_impl.OPS if hasattr(torch.ops.aten, name)]


def dumps() -> list[str]:
    """What the dispatcher holds for each of the ops, the kernels below active ones included."""
    return [torch._C._dispatch_dump(op) for op in OPS]


def is_active() -> bool:
    """Whether the CUDA kernel of every op is tilewise's; False if none is."""
    lines = [[line for line in dump.splitlines() if line.startswith("CUDA: ")] for dump in dumps()]
    ours = [any("flash_impl.py" in line for line in found) for found in lines]
    assert all(ours) or not any(ours), list(zip(OPS, ours, strict=True))
    return all(ours)


@pytest.fixture(autouse=True)
def restored():
    chooser.restore_flash_attention_impl(_raise_warn=False)
    yield
    chooser.restore_flash_attention_impl(_raise_warn=False)
    torch.nn.attention._registry._FLASH_ATTENTION_IMPLS.pop("another", None)


def test_importing_makes_the_name_known_and_no_more():
    code = (
        "import torch; from torch.nn import attention as a; before = a.list_flash_attention_impls()\n"
        f"ops = {OPS}; dumps = [torch._C._dispatch_dump(op) for op in ops]\n"
        "import tilewise\n"
        "assert {*a.list_flash_attention_impls()} == {*before, 'tilewise'}\n"
        "assert a.current_flash_attention_impl() is None\n"
        "assert dumps == [torch._C._dispatch_dump(op) for op in ops]\n"
        "assert not hasattr(tilewise, '_flash_impl')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_activated_and_restored_again_and_again():
    before = dumps()
    had = [torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA") for op in OPS]
    assert len(OPS) >= 4 and not is_active()
    for _ in range(3):
        chooser.activate_flash_attention_impl("tilewise")
        assert is_active() and chooser.current_flash_attention_impl() == "tilewise"
        assert all(torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA") for op in OPS)
        chooser.activate_flash_attention_impl("tilewise")  # which removes the first
        assert is_active()
        chooser.restore_flash_attention_impl()
        assert not is_active() and chooser.current_flash_attention_impl() is None
        assert dumps() == before
        assert had == [torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA") for op in OPS]


def test_activating_another_removes_it():
    before, another = dumps(), []

    class Handle:
        def remove(self) -> None:
            another.append("removed")

    chooser.register_flash_attention_impl("another", register_fn=Handle)
    chooser.activate_flash_attention_impl("tilewise")
    chooser.activate_flash_attention_impl("another")
    assert not is_active() and dumps() == before
    chooser.activate_flash_attention_impl("tilewise")
    assert is_active() and another == ["removed"]


def test_a_handle_that_is_kept_keeps_no_kernel():
    handle = flash_impl.activate()
    assert is_active()
    handle.remove()
    handle.remove()
    assert not is_active()


def test_a_second_copy_leaves_the_name_to_the_first(monkeypatch):
    calls = []
    monkeypatch.setattr("torch.nn.attention.register_flash_attention_impl", lambda *_, **__: calls.append(1))
    code = flash_impl.__loader__.get_code(flash_impl.__name__)
    exec(code, {"__name__": "tilewise.drop_in.flash_copy", "__package__": "tilewise.drop_in"})
    assert not calls
    monkeypatch.setattr("torch.nn.attention.list_flash_attention_impls", lambda: ["FA3"])
    exec(code, {"__name__": "tilewise.drop_in.flash_copy", "__package__": "tilewise.drop_in"})
    assert calls


def test_not_on_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(NotImplementedError, match=r"ROCm.*tilewise.scaled_dot_product_attention"):
        chooser.activate_flash_attention_impl("tilewise")
    assert not is_active() and callable(tilewise.scaled_dot_product_attention)
