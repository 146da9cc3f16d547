"""Planted bugs of calls that are repeated: what a call looks like, tapes, replays, launches."""

from __future__ import annotations

from .mutation import Mutation, tests

API = "kernels/tilewise/api.py"
AUTOGRAD = "kernels/tilewise/pytorch/autograd.py"
DISPATCH = "kernels/tilewise/pytorch/dispatch.py"
HOPPER = "kernels/tilewise/kernels/hopper/launch.py"
LAUNCH = "kernels/tilewise/kernels/launch.py"
LOOK = "kernels/tilewise/plan/look.py"
REPEATED = "kernels/tilewise/plan/repeated.py"
REPLAY = "kernels/tilewise/plan/replay.py"
REPLAYED = "kernels/tilewise/pytorch/replayed.py"
TAPE = "kernels/tilewise/plan/tape.py"

ALIKE = tests("look", "calls_that_look_alike_launch_the_same[dense]")
AROUND = tests("look", "what_is_around_a_call_is_looked_at")
PORTABLE = tests("launch", "in_a_child[portable]")
HOPPERS = tests("launch", "in_a_child[hopper]")
HOOKS = tests("replay_backward", "saved_tensors_may_come_back_with_other_strides")
KEPT = tests("replay", "no_tensor_is_kept")
LOOKED_ON = tests("replay", "who_looks_on_sees_the_long_way")
ONE_KEY = tests("replay_backward", "backwards_of_one_key_do_the_same[none]")
REPEATED_STEP = tests("replay", "new_tensors_views_and_operators_are_repeated")
TWICE = tests("replay", "a_tensor_given_twice_is_not_taken_for_one")

