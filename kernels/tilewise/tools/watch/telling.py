"""What the page says beside a statement of a kernel, and what its variables mean.

A statement is known by how its source begins, in its file. Each beginning here must be that of exactly one
statement (`check`), so that nothing is said of code that has changed.
"""

from __future__ import annotations

import ast
import functools
import itertools
from typing import NamedTuple

from .tracer import source_of, statements_of, tree_of


class Telling(NamedTuple):
    """equation: in the letters of the papers, "" for none. is_always: the statement is shown although it
    sets no variable of the page."""

    note: str
    equation: str = ""
    is_always: bool = False


Tellings = dict[str, Telling]
T = Telling

FORWARD: Tellings = {
    "batch, head, head_column, kv_head": T(
        "The program looks at its own number. It says which rows of queries are its own; nobody else touches "
        "them."
    ),
    "lo, hi, whole = intersect_intervals": T(
        "Each row asks the mask for a range: the first key it may see, and the first after the last."
    ),
    "lo, hi, whole = keys_of_split": T("Of these keys, the ones that belong to this program's split."),
    "span = kv_range": T(
        "From the ranges of all rows come the tiles to visit. Tiles outside are skipped: not even loaded."
    ),
    "q = load_pieces": T("The tile of Q is loaded once, and stays for the whole walk.", "Q = Q[q_idx, :]"),
    "row_max, row_sum = softmax_start": T(
        "No key has been seen yet: the largest score is -∞ and the sum is 0.", "row_max = -∞   row_sum = 0"
    ),
    "o = zero_pieces": T("The weighted sum of values starts at 0. It lives in registers.", "O = 0"),
    "kv_start, kv_idx, kv_row": T("The next tile of keys, by its place in the sequence."),
    "k = load_keys": T("This tile of K comes from memory.", "K = K[kv_idx, :]"),
    "v = load_keys": T("The same rows of V.", "V = V[kv_idx, :]"),
    "s = product": T(
        "Every query of the tile meets every key of the tile: a dot product each. These scores never leave "
        "the chip.",
        "S = Q Kᵀ",
    ),
    "s, _ = apply_scores": T(
        "What acts on scores acts here: scale, bias, softcap and the like.", "S = scores(S)"
    ),
    "kept = kept_pairs": T("The mask cuts this tile, so it is asked for each pair: does it count?"),
    "s = tl.where(kept": T("Pairs that do not count get -∞, whose exponential is 0.", "S = -∞ where masked"),
    "seen = tl.max": T("Which of these keys does any row see?"),
    "v = where_rows": T("Values of keys that no row sees become 0, so that a NaN there can hurt nobody."),
    "row_max, row_sum, p, rescale = softmax_step": T(
        "The softmax takes in one tile: a new maximum, the weights of this tile, and the factor that is due "
        "to everything summed before.",
        "P = exp(S - row_max)",
    ),
    "p = drop": T("Dropout sets some weights to 0 and makes up for it with the others."),
    "p = round_to": T("The weights are rounded to the dtype of V, as the tensor cores want them."),
    "o = products": T(
        "What was summed before is scaled to the new maximum, and this tile's values join, by their weights.",
        "O = O · rescale + P V",
    ),
    "has_sink": T("A sink is one more key, with a logit of its own and the value 0."),
    "row_max, row_sum, rescale, _ = softmax_join": T("The sink joins the softmax."),
    "o = scaled(o, rescale": T("O is scaled to the maximum with the sink."),
    "natural_max = row_max\n": T("The maximum in natural units,"),
    "natural_max = row_max * unit": T("for which it is scaled as the scores were.", "m = scale · row_max"),
    "factor, lse, sum_log2 = softmax_end": T(
        "The walk is over. One division a row turns sums into a softmax; LSE is what the backward needs of "
        "it.",
        "LSE = row_max + ln row_sum",
    ),
    "o = scaled(o, factor": T("Only now is anything divided: once a row.", "O = O / row_sum"),
    "tl.store(lse_ptr": T("LSE is written: one number a row.", is_always=True),
    "tl.store(max_ptr": T("For the backward, row_max is written.", is_always=True),
    "tl.store(sum_ptr": T("For the backward, log₂ row_sum is written.", is_always=True),
    "o = rounded": T("O is rounded to its dtype."),
    "store_pieces": T(
        "O is written to memory. With LSE it is all that ever leaves: the scores and weights of the walk are "
        "gone.",
        is_always=True,
    ),
}

