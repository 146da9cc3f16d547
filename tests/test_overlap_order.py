"""What one order of dQ's sums costs, by the model: against closed forms, and in docs/backward.md."""

from dataclasses import replace
from pathlib import Path

import pytest

from tilewise.tools.overlap.order import ADDING, START, Order, call_steps, table, walk_of

PAGE = Path(__file__).parents[1] / "docs" / "backward.md"
FREE = Order(is_ordered=False)


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_a_walk_visits_the_rows_that_see_its_keys():
    assert list(walk_of(2, 8, True, 2, True)) == [7, 6, 5, 4]
    assert list(walk_of(2, 8, True, 2, False)) == [4, 5, 6, 7]
    assert list(walk_of(2, 4, False, 2, True)) == [3, 2, 1, 0]


@pytest.mark.parametrize("heads, processors", [(1, 8), (3, 8), (4, 4)])
def test_without_an_order_a_full_call_takes_its_rounds(heads, processors):
    rounds = -(-heads * 8 // processors)
    assert call_steps(heads, 8, 2, False, processors, FREE) == rounds * (START + 16 + ADDING)


@pytest.mark.parametrize("rows_last_first", [True, False])
def test_a_full_head_hands_over_once_a_program(rows_last_first):
    """All programs begin with the same rows: each is one handing over behind the one before, from then on."""
    order = Order(rows_last_first=rows_last_first)
    assert call_steps(1, 8, 2, False, 8, order) == START + 16 + 8 * ADDING


def test_a_causal_head_walked_from_the_last_rows_waits_no_longer_than_the_first_program_takes():
    assert call_steps(1, 8, 2, True, 8, Order()) == START + 16 + ADDING
    upwards = call_steps(1, 8, 2, True, 8, Order(rows_last_first=False))
    assert upwards > START + 16 + 7 * ADDING, "the last rows have their last share last of all"


def test_slower_handing_over_never_makes_it_faster():
    times = [call_steps(4, 8, 2, True, 8, Order(together=2, adding=adding)) for adding in (0, 0.5, 1, 2)]
    assert times == sorted(times) and times[0] < times[-1]


@pytest.mark.parametrize("is_causal", [True, False])
def test_an_order_costs_something_and_heads_together_make_it_less(is_causal):
    call = (32, 16, 2, is_causal, 64)
    free, together = call_steps(*call, FREE), call_steps(*call, Order())
    alone = call_steps(*call, replace(Order(), together=1))
    assert free <= together < alone


def test_the_page_has_the_table():
    assert [line for line in table() if not line.startswith("| ---") and line not in page()] == []
