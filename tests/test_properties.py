"""Any combination of features is right, forward and backward: hypothesis draws them, the oracle judges, the
sanitizer watches.

Each feature has a test of its own, in which it is present and everything else is drawn around it.
"""

import zlib

import pytest
import torch
from hypothesis import given, note, seed, settings
from hypothesis import strategies as st

from harness import support_table
from harness.features import FEATURES, KINDS, Feature, Problem, build, judge, of_kind

# How many features of a kind one problem may have; of all others at most one.
SEVERAL = {"mask": 3, "score": 2}
# Four kernels more take as long as all others: without a GPU, in the test of their own alone.
if not torch.cuda.is_available():
    SEVERAL["order"] = 0
# On a GPU nearly every example compiles a kernel of its own, for a second or two.
EXAMPLES = 8 if torch.cuda.is_available() else 2


def problems(device: torch.device, present: Feature) -> st.SearchStrategy[Problem]:
    """Problems with the feature `present` and any others."""

    @st.composite
    def draw_problem(draw: st.DrawFn) -> Problem:
        chosen = [present]
        for kind in KINDS:
            others = [entry for entry in of_kind(kind) if entry is not present]
            at_most = SEVERAL.get(kind, 1) - (kind == present.kind)
            if others and at_most:
                chosen += draw(st.lists(st.sampled_from(others), max_size=at_most, unique=True))
        note(f"features: {', '.join(entry.name for entry in chosen)}")
        return build(device, draw(st.randoms(use_true_random=False)), chosen)

    return draw_problem()


@pytest.mark.in_turns
@pytest.mark.parametrize("present", FEATURES.values(), ids=str)
def test_any_combination(device: torch.device, present: Feature):
    @seed(zlib.crc32(present.name.encode()))  # other examples for each feature, the same in every run
    @settings(max_examples=EXAMPLES)
    @given(problems(device, present))
    def run(problem: Problem) -> None:
        judge(problem, backward=True)

    run()


def test_the_page_of_support_says_what_is_tested():
    text = support_table.PAGE.read_text(encoding="utf-8")
    assert support_table.filled(text, "support", support_table.table()) == text, (
        "docs/support.md is out of date: PYTHONPATH=kernels:reference:tests python -m harness.support_table"
    )