STEP: Tellings = {
    "new_max = tl.maximum": T("The largest score so far: of the tile, or of before.", "m' = max(m, max S)"),
    "base = anchor(new_max)": T("What is subtracted; 0 for a row that has seen no key."),
    "p = tl.exp2((s - base": T(
        "Weights, as exponentials in base 2, which the hardware has: exp(x) = 2^(x · log₂ e).",
        "P = exp(S - m')",
    ),
    "rescale = tl.exp2((row_max - base)": T(
        "How much smaller all before becomes beside the new maximum; 1 where it has not changed.",
        "rescale = exp(m - m')",
    ),
    "base_log2 = base": T("The maximum, scaled as the scores will be."),
    "p = tl.exp2(s * unit_log2": T(
        "Weights, as exponentials in base 2, which the hardware has. The scale of the dot products is folded "
        "into the same multiplication.",
        "P = exp(scale · (S - m'))",
    ),
    "rescale = tl.exp2(row_max * unit_log2": T(
        "How much smaller all before becomes beside the new maximum; 1 where it has not changed.",
        "rescale = exp(scale · (m - m'))",
    ),
}

JOIN: Tellings = {
    "base = anchor(row_max)": T("What is subtracted; 0 for a row that has seen no key."),
    "row_max = tl.maximum(max_a": T("The larger of the two maxima.", "m = max(a, b)"),
    "a = tl.exp2": T("The factor due to the first state."),
    "b = tl.exp2": T("The factor due to the second state."),
}

MERGE: Tellings = {
    "row_max, row_sum, a, b = softmax_join": T("Two states become one."),
}

COMBINE: Tellings = {
    "row = tl.program_id": T("The rows whose parts this program joins."),
    "row_max, row_sum = softmax_start": T("No split has been read yet."),
    "o = tl.zeros": T("Nothing has been summed.", "O = 0"),
    "lse = tl.load": T("A split has left one number a row, its LSE: all that a merge needs beside O."),
    "part_o = tl.load": T("And the O of its own keys, already divided."),
    "part_sum = tl.where": T("As a softmax state a split's sum is 1, or 0 where it saw no key."),
    "row_max, row_sum, o = softmax_merge": T(
        "Two softmax states are joined as if their keys had been seen one after another.",
        "O = O · a + Oₛ · b",
    ),
    "o, lse, _ = softmax_finish": T("The division, once a row.", "O = O / row_sum"),
    "batch, head, q_idx = row": T("Which row of which head each of them is."),
    "tl.store(ptrs": T("The result of all keys is written.", is_always=True),
}

