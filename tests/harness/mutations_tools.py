"""Planted bugs in what looks at a call without running it: bounds, counts of tiles, limits, strict."""

from __future__ import annotations

from .mutation import Mutation, tests

API = "kernels/tilewise/api.py"
BOUNDS = "kernels/tilewise/parts/bounds.py"
CHECKS = "kernels/tilewise/plan/checks.py"
COVERAGE = "kernels/tilewise/tools/explain/coverage.py"
DOCTOR = "kernels/tilewise/tools/doctor/doctor.py"
EXPLAIN = "kernels/tilewise/tools/explain/explain.py"
LIMITS = "kernels/tilewise/tools/explain/limits.py"
OVERLAP_BACKWARD = "kernels/tilewise/tools/overlap/backward.py"
OVERLAP_ORDER = "kernels/tilewise/tools/overlap/order.py"
PACKED_PARTS = "kernels/tilewise/tools/explain/parts.py"
PADDING = "kernels/tilewise/parts/masks/padding.py"
PLAIN = "kernels/tilewise/pytorch/plain.py"
QUADRATIC = "kernels/tilewise/plan/quadratic.py"
SPLITS = "kernels/tilewise/tools/explain/splits.py"
TUNE_CASE = "kernels/tilewise/tools/tune/case.py"
VARIANTS = "kernels/tilewise/tools/compiled/variants.py"
SUGGESTIONS = "kernels/tilewise/tools/explain/suggestions.py"
WORKLOAD = "kernels/tilewise/tools/explain/workload.py"
WINDOW = "kernels/tilewise/parts/masks/window.py"


OF_THE_DEVICE = "bounds_are_those_of_the_device_function"
CACHED_STEPS = "counts_are_the_steps_of_the_kernel"
STEPS = "counts_are_the_steps_of_the_kernels"

