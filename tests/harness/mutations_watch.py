"""Planted bugs in `tilewise watch`: what is recorded, of whom, from where, and what is said of it."""

from __future__ import annotations

from .mutation import Mutation, tests

CALLS = "kernels/tilewise/tools/watch/calls.py"
COMPARE = "kernels/tilewise/tools/watch/compare.py"
HOPPER = "kernels/tilewise/tools/watch/hopper.py"
PAGE = "kernels/tilewise/tools/watch/page.py"
RECORD = "kernels/tilewise/tools/watch/record.py"
RECORDING = "kernels/tilewise/tools/watch/recording.py"
SHOWN = "kernels/tilewise/tools/watch/shown.py"
STORY = "kernels/tilewise/tools/watch/story.py"
TELLING = "kernels/tilewise/tools/watch/telling.py"
TRACER = "kernels/tilewise/tools/watch/tracer.py"

OUTPUT = "every_program_ends_with_its_rows_of_the_output"
STATEMENT = "a_moment_names_the_statement_that_set_its_variables"
BYTES = "loads_name_the_bytes_that_were_read"

# fmt: off
MUTATIONS = (
    Mutation("watch: variables of the line after", TRACER,
             "        self.before, self.lines = now, lines\n", "        self.before = now\n",
             tests("watch", STATEMENT)),
    Mutation("watch: a variable that changed nothing is set", TRACER,
             "self.before.get(name, self) is not x", "self.before.get(name, self) is not None",
             tests("watch", STATEMENT)),
    Mutation("watch: bits of bfloat16 for numbers", TRACER,
             "    if dtype == tl.bfloat16:", "    if dtype == tl.float16:",
             tests("watch", f"{OUTPUT}[sink, window, groups, bf16]")),
    Mutation("watch: rows that are not read have an address", STORY,
             "rows = np.where(fetched.mask, addresses[:, 0], -1)", "rows = addresses[:, 0]",
             tests("watch", f"{BYTES}[forward-qkv]")),
    Mutation("watch: bytes counted from the head", STORY,
             '"k": ("k", "keys")', '"k": ("k", "queries")',
             tests("watch", f"{BYTES}[forward-qkv]")),
    Mutation("watch: the first batch for any other", STORY,
             'if integer(known["batch"]) != shown.batch:', "if False:",
             tests("watch", f"{OUTPUT}[sink, window, groups, bf16]")),
    Mutation("watch: padding columns shown", STORY,
             "x = x[:, : shown.value_dim]", "x = x[:, :]",
             tests("watch", f"{OUTPUT}[pieces]")),
    Mutation("watch: pieces side by side in the wrong order", STORY,
             "np.concatenate(parts, 1) if is_tile", "np.concatenate(parts[::-1], 1) if is_tile",
             tests("watch", f"{OUTPUT}[pieces]")),
    Mutation("watch: programs of nobody kept", STORY,
             "if owns[0] >= owns[1]:", "if owns[0] > owns[1] + 64:",
             tests("watch", f"{OUTPUT}[packed]")),
    Mutation("watch: cut tiles drawn as full", STORY,
             'grid[stage.tile] = CUT if stage.state == "cut" else FULL', "grid[stage.tile] = FULL",
             tests("watch", "grids_are_those_that_explain_counts")),
    Mutation("watch: merged rows in the order of the forward", STORY,
             "return x[[rows.index(row) for row in self.shown.merged_rows if row in rows]]",
             "return x[[at for at, row in enumerate(rows) if row in self.shown.merged_rows]][::-1]",
             tests("watch", f"{OUTPUT}[paged]")),
    Mutation("watch: a statement that nothing is said of", TELLING,
             '    "k = where_rows": T(', '    "dq = zero_pieces(TILE_Q, HEAD_TILE)": T(',
             tests("watch", "something_is_said_of_every_statement[softcap, ALiBi, documents, dropout]")),
    Mutation("watch: keys of pages in the order of the buffer", SHOWN,
             "pages.table[shown.batch].long()[key // pages.page_size]", "key // pages.page_size",
             tests("watch", "rows_in_pages_are_the_tensors_that_are_shown")),
    Mutation("watch: Hopper's kernel told of one warpgroup", HOPPER,
             '(0 if is_producer else integer(run.known["WARPGROUP"]))', "0",
             tests("watch", "hopper_is_told_by_role_and_comes_to_the_same")),
    Mutation("watch: the model's lanes without the tensor cores' second product", HOPPER,
             'work.name in ("S", "PV")', 'work.name == "PV" and work.step',
             tests("watch", "hopper_is_told_by_role_and_comes_to_the_same")),
    Mutation("watch: partial results beside those of all keys", COMPARE,
             "partial = (weight[own] * seen) @ values / total[:, None]", "partial = weight[own] @ values",
             tests("watch", "rounding_errors_are_those_of_the_partial_results")),
    Mutation("watch: a word that ends the data", PAGE,
             r'recording.to_json().replace("<", "\\u003c")', "recording.to_json()",
             tests("watch_command", "a_sentence_becomes_a_page_that_its_words_cannot_break")),
    Mutation("watch: a script goes on after its call", CALLS,
             "class _Found(BaseException):", "class _Found(Exception):",
             tests("watch_command", "a_scripts_call_is_watched_and_the_script_ends_there")),
    Mutation("watch: what is trained keeps its graph", RECORD,
             "with torch.no_grad():  # a script", "with torch.enable_grad():  # a script",
             tests("watch", f"{OUTPUT}[cosine, bias, fp16]")),
    Mutation("watch: decoding after any mask", RECORD,
             "and type(masks[0]) is Causal", "",
             tests("watch", "decoding_follows_what_it_would_repeat")),
)
# fmt: on