DKV: Tellings = {
    "batch, kv_head, kv_start, where": T(
        "The program looks at its own number. It says which keys are its own: dK and dV of them are summed "
        "here and nowhere else."
    ),
    "kv_idx = kv_start + tl.arange": T("Its keys."),
    "k = load_pieces": T("The tile of K is loaded once, and stays.", "K = K[kv_idx, :]"),
    "v = load_pieces": T("The tile of V, too.", "V = V[kv_idx, :]"),
    "dk = zero_pieces": T("Nothing has been summed of dK.", "dK = 0"),
    "dv = zero_pieces": T("Nor of dV.", "dV = 0"),
    "span = q_range": T(
        "Which tiles of rows see these keys? The forward's ranges, read from the other side."
    ),
    "q_tile = row_tile": T("The next tile of rows."),
    "q_idx = q_tile * TILE_Q": T("Its rows."),
    "row = tl.minimum(q_idx": T("Rows beyond the end stand for the last one."),
    "row = q_idx": T("All of its rows are there."),
    "lo, hi, _ = intersect_intervals": T("Each row asks the mask for its range of keys."),
    "q_mask = (q_idx": T("Rows that see none of these keys do not enter."),
    "q = load_pieces": T("This tile of Q comes from memory.", "Q = Q[q_idx, :]"),
    "do = load_pieces": T("And the gradient that arrived for these rows of O.", "dO = dO[q_idx, :]"),
    "row_max = load_rows": T("What the forward kept of each row: its maximum,"),
    "sum_log2 = load_rows": T("and the logarithm of its sum. Two numbers stand in for a row of the matrix."),
    "sT = product": T("The scores are computed again: that is cheaper than having kept them.", "Sᵀ = K Qᵀ"),
    "sT, inputs = apply_scores": T("And what acts on scores acts again.", "Sᵀ = scores(Sᵀ)"),
    "pT = softmax_probabilities": T(
        "With the row's numbers P comes out finished, without a second pass.",
        "P = exp(S - row_max) / row_sum",
    ),
    "kept = q_mask": T("The mask cuts this tile, so it is asked for each pair."),
    "pT = tl.where": T("Pairs that do not count weigh nothing.", "P = 0 where masked"),
    "q, do = where_rows": T(
        "Rows that see none of these keys become 0, so that a NaN there can hurt nobody."
    ),
    "dv = products": T(
        "A value gets back the gradient of every row that used it, by the weight with which it did.",
        "dV = dV + Pᵀ dO",
    ),
    "dpT = product": T("How much would each weight have liked to be larger?", "dPᵀ = V dOᵀ"),
    "delta = load_rows": T("delta of each row: what its weights get back on average.", "delta = Σ dO · O"),
    "dsT = pT": T(
        "Weights of a row add up to 1, so a score gets back what its weight does, less the average.",
        "dS = P · (dP - delta)",
    ),
    "dsT = pull_back": T("And back through what acted on the scores."),
    "dsT = tl.where": T("Pairs that do not count pass nothing back."),
    "dsT = round_to": T("dS is rounded to the dtype of Q, for the tensor cores."),
    "dk = products": T(
        "A key gets back every query that met it, by how its score should have moved.", "dK = dK + dSᵀ Q"
    ),
    "dk = scaled": T("The scale of the dot products, once.", "dK = dK · scale"),
    "dk = PROJECT": T("And back through what became of K before it was multiplied."),
    "dk = rounded": T("dK is rounded to its dtype."),
    "dv = rounded": T("dV is rounded to its dtype."),
    "store_pieces(dk_head": T("dK is written.", is_always=True),
    "store_pieces(dv_head": T("dV is written.", is_always=True),
}

DQ: Tellings = {
    "batch, head, q_idx, row, where": T(
        "The program finds the rows that are its own: dQ of them is summed here."
    ),
    "lo, hi, whole = intersect_intervals": T("Each row asks the mask for its range of keys."),
    "span = kv_range": T("From the ranges come the tiles to visit, as in the forward."),
    "q = load_pieces(q_head, q_idx, q_idx < q_len": T("The tile of Q, once.", "Q = Q[q_idx, :]"),
    "do = load_pieces(do_head, q_idx, q_idx < q_len": T(
        "And the gradient of these rows of O.", "dO = dO[q_idx, :]"
    ),
    "row_max = tl.load": T("What the forward kept of each row: its maximum,"),
    "sum_log2 = tl.load": T("and the logarithm of its sum."),
    "delta = tl.load": T("delta of each row.", "delta = Σ dO · O"),
    "dq = zero_pieces": T("Nothing has been summed of dQ.", "dQ = 0"),
    "kv_start, kv_idx, kv_row": T("The next tile of keys."),
    "k = load_keys": T("This tile of K comes from memory.", "K = K[kv_idx, :]"),
    "v = load_keys": T("The same rows of V.", "V = V[kv_idx, :]"),
    "s = product": T("The scores, once more.", "S = Q Kᵀ"),
    "s, inputs = apply_scores": T("And what acts on them.", "S = scores(S)"),
    "p = softmax_probabilities": T("P, finished at once.", "P = exp(S - row_max) / row_sum"),
    "dp = product": T("How much would each weight have liked to be larger?", "dP = dO Vᵀ"),
    "dp = drop": T("A dropped pair passes nothing back."),
    "ds = p * ": T("What each score gets back.", "dS = P · (dP - delta)"),
    "ds = pull_back": T("And back through what acted on the scores."),
    "kept = kept_pairs": T("The mask cuts this tile, so it is asked for each pair."),
    "ds = tl.where": T("Pairs that do not count pass nothing back.", "dS = 0 where masked"),
    "seen = tl.max": T("Which of these keys does any row see?"),
    "k = where_rows": T("Keys that no row sees become 0, so that a NaN there can hurt nobody."),
    "dq = products": T(
        "A query gets back every key that it met, by how its score should have moved.", "dQ = dQ + dS K"
    ),
    "dq = scaled": T("The scale of the dot products, once.", "dQ = dQ · scale"),
    "dq = PROJECT": T("And back through what became of Q before it was multiplied."),
    "dq = rounded": T("dQ is rounded to its dtype."),
    "store_pieces(head_of(dqueries": T("dQ is written.", is_always=True),
}