# fmt: off
MUTATIONS = (
    Mutation("bounds: window one key short", WINDOW,
             "return Bounds(row - left, row + right + 1)", "return Bounds(row - left, row + right)",
             tests("bounds", f"{OF_THE_DEVICE}[window]")),
    Mutation("bounds: padding on the left taken for the right", PADDING,
             "return Bounds(shape.kv_len - self.host_lengths(), FIRST_KEY + shape.kv_len)",
             "return Bounds(FIRST_KEY, self.host_lengths())",
             tests("bounds", f"{OF_THE_DEVICE}[padding]")),
    Mutation("bounds: lengths far outside", BOUNDS,
             'x.to("cpu", torch.int64).clamp(-UNLIMITED, UNLIMITED)', 'x.to("cpu", torch.int64)',
             tests("bounds", f"{OF_THE_DEVICE}[padding]")),
    Mutation("coverage: range one tile too short", COVERAGE,
             "last = torch.maximum(-(-ranges.stop // tile_kv), first)",
             "last = torch.maximum(ranges.stop // tile_kv, first)",
             tests("bounds", f"{STEPS}[causal]")),
    Mutation("coverage: rows beyond the last unmasked", COVERAGE,
             "full_stop[..., -1] = 0", "full_stop[..., -1] += 0",
             tests("bounds", f"{STEPS}[no mask]")),
    Mutation("coverage: runs of full tiles that do not end", COVERAGE,
             "ends = (index >= full_first) & ~is_full", "ends = index >= q_tiles",
             tests("bounds", f"{STEPS}[window]")),
    Mutation("coverage: an interval that is not known taken as none at all", COVERAGE,
             "whole = torch.zeros_like(whole)", "whole = whole & True",
             tests("bounds", "an_interval_that_cannot_run_here_is_named")),
    Mutation("coverage: rows that see nothing counted against others", COVERAGE,
             "return (rows.hi - rows.lo).clamp(min=0).sum(2)",
             "return (rows.hi - rows.lo).sum(2)",
             tests("bounds", "pairs_and_keys_against_the_dense_mask")),
    Mutation("limits: idle multiprocessors at work", LIMITS,
             "busy = working / chip.multiprocessors", "busy = 1.0",
             tests("explain_numbers", "idle_multiprocessors_make_the_rest_slower")),
    Mutation("limits: memory for multiprocessors that have no program", LIMITS,
             "memory=moved / min(chip.memory_bytes, ports)", "memory=moved / chip.memory_bytes",
             tests("explain_numbers", "idle_multiprocessors_make_the_rest_slower")),
    Mutation("suggestions: Hopper's forward on any chip", EXPLAIN,
             "not not_hopper and not is_hopper", "not is_hopper",
             tests("explain_advice", "hoppers_forward_is_suggested_where_it_takes_the_call")),
    Mutation("suggestions: a mask with gaps said to be the same", SUGGESTIONS,
             "found.append((lo, hi, hi - lo == count))", "found.append((lo, hi, hi - lo >= count))",
             tests("explain_advice", "advice_is_given_where_it_applies_and_nowhere_else"
                              "[a mask that a causal one bounds]")),
    Mutation("explain: what a mask says of one sequence taken for another", PACKED_PARTS,
             "x = x.index_select(axis, self.sequences.to(x.device))",
             "x = x.narrow(axis, 0, len(self.sequences))",
             tests("explain_packed", "counts_are_those_of_all_sequences_alone[padding of each]")),
    Mutation("explain: rows beyond a mask's tensors see keys", PACKED_PARTS,
             "return Bounds(lo, torch.where(reached, hi, 0), whole)", "return Bounds(lo, hi, whole)",
             tests("explain_packed", "rows_are_those_of_the_device_function[0-documents]")),
    Mutation("explain: tokens left over by equal lengths", PACKED_PARTS,
             "rows // shape.batch + (index < rows % shape.batch)", "rows // shape.batch + 0 * index",
             tests("explain_packed", "offsets_without_contents_stand_for_equal_lengths")),
    Mutation("explain: packed programs without a tile not counted", WORKLOAD,
             "return programs(shape, shape.q_len, tile_q, shape.q_heads), busy", "return busy, busy",
             tests("explain_packed", "programs_are_the_grids_of_the_launches")),
    Mutation("explain: packed programs without a tile at work", WORKLOAD,
             "work.chip, busy, flops, exponentials", "work.chip, started, flops, exponentials",
             tests("explain_packed_advice", "idle_programs_are_not_counted_as_work")),
    Mutation("explain: all tokens in every packed sequence", WORKLOAD,
             "return shape.blocks * shape.q_heads * shape.q_len",
             "return shape.batch * shape.q_heads * shape.q_len",
             tests("explain_packed", "memory_is_what_the_launchers_allocate")),
    Mutation("explain: offsets left where they are", EXPLAIN,
             '"dropout", "packing", "cache", "scales")', '"dropout", "cache", "scales")',
             tests("explain_packed", "meta_tensors_are_counted_by_offsets_that_lie_elsewhere")),
    Mutation("explain: scores of all sequences at once", PLAIN,
             "return max(held)", "return sum(held)",
             tests("explain_packed_advice", "plain_pytorch_holds_scores_of_one_sequence")),
    Mutation("explain: rows of a group's heads one head behind the other", SPLITS,
             "(shape.kv_heads, shape.group)).transpose(2, 3)", "(shape.kv_heads, shape.group))",
             tests("explain_cached", f"{CACHED_STEPS}[of each head-a few-None]")),
    Mutation("explain: splits that end inside a tile of keys", SPLITS,
             "split.size or ceil_div(ceil_div(kv_len, split.programs), tile_kv) * tile_kv",
             "split.size or ceil_div(kv_len, split.programs)",
             tests("explain_cached", f"{CACHED_STEPS}[no mask-decoding-None]")),
    Mutation("explain: keys split as on another chip", WORKLOAD,
             "return split_keys(self.shape, tile, self.chip.multiprocessors)",
             "return split_keys(self.shape, tile, 132)",
             tests("explain_cached", "a_chip_with_enough_programs_splits_nothing")),
    Mutation("explain: splits that write the result too", WORKLOAD,
             "moved += split_bytes(work, split) - written", "moved += split_bytes(work, split)",
             tests("explain_cached", "bytes_and_memory[decoding-False]")),
    Mutation("strict: strides forgotten in what passed", CHECKS,
             "r.strict and (is_watched(), *[t.stride() for _, t in r.other_tensors])", "r.strict",
             tests("strict", "strides_of_what_passed_are_remembered")),
    Mutation("strict: expanded dimensions count", QUADRATIC,
             "stored = [size if stride else 1 for", "stored = [size for",
             tests("strict", "what_is_linear_in_length_is_not[expanded bias]")),
    Mutation("strict: forgotten for nested tensors", API,
             "strict=strict,\n        deterministic=deterministic,\n        packing",
             "strict=strict and jagged is None,\n        deterministic=deterministic,\n        packing",
             tests("strict", "nested_tensors_are_linear")),
    Mutation("tune: the portable backward checked in place of Hopper's", TUNE_CASE,
             'impl="hopper") if work in HOPPER_PASSES', 'impl="hopper") if work == "hopper"',
             tests("tune_checks", "hoppers_answers_are_checked_in_the_emulator[hopper_backward]")),
    Mutation("tune: Hopper's backward beside half of the portable one", TUNE_CASE,
             'in FORWARDS else ("dkv", "dq")', 'in FORWARDS else ("dkv",)',
             tests("tune_checks", "hoppers_kernels_are_timed_beside_all_that_does_their_work")),
    Mutation("inspect: Hopper's backward by the rules of the forward", VARIANTS,
             '"hopper_backward": hopper_rules.backward_reasons', '"hopper_backward": hopper_rules.reasons',
             tests("inspect", "of_hoppers_backward_those_dimensions_are_inspected_that_it_takes")),
    Mutation("doctor: a forward that is proven stands for its backward", DOCTOR,
             "any(key[0] == work for key in PROVEN)", "bool(PROVEN)",
             tests("doctor", "what_a_gpu_has_proven_of_hoppers_forward_says_nothing_of_its_backward")),
    Mutation("doctor: NaN passes the self test", DOCTOR,
             "    if error <= limit:", "    if not limit < error < float('inf'):",
             tests("doctor", "a_wrong_result_is_a_problem")),
    # ---- Models of Hopper's backward
    Mutation("overlap: dQ leaves before it is there", OVERLAP_BACKWARD,
             'yield m.wait(m.all_came(("dQ", step)))', "pass",
             tests("overlap_backward", "nobody_runs_ahead[1-128]")),
    Mutation("overlap: a product too few", OVERLAP_BACKWARD,
             '"dV": along_rows, "dK": along_rows,',
             '"dV": along_rows, "dK": 0,',
             tests("overlap_backward", "five_products_of_as_many_clocks[128]")),
    Mutation("overlap: dQ passes the port once", OVERLAP_BACKWARD,
             "gradient = 2 * 4 *", "gradient = 4 *",
             tests("overlap_backward", "what_passes_the_port_of_shared_memory")),
    Mutation("order: nobody waits for the keys before", OVERLAP_ORDER,
             "added[head][m] if order.is_ordered else 0.0", "0.0",
             tests("overlap_order", "a_full_head_hands_over_once_a_program[True]")),
    Mutation("order: rows walked from the first", OVERLAP_ORDER,
             "return range(rows - 1, first - 1, -1) if", "return range(first, rows) if",
             tests("overlap_order", "a_walk_visits_the_rows_that_see_its_keys")),
)
# fmt: on
