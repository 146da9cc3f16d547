"""Planted bugs in `tilewise show`: the tiles, the expression that the mask is read from, the pictures."""

from __future__ import annotations

from .mutation import Mutation, tests

COVERAGE = "kernels/tilewise/tools/explain/coverage.py"
COMMAND = "kernels/tilewise/tools/show/command.py"
EXPRESSION = "kernels/tilewise/tools/show/expression.py"
PICTURE = "kernels/tilewise/tools/show/picture.py"
SHOW = "kernels/tilewise/tools/show/show.py"
TERMINAL = "kernels/tilewise/tools/show/terminal.py"


DENSE = "tiles_and_pairs_are_those_of_the_dense_mask"
REFUSED = "what_is_no_mask_is_refused_with_its_place"
RECTANGLES = "the_picture_has_a_rectangle_a_tile"

# fmt: off
MUTATIONS = (
    Mutation("show: the first full tile drawn as cut", COVERAGE,
             "(full_first <= tile) & (tile < full_last)", "(full_first < tile) & (tile < full_last)",
             tests("show", f"{DENSE}[causal]")),
    Mutation("show: an empty range of full tiles that reaches back", COVERAGE,
             "first, torch.where(none_full, last, full_first), torch.where(none_full, last, full_last), last",
             "first, full_first, full_last, last",
             tests("show", "counts_are_those_of_explain")),
    Mutation("show: the first head for any other", SHOW,
             "min(batch, rows.repeats[0] - 1), min(head, rows.repeats[1] - 1)",
             "min(batch, rows.repeats[0] - 1), 0",
             tests("show", f"{DENSE}[intervals]")),
    Mutation("show: pairs of the first batch for any other", SHOW,
             "index = (torch.tensor(batch).view(1, 1)", "index = (torch.tensor(0).view(1, 1)",
             tests("show", f"{DENSE}[padding]")),
    Mutation("show: a block full where some of its tiles are", SHOW,
             "(rows == end - begin).all(0)", "(rows == end - begin).any(0)",
             tests("show", "a_block_of_tiles_is_full_or_skipped_where_all_of_them_are")),
    Mutation("show: pairs outside of an interval not missed", SHOW,
             "torch.where(inside, whole & ~pairs, pairs)", "(inside & whole & ~pairs)",
             tests("show", "a_mask_of_a_file")),
    Mutation("show: what attention refuses is drawn", SHOW,
             "        raise violation\n", "        break\n",
             tests("show", "what_cannot_be_drawn_is_refused[corners]")),
    Mutation("show: any attribute of a mask called", EXPRESSION,
             'isinstance(value, classmethod) and not name.startswith("_")', "True",
             tests("show_expression", f"{REFUSED}[another method]")),
    Mutation("show: arguments behind a double star forgotten", EXPRESSION,
             "if keyword.arg is None)):", "if False)):",
             tests("show_expression", f"{REFUSED}[two stars]")),
    Mutation("show: a picture's tiles that reach beyond its tokens", PICTURE,
             "keys = min(step_kv, shown.kv_len - j * step_kv)", "keys = step_kv",
             tests("show", f"{RECTANGLES}[window]")),
    Mutation("show: a picture's last run of pairs left out", PICTURE,
             "enumerate([*row, False])", "enumerate(row)",
             tests("show", f"{RECTANGLES}[causal]")),
    Mutation("show: pairs of cut tiles and of full ones look alike", TERMINAL,
             "return 2 * state + shown.pairs, PAIRS", "return 2 * (state > 0) + shown.pairs, PAIRS",
             tests("show", "the_terminal_shows_pairs")),
    Mutation("show: a second number after two", COMMAND,
             "before in OF_TWO and not behind", "before in OF_TWO or not behind",
             tests("show", "one_number_is_both")),
)
# fmt: on