CONSUMER: Tellings = {
    "q_ring.release(place_at": T("Says that the place of Q is free.", is_always=True),
    "k_ring.release_all": T("Says that all places of K are free.", is_always=True),
    "v_ring.release_all": T("Says that all places of V are free.", is_always=True),
    "q_idx = q_start + gl.arange(0, ROWS, S_ROWS)": T("The rows of this warpgroup."),
    "row = gl.minimum(q_idx": T("Rows beyond the end stand for the last one."),
    "lo, hi, _ = intersect_intervals": T("Each row asks the mask for its range of keys."),
    "row_max = gl.full": T("No key has been seen: the largest score is -∞.", "row_max = -∞"),
    "row_sum = gl.full": T("And the sum is 0.", "row_sum = 0"),
    "o = zero_pieces": T("The weighted sum of values starts at 0.", "O = 0"),
    "q_ring.wait_full": T("Waits until the copy engine has brought Q.", is_always=True),
    "k_ring.wait_full(k_place)": T("Waits until K of step 0 is there.", is_always=True),
    "s = warpgroup_mma_wait(0": T(
        "The tensor cores multiply; this first product has none to run beside.", "S = Q Kᵀ"
    ),
    "s = finish_scores(s, rows, row, lo, hi, kv_start, kv_len, score_args, plan.SCORES, True)": T(
        "What acts on scores, and the mask: -∞ where a pair does not count."
    ),
    "row_max, row_sum, p, rescale = softmax_step(s, row_max": T(
        "The softmax takes in the first tile.", "P = exp(S - row_max)"
    ),
    "k_ring.wait_full(k_place, rows.steps > 1)": T(
        "Waits for K of the next step, if there is one.", is_always=True
    ),
    "p = unpack_pairs(pairs, DTYPE, P_LAYOUT)  # [ROWS": T("P of the step before, rounded to 16 bits."),
    "sync(MY_TURN, TURN_THREADS)\n                s_later": T(
        "Waits for its turn: the other warpgroup issues its products first, so that one's softmax runs while "
        "the other multiplies.",
        is_always=True,
    ),
    "s_later = start_product": T(
        "Hands S of this step to the tensor cores, and goes on without waiting.", "S = Q Kᵀ", True
    ),
    "v_ring.wait_full(v_place)\n                # O": T(
        "Waits until V of the step before is there.", is_always=True
    ),
    "o_later = start_products": T(
        "Hands O of the step before to the tensor cores as well.", "O = O + P V", True
    ),
    "arrive(NEXT_TURN, TURN_THREADS)\n\n": T("Passes the turn on.", is_always=True),
    "s = warpgroup_mma_wait(len(o)": T("Waits for S. O may still be under way.", "S = Q Kᵀ"),
    "k_place = k_ring.release(k_place)\n                kv_start": T(
        "This K is not needed any more: the producer may bring the next into its place.", is_always=True
    ),
    "s = finish_scores(\n": T("What acts on scores, and the mask, where it cuts."),
    "row_max, row_sum, p, rescale = softmax_step(\n": T(
        "The softmax of this step runs while the tensor cores still work on O of the step before.",
        "P = exp(S - row_max)",
    ),
    "k_ring.wait_full(k_place, step + 1": T("Waits for K of the next step.", is_always=True),
    "o = wait_products(o_later)": T("Waits for O of the step before.", "O = O + P V"),
    "v_place = v_ring.release(v_place)\n                pairs": T(
        "That V is not needed any more.", is_always=True
    ),
    "o = scaled(o, rescale)\n            if not IS_FULL": T(
        "O is scaled to the new maximum.", "O = O · rescale"
    ),
    "p = unpack_pairs(pairs, DTYPE, P_LAYOUT)\n": T("P of the last step, rounded to 16 bits."),
    "v_ring.wait_full(v_place)\n        # O": T("Waits for the last V.", is_always=True),
    "o = wait_products(start_products": T("The last product.", "O = O + P V"),
    "row_max, row_sum, rescale, _ = softmax_join": T("The sink joins the softmax."),
    "o = scaled(o, rescale)\n        natural_max": T("O is scaled to the maximum with the sink."),
    "natural_max = row_max\n": T("The maximum in natural units,"),
    "natural_max = row_max * unit[0]": T("for which it is scaled as the scores were.", "m = scale · row_max"),
    "factor, row_lse, sum_log2 = softmax_end": T(
        "One division a row turns sums into a softmax.", "LSE = row_max + ln row_sum"
    ),
    "o = scaled(o, factor)": T("Only now is anything divided.", "O = O / row_sum"),
    "q_idx = q_start + gl.arange(0, ROWS, O_ROWS)": T("The rows once more, where O has them."),
    "gl.store(lse[0]": T("LSE is written: one number a row.", is_always=True),
    "store_async(out_descs": T("The copy engine takes O to memory.", is_always=True),
}

