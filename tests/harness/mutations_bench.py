"""Planted bugs in what carries out a run: when Hopper's forward may run, what is kept, what is done again;
and in what the benchmarks make of packed sequences and of caches."""

from __future__ import annotations

from .mutation import Mutation

AGAIN = "bench/again.py"
ANSWERS = "bench/answers.py"
ANSWERS_AGAIN = "bench/answers_again.py"
ANSWERS_KNOWN = "bench/answers_known.py"
CASES = "reference/tilewise_reference/case.py"
GATE = "bench/gate.py"
GOALS = "bench/report/goals.py"
RIVALS = "bench/implementations"
RUN = "bench/run.py"
SCREEN = "bench/report/screen.py"
SEQUENCES = "bench/sequences.py"
STAGES = "bench/stages.py"
WORKERS = "bench/workers.py"


def tests(file: str, *names: str) -> tuple[str, ...]:
    """The node ids of tests in tests/bench/test_<file>.py."""
    return tuple(f"tests/bench/test_{file}.py::test_{name}" for name in names)


# fmt: off
MUTATIONS = (
    Mutation("run: Hopper needs no canary", GATE,
             "            if self.awaited.get(width):", "            if self.awaited.get(-width):",
             tests("gate", "nothing_of_hopper_runs_at_a_width_whose_canary_has_not_passed")),
    Mutation("run: one of two canaries is enough", GATE,
             "            names -= passed", "            names -= passed and names",
             tests("gate", "nothing_of_hopper_runs_at_a_width_whose_canary_has_not_passed")),
    Mutation("run: nobody is blamed for a hang", GATE,
             "self.shut.setdefault(width, (job.key, job.name))", "self.shut.get(width)",
             tests("gate", "where_a_process_hung_hoppers_forward_is_left_out_from_then_on")),
    Mutation("run: Hopper stays blamed for another's crash", GATE,
             "if at[0] != job.key}", "if at[0]}",
             tests("gate", "what_breaks_without_it_too_was_not_hoppers_doing")),
    Mutation("run: a hang that was cut is forgotten", RUN,
             "if outcome.seconds > outcome.task.seconds / 2:", "if outcome.seconds > outcome.task.seconds:",
             tests("gate", "a_check_of_hopper_that_is_cut_after_long_is_held_to_have_hung")),
    Mutation("run: an illegal address of Hopper's is forgiven", RUN,
             "(not entries or culprit(entries) == SUSPECT)", "not entries",
             tests("gate", "hopper_that_took_the_gpu_away_is_left_out_from_then_on")),
    Mutation("run: a hang called a crash", STAGES,
             '"hung" if outcome.hung else', '"failed" if outcome.hung else',
             tests("gate", "a_job_that_hung_says_so")),
    Mutation("workers: imports count", WORKERS,
             "self.end = min(time.monotonic() + STARTING, last)",
             "self.end = min(time.monotonic() + task.seconds, last)",
             tests("workers", "the_limit_counts_from_when_a_process_is_ready")),
    Mutation("workers: lanes share a process", WORKERS,
             "if worker.lane == lane or worker.is_new:", "if lane is not None:",
             tests("workers", "lanes_share_no_process")),
    Mutation("workers: what is asked for is not around the tasks", WORKERS,
             "    with inside():", "    with contextlib.nullcontext():",
             tests("workers", "tasks_are_done_inside_what_is_asked_for")),
    Mutation("workers: the GPU run's processes are forked", WORKERS,
             "        if is_forked:", "        if not is_forked:",
             tests("workers", "forked_processes_are_replaced_too")),
    Mutation("again: what hung is not done again", AGAIN,
             'check.status in ("right", "not applicable")', 'check.status != "wrong"',
             tests("first_light", "a_check_is_made_again_unless_it_was_right[hung-True]")),
    Mutation("again: a missing row does not matter", AGAIN,
             "if not found.keys() >= {*names}:", "if not found:",
             tests("first_light", "a_comparison_is_made_again_where_an_answer_of_tilewise_is_missing_or_bad"
                                  "[a rival is missing]")),
    Mutation("screen: what was not reached is not told", SCREEN,
             "            missing.append(job)", "            missing.append(job) if mine else None",
             tests("first_light", "the_screen_says_what_was_right_wrong_hung_and_not_reached")),
    Mutation("packed: equal lengths count once", CASES,
             "sum(count * self.sequence(length).pairs()", "sum(self.sequence(length).pairs()",
             ("tests/reference/test_cases.py::test_packed_sequences_count_as_each_does_by_itself",)),
    Mutation("packed: one sequence is looked at", ANSWERS,
             "where = [(order[i // case.q_heads],", "where = [(order[0],",
             tests("packed", "a_wrong_answer_is_wrong_in_every_sequence",
                   "places_go_from_the_shortest_to_the_longest_sequence")),
    Mutation("packed: what is learned is the first sequence's", ANSWERS,
             "else sum(x[1:], x[0])", "else x[0]",
             tests("packed", "what_all_sequences_learn_is_the_sum_of_what_each_does")),
    Mutation("packed: nested tensors wait for the GPU", f"{RIVALS}/jagged.py",
             "max_seqlen=ends[1]", "max_seqlen=None",
             tests("packed", "nested_tensors_are_given_what_they_would_else_wait_for")),
    Mutation("packed: flex sees the sequences before", f"{RIVALS}/flex.py",
             "of[i] == of[j]", "of[i] >= of[j]",
             tests("packed", "every_rival_is_asked_for_the_same_or_refuses_in_words[flex]")),
    Mutation("packed: varlen_attn sees the future", f"{RIVALS}/varlen.py",
             "        right = 0", "        right = None",
             tests("packed", "every_rival_is_asked_for_the_same_or_refuses_in_words[varlen_attn]")),
    Mutation("packed: a goal held against itself", GOALS,
             "+ goal.beside[1]", "+ goal.beside[0]",
             tests("report", "goals_of_packed_sequences_hold_them_against_dense_and_equal_ones")),
    Mutation("cache: keys of some sequences are not counted", CASES,
             "return self.lengths if self.cache is None else self.cache",
             "return self.lengths if self.cache is None else self.cache[:1]",
             ("tests/reference/test_cases.py::test_a_cache_counts_what_each_sequence_fills",)),
    Mutation("cache: every sequence is held against the first one's pages", SEQUENCES,
             'inputs.arguments["pages"][sequence,', 'inputs.arguments["pages"][0,',
             tests("decode", "every_rival_is_asked_for_the_same_or_refuses_in_words[tilewise torch]",
                   "a_wrong_answer_is_wrong_in_every_sequence")),
    Mutation("cache: flex sees a key beyond", f"{RIVALS}/flex.py",
             "j < lengths[b]", "j <= lengths[b]",
             tests("decode", "every_rival_is_asked_for_the_same_or_refuses_in_words[flex]")),
    Mutation("cache: flashinfer's full page is an empty one", f"{RIVALS}/flashinfer.py",
             "(length - 1) % size + 1", "length % size",
             tests("decode", "every_rival_is_asked_for_the_same_or_refuses_in_words[flashinfer]")),
    Mutation("cache: places by the number of the sequence", ANSWERS,
             "(case.cache or lengths).__getitem__", "lengths.__getitem__",
             tests("decode", "places_go_from_the_fewest_rows_to_the_most")),
    Mutation("cache: pages count as contiguous", GOALS,
             "row.bytes >= 256e6 and not paged", "row.bytes >= 256e6",
             tests("report", "goals_of_pages_hold_them_against_the_same_cache_without")),
    Mutation("bench: everyone is asked for second derivatives", f"{RIVALS}/base.py",
             'if work in ("double backward", "forward mode") and', 'if work == "double backward" and',
             tests("second_derivatives", "whoever_differentiates_once_says_so")),
    Mutation("bench: any second derivative is right", ANSWERS_AGAIN,
             "judge(name, torch.cat(got), exact", "judge(name, exact.to(got[0].dtype), exact",
             tests("second_derivatives", "a_wrong_derivative_of_the_right_order_is_found")),
    Mutation("bench: any statistic is right", ANSWERS_KNOWN,
             "judge(name, x, want,", "judge(name, want.to(x.dtype), want,",
             tests("statistics", "a_wrong_statistic_is_found")),
    Mutation("bench: whoever returns one statistic is asked for all", f"{RIVALS}/base.py",
             "        if missing:", "        if missing and not self.statistics:",
             tests("statistics", "whoever_returns_less_says_what_is_missing")),
    Mutation("case: a product of forward mode not counted", CASES,
             "3 * self.head_dim + 3 * self.value_dim", "3 * self.head_dim + 2 * self.value_dim",
             ("tests/reference/test_cases.py::test_counts_by_brute_force",)),
)
# fmt: on
