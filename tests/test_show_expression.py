"""The masks that `tilewise show` reads from an expression, and what it says where it cannot."""

from __future__ import annotations

import pytest

import tilewise
from tilewise.tools.show.expression import MASKS, ExpressionError, mask_from


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("Causal() & tw.Window(64, None)", "Causal() & Window(64, None)"),
        ("tilewise.Causal(align=-3)", "Causal(align=-3)"),
        ("Padding([3, 5], side='left')", "Padding(tensor[2], side='left')"),
        ("Documents([0] * 20 + [1] * 30)", "Documents(tensor[50])"),
        ("Documents.from_offsets([0, 3, 7], q_len=7)", "Documents(tensor[7], kv_ids=tensor[7])"),
        ("~Causal() | Window(1, 0) & [[True]]", "~Causal() | Window(1, 0) & Dense(tensor[1, 1])"),
        ("~(Causal() & Neighborhood(3, shape=(4, 5)))", "~(Causal() & Neighborhood(3, shape=(4, 5)))"),
        ("BlockCausal(6, window=2)", "BlockCausal(6, window=2)"),
        ("[[True, False]] & Intervals(\n[0], [2])", "Dense(tensor[1, 2]) & Intervals(tensor[1], tensor[1])"),
    ],
)
def test_an_expression_is_the_mask_that_python_makes(text, mask):
    assert repr(mask_from(text)) == mask


def test_every_mask_of_the_package_is_known():
    public = {name: getattr(tilewise, name) for name in tilewise.__all__}
    masks = {n for n, x in public.items() if isinstance(x, type) and issubclass(x, tilewise.Mask)}
    assert MASKS.keys() == masks - {"Mask", "UserMask"}  # these two need functions


UNDERLINED = "no mask Windw: did you mean Window?\n  Causal() & Windw(64, 0)\n             ^^^^^"
NO_MASKS = {
    "a mistyped name": ("Causal() & Windw(64, 0)", UNDERLINED),
    "another case": ("causal()", "did you mean Causal?"),
    "a mistyped method": ("Documents.from_offset([0])", "did you mean from_offsets?"),
    "another method": ("Causal.bind(3)", "Causal has no class method bind"),
    "no call": ("Causal", "a mask is a call: Causal(...)"),
    "half a call": ("Causal(", "this is not an expression"),
    "too few arguments": ("Window(64)", "Window(left, right, align): missing a required argument: 'right'"),
    "a wrong argument": ("Window(-1, 0)", "left=-1 must be None (no limit) or an int"),
    "another operator": ("Causal() ^ Window(1, 2)", "masks are joined with & and |"),
    "no mask turned": ("~3", "a mask should stand here"),
    "a number": ("Causal() & 3", "a mask should stand here"),
    "a star": ("Window(*[1, 2])", "one by one"),
    "two stars": ("Window(0, 0, **{'align': 1})", "one by one"),
    "functions": ("UserMask(1)", "FILE.py:NAME"),
    "another call": ("__import__('pathlib').Path('made').touch()", "only masks are called here"),
    "another call inside": ("Causal(align=(lambda: 3)())", "only masks are called here"),
    "a comprehension": ("Padding([x for x in (1, 2)])", "only masks, numbers, strings, lists, &"),
    "too large": ("Documents([[0] * 4000000] * 4000000)", "this list would have 16000000000000 elements"),
    "a ragged list": ("Documents([[1], [1, 2]])", "this list is no tensor"),
    "too deep": ("-" * 5000 + "1", "nested too deeply"),
    "no file": ("missing.py:mask", "there is no file missing.py"),
}


@pytest.mark.parametrize(("text", "said"), NO_MASKS.values(), ids=NO_MASKS)
def test_what_is_no_mask_is_refused_with_its_place(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExpressionError) as raised:
        mask_from(text)
    assert said in str(raised.value)
    assert not list(tmp_path.iterdir()), "nothing is run"
