"""Planted bugs in the ladder's tools: what is counted, and wrong answers that pass."""

from __future__ import annotations

from .mutation import Mutation, tests

CHECKS = "kernels/tilewise/ladder/checks.py"
COUNTING = "kernels/tilewise/ladder/counting.py"
KERNEL_CHECKS = "kernels/tilewise/ladder/kernel_checks.py"
VERDICT = "kernels/tilewise/ladder/verdict.py"

OF_KERNELS = "bytes_and_operations_of_kernels"
WRONG = "a_wrong_answer_is_told_what_is_wrong"

# fmt: off
MUTATIONS = (
    Mutation("ladder: bytes of two launches counted once", COUNTING,
             "        self.end_launch()\n        self.counts.programs", "        self.counts.programs",
             tests("ladder", OF_KERNELS)),
    Mutation("ladder: what a mask keeps out counted", COUNTING,
             "pointers.data[np.broadcast_to(mask.data, pointers.data.shape)], res", "pointers.data, res",
             tests("ladder", OF_KERNELS)),
    Mutation("ladder: the interpreter's own copies counted", COUNTING,
             " or self._counter.launches:", ":",
             tests("ladder", OF_KERNELS)),
    Mutation("ladder: views that move bytes", COUNTING,
             "if func.is_view or name in", "if name in",
             tests("ladder", "bytes_and_operations_of_pytorch")),
    Mutation("ladder: tiles visited in vain pass", CHECKS,
             "if len(cut + full) > len(wanted):", "if False:",
             tests("ladder", f"{WRONG}[5 all]")),
    Mutation("ladder: a stored matrix passes", KERNEL_CHECKS,
             "if counts.memory > expected + 2 * m * n:", "if False:",
             tests("ladder", f"{WRONG}[4 stores]")),
    Mutation("ladder: a producer that waits for each tile passes", KERNEL_CHECKS,
             "counts.most_in_flight < stages", "counts.most_in_flight < 0",
             tests("ladder", f"{WRONG}[9 in turn]")),
    Mutation("ladder: changed arguments pass", VERDICT,
             "not torch.equal(x.nan_to_num(), y.nan_to_num())", "False",
             tests("ladder", f"{WRONG}[1 changes]")),
)
# fmt: on