PRODUCER: Tellings = {
    "rows = rows_of": T(
        "The producer finds the rows and the tiles of keys, as the consumers do.", is_always=True
    ),
    "q_place = q.fill": T("Has the copy engine bring Q of one warpgroup.", is_always=True),
    "k_place = k.fill(k_place, k_descs, batch, kv_head, rows.kv_start(0": T(
        "Has the copy engine bring K of step 0.", is_always=True
    ),
    "k_place = k.fill(k_place, k_descs, batch, kv_head, rows.kv_start(step": T(
        "Waits for a free place, then has the copy engine bring K of this step.", is_always=True
    ),
    "v_place = fill_values(v, v_place, v_descs, rows, batch, kv_head, step - 1": T(
        "And V of the step before.", is_always=True
    ),
    "v_place = fill_values(v, v_place, v_descs, rows, batch, kv_head, rows.steps - 1": T(
        "And the last V.", is_always=True
    ),
    "q.collect": T("Waits until nobody needs its places any more.", is_always=True),
}

# By the file and the function that a statement is in.
TELLINGS: dict[tuple[str, str], Tellings] = {
    ("kernels/forward.py", "forward_kernel"): FORWARD,
    ("parts/softmax.py", "softmax_step"): STEP,
    ("parts/softmax.py", "softmax_join"): JOIN,
    ("parts/softmax.py", "softmax_merge"): MERGE,
    ("kernels/combine.py", "combine_kernel"): COMBINE,
    ("kernels/backward.py", "sum_over_rows"): DKV,
    ("kernels/backward.py", "dq_kernel"): DQ,
    ("kernels/hopper/consumer.py", "consume"): CONSUMER,
    ("kernels/hopper/producer.py", "produce"): PRODUCER,
}


@functools.cache
def tellings_in(file: str) -> dict[int, Telling]:
    """What is said of a file's statements, by their first line.

    Raises RuntimeError where a beginning is that of no statement of its function, or of several.
    """
    text = source_of(file)
    lines = text.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    first_lines = {first for first, _ in statements_of(file).values()}
    found: dict[int, Telling] = {}
    for (where, function), tellings in TELLINGS.items():
        if where != file:
            continue
        begin, end = function_lines(file, function)
        for key, telling in tellings.items():
            at = [
                line
                for line in range(begin, end + 1)
                if line in first_lines and text[starts[line - 1] :].lstrip(" ").startswith(key)
            ]
            if len(at) != 1:
                raise RuntimeError(f"{file}, {function}: {len(at)} statements begin with {key!r}, not one")
            found[at[0]] = telling
    return found


def function_lines(file: str, name: str) -> tuple[int, int]:
    """The first and the last line of a function."""
    for node in tree_of(file).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node.lineno, node.end_lineno or node.lineno
    raise RuntimeError(f"{file} has no function {name}")


def is_always_told(file: str, line: int) -> bool:
    """Whether the statement that begins at a line is shown although it sets nothing."""
    telling = tellings_in(file).get(line)
    return telling is not None and telling.is_always