# fmt: off
MUTATIONS = (
    # ---- What a call looks like
    Mutation("look: strides are not seen", LOOK,
             "words += (x.shape, x.stride(), x.dtype, x.device)", "words += (x.shape, x.dtype, x.device)",
             ALIKE),
    Mutation("look: dtypes are not seen", LOOK,
             "words += (x.shape, x.stride(), x.dtype, x.device)", "words += (x.shape, x.stride(), x.device)",
             ALIKE),
    Mutation("look: 1, 1.0 and True are one", LOOK,
             "words += (type(value), value if value else repr(value))",
             "words += (value if value else repr(value),)",
             ALIKE),
    Mutation("look: 0.0 and -0.0 are one", LOOK,
             "value if value else repr(value))", "value)",
             ALIKE),
    Mutation("look: a mask or a score by its class alone", LOOK,
             "for name in kind.FIELDS:", "for name in ():",
             ALIKE),
    Mutation("look: what a part holds besides its FIELDS is left out", LOOK,
             'if len(holds) != len(kind.FIELDS) + ("_twin" in holds):', "if False:",
             tests("look", "what_cannot_be_told_has_no_look")),
    Mutation("look: whether lse is asked for is not seen", LOOK,
             "words: list[Any] = [return_lse]", "words: list[Any] = []",
             AROUND),
    Mutation("look: who requires a gradient is not seen", LOOK,
             "words += [x.requires_grad for x in tensors]", "pass",
             ALIKE),
    Mutation("look: a forced tile is not seen", LOOK,
             "tuple(forced.items()) if forced else None, tiles._walks", "None, tiles._walks",
             AROUND),
    Mutation("look: the precision of fp32 is not seen", LOOK,
             "        float32_precision(), torch.is_grad", "        torch.is_grad",
             AROUND),
    Mutation("look: the number of walks is not seen", LOOK,
             "tiles._walks, tiles.reloads", "tiles.reloads",
             AROUND),
    Mutation("look: tables that were read again are not seen", LOOK,
             "tiles._walks, tiles.reloads", "tiles._walks",
             tests("look", "tables_that_were_read_again_are_looked_at")),
    # ---- Tapes and replays
    Mutation("tape: inputs by themselves, so that one given twice is one", TAPE,
             "own = [x.detach() for x in inputs]", "own = list(inputs)",
             TWICE),
    Mutation("tape: a number that is read is not an obstacle", TAPE,
             "if not all(isinstance(x, Tensor) for x in made):", "if False:",
             tests("replay", "what_cannot_be_repeated_is_not[a number that is read]")),
    Mutation("tape: a view starts where its base does", TAPE,
             "offset = 0 if base is None else", "offset = 0 if base is None or True else",
             REPEATED_STEP),
    Mutation("tape: what the emulator runs is taken for nothing", HOPPER,
             'cannot_repeat("the emulator runs it")', "pass",
             tests("replay", "what_the_emulator_runs_is_not_repeated")),
    Mutation("replay: a view is made of the wrong place", REPLAY,
             "{base}.storage_offset() + {value.offset}", "{base}.storage_offset()",
             REPEATED_STEP),
    Mutation("replay: a part of a tensor is made in place of all of it", REPLAY,
             "return value.distance == 0 and value.tensor.numel() == value.root.tensor.numel()",
             "return value.distance == 0",
             tests("replay", "a_part_of_a_new_tensor_is_not_all_of_it")),
    Mutation("replay: an address inside a tensor is that of its start", REPLAY,
             '+ (f" + {distance}" if distance else "")', '+ ""',
             PORTABLE),
    Mutation("replay: any address will do", REPLAY,
             "        if pointed:\n            checks.append", "        if False:\n            checks.append",
             PORTABLE),
    Mutation("replay: surroundings of the first time for ever", REPLAY,
             'checks = ["now() != then"] if self.is_direct else []', "checks: list[str] = []",
             PORTABLE),
    Mutation("repeated: written down the first time", REPEATED,
             "if self.times != 2:", "if self.times != 1:",
             tests("replay", "what_comes_once_is_not_written_down")),
    Mutation("repeated: ever more steps are known", REPEATED,
             "if len(known) >= MOST:", "if False:",
             tests("replay", "no_more_steps_are_known_than_a_number")),
    # ---- Launches
    Mutation("launch: hooks are not called", LAUNCH,
             'getattr(before, "calls", before) or None,', "None,",
             PORTABLE),
    Mutation("launch: pre-run hooks are not called", LAUNCH,
             "        if self.kernel.pre_run_hooks:\n            return False\n", "",
             PORTABLE),
    Mutation("launch: a global variable may change", LAUNCH,
             "if where.get(name) is not thing or getattr", "if getattr",
             PORTABLE),
    Mutation("launch: the stream of the first time", REPLAY,
             'self.lines.append(f"stream = {self.constant(driver.active.get_current_stream)}({device})")',
             'self.lines.append(f"stream = {driver.active.get_current_stream(device)}")',
             PORTABLE),
    Mutation("launch: one map for all addresses", LAUNCH,
             "found = self._known.get(address)", "found = next(iter(self._known.values()), None)",
             HOPPERS),
    Mutation("launch: a descriptor keeps its tensor", LAUNCH,
             "self._like.base = None", "pass",
             HOPPERS),
    # ---- Who may not be repeated
    Mutation("replayed: a dispatch mode sees nothing", REPLAYED,
             "or torch._C._len_torch_dispatch_stack()", "",
             LOOKED_ON),
    Mutation("replayed: a function transform sees nothing", REPLAYED,
             "or torch._C._functorch.peek_interpreter_stack() is not None", "",
             LOOKED_ON),
    Mutation("replayed: whatever q is, it is asked where it lies", DISPATCH,
             "if type(q) not in TENSORS or not where.holds(q):", "if not where.holds(q):",
             tests("replay", "what_is_no_tensor_is_refused_in_words")),
    Mutation("look: subclasses are taken for tensors", LOOK,
             "PUT[type(value)](value, words, tensors)",
             "PUT[Tensor if isinstance(value, Tensor) else type(value)](value, words, tensors)",
             LOOKED_ON),
    Mutation("replayed: a tangent is lost", DISPATCH,
             "if is_observed() or forward_ad._current_level >= 0:", "if is_observed():",
             tests("replay", "a_tangent_goes_the_long_way")),
    Mutation("replayed: watchers are not told", API,
             "if not watchers and (found", "if (found",
             tests("replay", "watchers_are_told_of_every_call")),
    Mutation("replayed: an lse that nobody asked for", DISPATCH,
             "return out, lse if return_lse else None\n    results", "return out, lse\n    results",
             tests("replay", "a_repeated_call_is_short")),
    Mutation("replayed: a backward by its forward alone", REPLAYED,
             "return worthwhile((forward, needs, *[of_tensor(x) for x in tensors], *around()))",
             "return worthwhile((forward, needs, len(tensors), *around()))",
             HOOKS),
    Mutation("replayed: a backward whatever gradients are needed", REPLAYED,
             "worthwhile((forward, needs, *[", "worthwhile((forward, *[",
             ONE_KEY),
    Mutation("replayed: a backward whatever is around it", REPLAYED,
             "for x in tensors], *around()))\n\n\ndef repeat(", "for x in tensors]))\n\n\ndef repeat(",
             ONE_KEY),
    Mutation("replayed: a backward whatever the layout of lse's gradient", REPLAYED,
             "needs, *[of_tensor(x) for x in tensors]", "needs, *[of_tensor(x) for x in tensors[:-1]]",
             ONE_KEY),
    Mutation("replayed: words are not looked at", REPLAYED,
             "worthwhile((step, words, missing,", "worthwhile((step, missing,",
             tests("replay", "rows_that_are_written_into_a_cache")),
    Mutation("autograd: the tensors of a call are kept with its step", DISPATCH,
             "step.encoded = encoded._replace(tensors=[])", "step.encoded = encoded",
             KEPT),
)
# fmt: on
